"""AI2D (arXiv 1603.07396), VLMEvalKit's tables: AI2D_TEST.tsv has diagrams whose labels are letters, AI2D_TEST_NO_MASK.tsv as they are.

InternVL3's paper gives both, with and without mask.
"""

from pathlib import Path

from internvl_megatron.evaluate.benchmarks.benchmark import Benchmark, Item, Options
from internvl_megatron.evaluate.benchmarks.choice_prompt import choice_accuracy
from internvl_megatron.evaluate.benchmarks.choice_table import read_choice_table

_TABLES = {"yes": "AI2D_TEST.tsv", "no": "AI2D_TEST_NO_MASK.tsv"}


def _read(folder: Path, options: Options) -> list[Item]:
    return read_choice_table(folder / _TABLES[options["mask"]])


BENCHMARK = Benchmark(name="ai2d", title="AI2D", read=_read, score=choice_accuracy, options={"mask": ("yes", "no")})
