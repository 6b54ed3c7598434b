"""MMMU (arXiv 2311.16502), the hub's MMMU/MMMU: a folder for each of 30 subjects with validation-*.parquet.

As VLMEvalKit does for InternVL, pictures go in the order in which the question and its options name them, as `<image 1>`, which becomes
`<Image-1>`, or a line break where there is one alone; and the first is enlarged. Open questions are scored by its rule, the known answer
against "Other Answers".
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

from internvl_megatron.evaluate.benchmarks.benchmark import Answered, Benchmark, Item, Options, Scores
from internvl_megatron.evaluate.benchmarks.choice_prompt import choice_prompt, known_letter, lettered
from internvl_megatron.evaluate.benchmarks.reasoning_prompt import REASONING, conclusion, with_reasoning
from internvl_megatron.evaluate.metrics.accuracy import percent, percent_by_label
from internvl_megatron.evaluate.metrics.chosen_option import chosen_option
from internvl_megatron.evaluate.sources.folder_files import matching_files
from internvl_megatron.evaluate.sources.parquet_table import read_parquet
from internvl_megatron.evaluate.sources.picture import Picture
from internvl_megatron.evaluate.sources.record import Record, spelled_list

_PICTURES = tuple(f"image_{number}" for number in range(1, 8))
_NAMED = re.compile(r"<image (\d)>")
_ENLARGEMENT = 2


def _read(folder: Path, options: Options) -> list[Item]:
    paths = matching_files(folder, "*/validation-*.parquet")
    records = read_parquet(paths, ("id", "question", "options", "answer", "question_type"), _PICTURES)
    return [_item(record, options["reasoning"]) for record in records]


def _item(record: Record, reasoning: str) -> Item:
    is_choice = record.text("question_type") == "multiple-choice"
    choices = lettered(record.texts("options", at_least=2)) if is_choice else {}
    prompt = choice_prompt(record.text("question"), choices)
    text, pictures = _placed(with_reasoning(prompt, is_choice) if reasoning == "yes" else prompt, record)
    truths = (
        [{"letter": known_letter(record, "answer", choices), "options": choices}]
        if is_choice
        else _open_truths(record)
    )
    parts = record.text("id").split("_")
    return Item(
        id=record.text("id"),
        where=record.where,
        question=text,
        pictures=pictures,
        truth=truths,
        labels={"subject": "_".join(parts[1:-1]) or record.text("id")},
    )


def _placed(text: str, record: Record) -> tuple[str, tuple[Picture, ...]]:
    """The text of a prompt, and its pictures: one for each time that one is named, all where none is."""
    names = [f"image_{number}" for number in _NAMED.findall(text)]
    pictures = [picture for name in names or _PICTURES for picture in record.images(name, needed=bool(names))]
    if not pictures:
        raise record.error("image_1", "has no picture; download the file again")
    pictures[0] = replace(pictures[0], enlargement=_ENLARGEMENT)
    if len(pictures) == 1:
        return _NAMED.sub("\n", text), tuple(pictures)
    places = count(1)
    named = _NAMED.sub(lambda _: f"<Image-{next(places)}>", text)
    return named.replace("".join(f"<Image-{place}>" for place in range(1, len(pictures) + 1)), ""), tuple(pictures)


def _open_truths(record: Record) -> list[dict[str, object]]:
    """Each known answer as an option."""
    answers = spelled_list(record.text("answer")) or [record.text("answer")]
    return [{"letter": "A", "options": {"A": str(answer), "B": "Other Answers"}} for answer in answers]


def _score(answers: Sequence[Answered], options: Options) -> Scores:
    right = []
    for answered in answers:
        answer = conclusion(answered.answer, options["reasoning"])
        is_right = any(chosen_option(answer, truth["options"]) == truth["letter"] for truth in answered.item.truth)
        right.append((answered.item.labels, float(is_right)))
    return Scores(percent(value for _, value in right), "accuracy", percent_by_label(right))


BENCHMARK = Benchmark(name="mmmu", title="MMMU", read=_read, score=_score, max_tiles=12, options=REASONING)
