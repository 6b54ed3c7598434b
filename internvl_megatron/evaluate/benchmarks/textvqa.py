"""TextVQA (arXiv 1904.08920) as it was released: TextVQA_0.5.1_val.json and the pictures in train_images/."""

from collections.abc import Sequence
from pathlib import Path

from internvl_megatron.evaluate.benchmarks.benchmark import SHORT, Answered, Benchmark, Item, Options, Scores
from internvl_megatron.evaluate.metrics.accuracy import percent
from internvl_megatron.evaluate.metrics.vqa_accuracy import vqa_accuracy
from internvl_megatron.evaluate.sources.json_records import read_json_list
from internvl_megatron.evaluate.sources.named_file import named_picture


def _read(folder: Path, _options: Options) -> list[Item]:
    fields = ("question_id", "question", "image_id", "answers")
    return [
        Item(
            id=record.text("question_id"),
            where=record.where,
            question=f"{record.text('question')}\n{SHORT}",
            pictures=(named_picture(folder / "train_images", f"{record.text('image_id')}.jpg", record, "image_id"),),
            truth=record.texts("answers"),
        )
        for record in read_json_list(folder / "TextVQA_0.5.1_val.json", fields, key="data")
    ]


def _score(answers: Sequence[Answered], _options: Options) -> Scores:
    return Scores(percent(vqa_accuracy(one.answer, one.item.truth) for one in answers), "VQA accuracy")


BENCHMARK = Benchmark(name="textvqa", title="TextVQA", read=_read, score=_score)
