"""MMBench (arXiv 2307.06281), VLMEvalKit's tables, such as MMBench_DEV_EN.tsv: a question counts if it is answered right under
every rotation of its options (CircularEval).

Rotations of question n have the indices n, n + 1,000,000, n + 2,000,000, ... Answers of the test tables are not public.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from internvl_megatron.errors import DataError
from internvl_megatron.evaluate.benchmarks.benchmark import Answered, Benchmark, Item, Options, Scores
from internvl_megatron.evaluate.benchmarks.choice_prompt import is_right_choice
from internvl_megatron.evaluate.benchmarks.choice_table import read_choice_table
from internvl_megatron.evaluate.metrics.accuracy import percent, percent_by_label

_ROTATION = 1_000_000
_TABLES = {
    "dev_en": "MMBench_DEV_EN.tsv",
    "dev_cn": "MMBench_DEV_CN.tsv",
    "dev_en_v11": "MMBench_DEV_EN_V11.tsv",
    "dev_cn_v11": "MMBench_DEV_CN_V11.tsv",
}


def _read(folder: Path, options: Options) -> list[Item]:
    items = read_choice_table(folder / _TABLES[options["table"]], ("category", "l2-category"))
    numbers = set()
    for item in items:
        if not item.id.isdecimal():
            raise DataError(f"{item.where}: field 'index': must be a whole number, not {item.id!r}")
        numbers.add(int(item.id))
    for item in items:
        if int(item.id) % _ROTATION not in numbers:
            raise DataError(
                f"{item.where}: field 'index': rotates question {int(item.id) % _ROTATION}, which is not there"
            )
    return items


def _score(answers: Sequence[Answered], _options: Options) -> Scores:
    rotations: dict[int, list[Answered]] = defaultdict(list)
    for answered in answers:
        rotations[int(answered.item.id) % _ROTATION].append(answered)
    right = [(own[0].item.labels, float(all(map(is_right_choice, own)))) for own in rotations.values()]
    plain = percent(float(is_right_choice(own[0])) for own in rotations.values())
    return Scores(
        percent(value for _, value in right),
        "accuracy over all rotations",
        {"accuracy without rotations": plain, **percent_by_label(right)},
    )


BENCHMARK = Benchmark(name="mmbench", title="MMBench", read=_read, score=_score, options={"table": tuple(_TABLES)})
