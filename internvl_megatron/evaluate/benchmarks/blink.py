"""BLINK (arXiv 2404.12390), VLMEvalKit's table: BLINK.tsv; several pictures a question."""

from internvl_megatron.evaluate.benchmarks.benchmark import Benchmark
from internvl_megatron.evaluate.benchmarks.choice_prompt import choice_accuracy
from internvl_megatron.evaluate.benchmarks.choice_table import read_choice_table

BENCHMARK = Benchmark(
    name="blink",
    title="BLINK",
    read=lambda folder, _options: read_choice_table(folder / "BLINK.tsv", ("category",)),
    score=choice_accuracy,
)
