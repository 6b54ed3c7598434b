"""RealWorldQA (xAI, 2024), VLMEvalKit's table: RealWorldQA.tsv."""

from internvl_megatron.evaluate.benchmarks.benchmark import Benchmark
from internvl_megatron.evaluate.benchmarks.choice_prompt import choice_accuracy
from internvl_megatron.evaluate.benchmarks.choice_table import read_choice_table

BENCHMARK = Benchmark(
    name="realworldqa",
    title="RealWorldQA",
    read=lambda folder, _options: read_choice_table(folder / "RealWorldQA.tsv", ("category",)),
    score=choice_accuracy,
)
