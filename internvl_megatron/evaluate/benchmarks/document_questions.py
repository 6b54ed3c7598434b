"""DocVQA and InfographicVQA in the format of their challenge (rrc.cvc.uab.es): a JSON file of questions, and a folder of pictures."""

from collections.abc import Sequence
from pathlib import Path

from internvl_megatron.evaluate.benchmarks.benchmark import SHORT, Answered, Item, Options, Scores
from internvl_megatron.evaluate.metrics.accuracy import percent, percent_by_label
from internvl_megatron.evaluate.metrics.anls import anls
from internvl_megatron.evaluate.sources.json_records import read_json_list
from internvl_megatron.evaluate.sources.named_file import named_picture


def read_documents(path: Path, image_field: str, image_root: Path, label: str | None = None) -> list[Item]:
    """Questions of a file {"data": [{"questionId", "question", "answers", ...}]}.

    Args:
        path: of the file.
        image_field: field with the name of the picture.
        image_root: folder of the pictures.
        label: field, a list, whose values the score is divided by.

    Raises:
        DataError: something in it is wrong.
    """
    items = []
    for record in read_json_list(path, ("questionId", "question", image_field, "answers"), key="data"):
        name = record.text(image_field)
        labels = {} if label is None or not record.has(label) else {label: ", ".join(sorted(record.texts(label)))}
        items.append(
            Item(
                id=record.text("questionId"),
                where=record.where,
                question=f"{record.text('question')}\n{SHORT}",
                pictures=(named_picture(image_root, name, record, image_field),),
                truth=record.texts("answers"),
                labels=labels,
            )
        )
    return items


def score_documents(answers: Sequence[Answered], _options: Options) -> Scores:
    """Mean ANLS, in percent."""
    values = [(answered.item.labels, anls(answered.answer, answered.item.truth)) for answered in answers]
    return Scores(percent(value for _, value in values), "ANLS", percent_by_label(values))
