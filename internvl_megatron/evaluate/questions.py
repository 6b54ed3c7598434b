"""Held-out questions with one right answer: exact match of every task against chance.

A questions file is jsonl: {id, [image], question, answer, [task], [chance]} a line. `image` is a path or a list of paths,
relative to the file's folder; `chance` is what answering without looking would score, the same for all questions of a
task (0 if it is not there). Everything in the file is checked before the first question is asked.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_megatron.data.conversation import IMAGE_PLACEHOLDER
from internvl_megatron.data.images import image_size
from internvl_megatron.data.jsonl_file import JsonlFile
from internvl_megatron.errors import DataError
from internvl_megatron.inference.prompt import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One line of a questions file, checked."""

    id: str | int
    task: str
    image: str | list[str] | None
    """As it stands in the file."""
    paths: tuple[str, ...]
    """The images, found from the working directory."""
    question: str
    truth: str
    chance: float
    """Share of right answers, 0 to below 1, that needs no understanding."""


@dataclass(frozen=True, slots=True)
class TaskScore:
    """How well one task went."""

    task: str
    num_questions: int
    exact_match: float
    """Share of answers equal to the truth, surrounding white space aside."""
    chance: float

    @property
    def gap_closed(self) -> float:
        """Share of the way from chance (0) to all right (1); below 0 when worse than chance."""
        return (self.exact_match - self.chance) / (1.0 - self.chance)


def evaluate_questions(
    questions_path: str | Path,
    answers_path: str | Path,
    answer: Callable[[Sequence[Prompt]], Sequence[str]],
) -> list[TaskScore]:
    """Ask every question by itself, write the answers, and score them.

    Args:
        questions_path: the questions file.
        answers_path: the answers file to write.
        answer: answers prompts, in their order.

    The answers file is jsonl: {id, task, image, question, answer, truth, chance, correct} a line, in the order of the
    questions. It appears complete or not at all.

    Raises:
        DataError: the questions file or an image of it is wrong; the message names file, line and field.
    """
    questions = read_questions(questions_path)
    prompts = [Prompt(question.question, question.paths) for question in questions]
    answers = answer(prompts)
    _write_answers(Path(answers_path), questions, answers)
    return score(questions, answers)


def read_questions(path: str | Path) -> list[Question]:
    """Read and check a questions file.

    Raises:
        DataError: at the first line that is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such questions file; check the path, or prepare the data first")
    file = JsonlFile(path)
    questions: list[Question] = []
    seen: set[str | int] = set()
    chances: dict[str, float] = {}
    for index in range(len(file)):
        question = _parse(file.read(index), file.where(index), path.parent)
        if question.id in seen:
            raise DataError(f"{file.where(index)}: field 'id': {question.id!r} is taken by an earlier line")
        if chances.setdefault(question.task, question.chance) != question.chance:
            raise DataError(
                f"{file.where(index)}: field 'chance': is {question.chance}, but {chances[question.task]} in earlier "
                f"lines of task {question.task!r}; a task has one"
            )
        seen.add(question.id)
        questions.append(question)
    return questions


def score(questions: Sequence[Question], answers: Sequence[str]) -> list[TaskScore]:
    """Scores of the tasks, in the order in which they first appear; answers are those of the questions, in order."""
    by_task: dict[str, list[bool]] = {}
    for question, answer in zip(questions, answers, strict=True):
        by_task.setdefault(question.task, []).append(_is_correct(question, answer))
    chances = {question.task: question.chance for question in questions}
    return [
        TaskScore(task, len(correct), sum(correct) / len(correct), chances[task]) for task, correct in by_task.items()
    ]


def format_table(scores: Sequence[TaskScore]) -> str:
    """A small table, one task a line."""
    header = ("task", "questions", "exact match", "chance", "gap closed")
    cells = [
        (one.task, str(one.num_questions), f"{one.exact_match:.1%}", f"{one.chance:.1%}", f"{one.gap_closed:.1%}")
        for one in scores
    ]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in (header, *cells)
    )


def _parse(raw: dict[str, Any], where: str, folder: Path) -> Question:
    """Check one line."""
    identity = raw.get("id")
    if not isinstance(identity, str | int) or isinstance(identity, bool) or identity == "":
        raise DataError(f"{where}: field 'id': must be a string or a whole number, not {identity!r}")
    chance = raw.get("chance", 0.0)
    if not isinstance(chance, int | float) or isinstance(chance, bool) or not 0 <= chance < 1:
        raise DataError(f"{where}: field 'chance': must be a number from 0 to below 1, not {chance!r}")
    text = _text(raw, "question", where)
    paths = _paths(raw.get("image"), where, folder)
    num_placeholders = text.count(IMAGE_PLACEHOLDER)
    # Without any placeholder the template puts the images first.
    if num_placeholders != len(paths) and num_placeholders:
        raise DataError(
            f"{where}: field 'question': has {num_placeholders} {IMAGE_PLACEHOLDER} but field 'image' has {len(paths)}; "
            "the two must be equal"
        )
    return Question(
        id=identity,
        task=_text({"task": "all", **raw}, "task", where),
        image=raw.get("image"),
        paths=paths,
        question=text,
        truth=_text(raw, "answer", where),
        chance=float(chance),
    )


def _text(raw: dict[str, Any], field: str, where: str) -> str:
    """A field that must be text that can be encoded (a JSON escape can spell half a surrogate pair)."""
    value = raw.get(field)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: field '{field}': must be a string that is not empty, not {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: field '{field}': has half a surrogate pair, which is not text") from None
    return value


def _paths(image: object, where: str, folder: Path) -> tuple[str, ...]:
    """Paths of field 'image', whose headers can be read."""
    listed = [image] if isinstance(image, str) else image or []
    if not isinstance(listed, list) or not all(isinstance(path, str) and path for path in listed):
        raise DataError(f"{where}: field 'image': must be a path or a list of paths, not {image!r}")
    paths = tuple(str(folder / path) for path in listed)
    for path in paths:
        try:
            image_size(path)
        except DataError as error:
            raise DataError(f"{where}: field 'image': {error}") from error
    return paths


def _is_correct(question: Question, answer: str) -> bool:
    return answer.strip() == question.truth.strip()


def _write_answers(path: Path, questions: Iterable[Question], answers: Iterable[str]) -> None:
    """Write the answers file under another name first."""
    rows = [
        {
            "id": question.id,
            "task": question.task,
            "image": question.image,
            "question": question.question,
            "answer": answer,
            "truth": question.truth,
            "chance": question.chance,
            "correct": _is_correct(question, answer),
        }
        for question, answer in zip(questions, answers, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)
