"""ChartQA (arXiv 2203.10244) as it was released: test/test_human.json, test/test_augmented.json and the pictures in test/png/.

The score is the mean of the two kinds of questions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from internvl_megatron.evaluate.benchmarks.benchmark import SHORT, Answered, Benchmark, Item, Options, Scores
from internvl_megatron.evaluate.metrics.accuracy import percent
from internvl_megatron.evaluate.metrics.relaxed_accuracy import RelativeTo, is_relaxed_match
from internvl_megatron.evaluate.sources.json_records import read_json_list
from internvl_megatron.evaluate.sources.named_file import named_picture

_KINDS = ("human", "augmented")


def _read(folder: Path, _options: Options) -> list[Item]:
    items = []
    for kind in _KINDS:
        records = read_json_list(folder / "test" / f"test_{kind}.json", ("imgname", "query", "label"))
        items += [
            Item(
                id=f"{kind}-{number}",
                where=record.where,
                question=f"{record.text('query')}\n{SHORT}",
                pictures=(named_picture(folder / "test" / "png", record.text("imgname"), record, "imgname"),),
                truth=record.text("label"),
                labels={"kind": kind},
            )
            for number, record in enumerate(records)
        ]
    return items


def _score(answers: Sequence[Answered], options: Options) -> Scores:
    relative_to = cast(RelativeTo, options["tolerance_of"])
    right = {kind: [one for one in answers if one.item.labels["kind"] == kind] for kind in _KINDS}
    parts = {
        kind: percent(float(is_relaxed_match(one.answer, one.item.truth, relative_to)) for one in own)
        for kind, own in right.items()
        if own
    }
    return Scores(sum(parts.values()) / len(parts), "relaxed accuracy, mean of both kinds", parts)


BENCHMARK = Benchmark(
    name="chartqa",
    title="ChartQA",
    read=_read,
    score=_score,
    max_tiles=12,
    options={"tolerance_of": ("truth", "answer")},
)
