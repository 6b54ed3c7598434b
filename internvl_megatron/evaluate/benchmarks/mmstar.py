"""MMStar (arXiv 2403.20330), VLMEvalKit's table: MMStar.tsv."""

from internvl_megatron.evaluate.benchmarks.benchmark import Benchmark
from internvl_megatron.evaluate.benchmarks.choice_prompt import choice_accuracy
from internvl_megatron.evaluate.benchmarks.choice_table import read_choice_table

BENCHMARK = Benchmark(
    name="mmstar",
    title="MMStar",
    read=lambda folder, _options: read_choice_table(folder / "MMStar.tsv", ("category", "l2_category")),
    score=choice_accuracy,
)
