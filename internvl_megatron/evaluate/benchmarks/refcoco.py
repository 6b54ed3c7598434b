"""RefCOCO, RefCOCO+ and RefCOCOg in the format of InternVL's own harness, which the paper's scores are from: refcoco_val.jsonl and seven
more, {"image", "sent", "bbox", "width", "height"} a line; `image` is found from the folder, as in coco/train2014/COCO_....jpg.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from internvl_megatron.evaluate.benchmarks.benchmark import Answered, Benchmark, Item, Options, Scores
from internvl_megatron.evaluate.metrics.box_overlap import MATCH, Brackets, box_in, overlap
from internvl_megatron.evaluate.sources.json_records import read_json_lines
from internvl_megatron.evaluate.sources.named_file import named_picture
from internvl_megatron.evaluate.sources.record import Record

_SPLITS = (
    "refcoco_val", "refcoco_testA", "refcoco_testB", "refcoco+_val", "refcoco+_testA", "refcoco+_testB", "refcocog_val", "refcocog_test",
)  # fmt: skip
_QUESTION = "Please provide the bounding box coordinate of the region this sentence describes: <ref>{}</ref>"


def _read(folder: Path, _options: Options) -> list[Item]:
    fields = ("image", "sent", "bbox", "width", "height")
    return [
        _item(record, f"{split}-{number}", split, folder)
        for split in _SPLITS
        for number, record in enumerate(read_json_lines(folder / f"{split}.jsonl", fields))
    ]


def _item(record: Record, name: str, split: str, folder: Path) -> Item:
    box = record.fields["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(side, int | float) for side in box):
        raise record.error("bbox", f"must be four numbers, left, top, right, bottom, not {box!r}")
    return Item(
        id=name,
        where=record.where,
        question=_QUESTION.format(record.text("sent")),
        pictures=(named_picture(folder, record.text("image"), record, "image"),),
        truth={"box": box, "size": [record.number("width"), record.number("height")]},
        labels={"split": split},
    )


def _score(answers: Sequence[Answered], options: Options) -> Scores:
    right: dict[str, list[bool]] = defaultdict(list)
    for answered in answers:
        truth = answered.item.truth
        box = box_in(answered.answer, *truth["size"], brackets=cast(Brackets, options["brackets"]))
        right[answered.item.labels["split"]].append(box is not None and overlap(box, truth["box"]) >= MATCH)
    parts = {f"split/{split}": 100 * sum(own) / len(own) for split, own in right.items()}
    return Scores(sum(parts.values()) / len(parts), "accuracy at IoU 0.5, mean of the splits", parts)


BENCHMARK = Benchmark(
    name="refcoco",
    title="RefCOCO/+/g",
    read=_read,
    score=_score,
    max_new_tokens=100,
    options={"brackets": ("needed", "optional")},
)
