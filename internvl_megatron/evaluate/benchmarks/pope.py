"""POPE (arXiv 2305.10355) as it was released: coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json, an object
a line, and COCO's pictures in val2014/.

What follows the question is InternVL's own harness's; VLMEvalKit adds nothing (`suffix=none`).
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from internvl_megatron.evaluate.benchmarks.benchmark import SHORT, Answered, Benchmark, Item, Options, Scores
from internvl_megatron.evaluate.metrics.yes_no import YesNoScore, said, yes_no_score
from internvl_megatron.evaluate.sources.json_records import read_json_lines
from internvl_megatron.evaluate.sources.named_file import named_picture
from internvl_megatron.evaluate.sources.record import Record

_SETTINGS = ("random", "popular", "adversarial")


def _read(folder: Path, options: Options) -> list[Item]:
    fields = ("question_id", "image", "text", "label")
    return [
        _item(record, setting, folder, f" {SHORT}" if options["suffix"] == "short" else "")
        for setting in _SETTINGS
        for record in read_json_lines(folder / f"coco_pope_{setting}.json", fields)
    ]


def _item(record: Record, setting: str, folder: Path, suffix: str) -> Item:
    label = record.text("label").lower()
    if label not in ("yes", "no"):
        raise record.error("label", f"must be yes or no, not {record.text('label')!r}")
    return Item(
        id=f"{setting}-{record.text('question_id')}",
        where=record.where,
        question=record.text("text") + suffix,
        pictures=(named_picture(folder / "val2014", record.text("image"), record, "image"),),
        truth=label == "yes",
        labels={"setting": setting},
    )


def _of(answers: Sequence[Answered]) -> YesNoScore:
    return yes_no_score((said(one.answer), one.item.truth) for one in answers)


def _score(answers: Sequence[Answered], _options: Options) -> Scores:
    by_setting: dict[str, list[Answered]] = defaultdict(list)
    for answered in answers:
        by_setting[answered.item.labels["setting"]].append(answered)
    whole = _of(answers)
    parts = {name: 100 * value for name, value in asdict(whole).items()}
    for setting, own in by_setting.items():
        parts |= {f"setting/{setting} {name}": 100 * value for name, value in asdict(_of(own)).items()}
    return Scores(100 * whole.f1, "F1 of all questions", parts)


BENCHMARK = Benchmark(name="pope", title="POPE", read=_read, score=_score, options={"suffix": ("short", "none")})
