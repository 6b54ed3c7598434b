"""SEED-Bench-2-Plus (arXiv 2404.16790), VLMEvalKit's table: SEEDBench2_Plus.tsv."""

from internvl_megatron.evaluate.benchmarks.benchmark import Benchmark
from internvl_megatron.evaluate.benchmarks.choice_prompt import choice_accuracy
from internvl_megatron.evaluate.benchmarks.choice_table import read_choice_table

BENCHMARK = Benchmark(
    name="seed2plus",
    title="SEED-Bench-2-Plus",
    read=lambda folder, _options: read_choice_table(folder / "SEEDBench2_Plus.tsv", ("category",)),
    score=choice_accuracy,
)
