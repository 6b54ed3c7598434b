"""Multiple-choice questions as InternVL is asked them (VLMEvalKit `build_multi_choice_prompt`), and how they are scored."""

import re
import string
from collections.abc import Mapping, Sequence

from internvl_megatron.evaluate.benchmarks.benchmark import Answered, Scores
from internvl_megatron.evaluate.metrics.accuracy import percent, percent_by_label
from internvl_megatron.evaluate.metrics.chosen_option import chosen_option
from internvl_megatron.evaluate.sources.record import Record

LETTERS = string.ascii_uppercase
_CHINESE = re.compile("[\u4e00-\u9fff]")


def choice_prompt(question: str, options: Mapping[str, str], hint: str | None = None) -> str:
    """Hint, question, a line for each option, and what to answer with, in Chinese where the text is.

    Args:
        question: text.
        options: texts by letters; none = the question is open.
        hint: put before the question.
    """
    lines = [] if hint is None else [hint]
    lines += [question, *(f"{letter}. {text}" for letter, text in options.items())]
    text = "\n".join(lines)
    if _CHINESE.search(text):
        return f"{text}\n{'请直接回答选项字母。' if options else '请直接回答问题。'}"
    ending = (
        "Answer with the option's letter from the given choices directly."
        if options
        else "Answer the question directly."
    )
    return f"{text}\n{ending}"


def lettered(texts: Sequence[str]) -> dict[str, str]:
    """Options by letters."""
    return dict(zip(LETTERS, texts, strict=False))


def column_options(record: Record) -> dict[str, str]:
    """Options of a record that has each in a column of its own, A, B, ..."""
    return {letter: record.text(letter) for letter in LETTERS if record.has(letter)}


def known_letter(record: Record, name: str, options: Mapping[str, str]) -> str:
    """The letter of the right option in a field. Raises `DataError` if it is none of them."""
    letter = record.text(name)
    if letter not in options:
        raise record.error(name, f"must be the letter of an option ({', '.join(options)}), not {letter!r}")
    return letter


def is_right_choice(answered: Answered) -> bool:
    """Whether an answer chooses the right option; the truth is {"letter", "options"}."""
    truth = answered.item.truth
    return chosen_option(answered.answer, truth["options"]) == truth["letter"]


def choice_accuracy(answers: Sequence[Answered], _options: Mapping[str, str]) -> Scores:
    """Share of right choices, in all and by label."""
    right = [(answered.item.labels, float(is_right_choice(answered))) for answered in answers]
    return Scores(percent(value for _, value in right), "accuracy", percent_by_label(right))
