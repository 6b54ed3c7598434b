"""Benchmarks that are a table of VLMEvalKit's with a multiple-choice question a row."""

from collections.abc import Sequence
from pathlib import Path

from internvl_megatron.evaluate.benchmarks.benchmark import Item
from internvl_megatron.evaluate.benchmarks.choice_prompt import choice_prompt, column_options, known_letter
from internvl_megatron.evaluate.sources.tsv_table import PICTURES, read_tsv


def read_choice_table(path: Path, labels: Sequence[str] = ("category",)) -> list[Item]:
    """Questions of a table with columns index, image, question, A, B, ..., answer and perhaps hint.

    Raises:
        DataError: something in it is wrong.
    """
    items = []
    for record in read_tsv(path, ("index", PICTURES, "question", "A", "B", "answer")):
        options = column_options(record)
        hint = record.text("hint") if record.has("hint") else None
        items.append(
            Item(
                id=record.text("index"),
                where=record.where,
                question=choice_prompt(record.text("question"), options, hint),
                pictures=record.images(PICTURES),
                truth={"letter": known_letter(record, "answer", options), "options": options},
                labels=record.labels(*labels),
            )
        )
    return items
