"""Answers to yes-or-no questions: what they say, and precision, recall and F1 of "yes" (POPE, arXiv 2305.10355)."""

from collections.abc import Iterable
from dataclasses import dataclass

from internvl_megatron.evaluate.metrics.vqa_accuracy import without_punctuation


def said(answer: str) -> bool | None:
    """Whether an answer says yes (True) or no (False); None if it says neither or both."""
    words = without_punctuation(answer.lower()).split()
    yes, no = "yes" in words, "no" in words
    return None if yes == no else yes


@dataclass(frozen=True)
class YesNoScore:
    """Shares from 0 to 1. What says neither counts as no; where nothing is to be divided by, a share is 0."""

    accuracy: float
    """Unlike the others it counts an answer that says neither as wrong, also where "no" is right."""
    precision: float
    recall: float
    f1: float
    yes_share: float


def yes_no_score(answers: Iterable[tuple[bool | None, bool]]) -> YesNoScore:
    """Of pairs (what was said, what is true)."""
    pairs = list(answers)
    hits = sum(said is True and true for said, true in pairs)
    said_yes, is_yes = sum(said is True for said, _ in pairs), sum(true for _, true in pairs)
    right = sum(said is true for said, true in pairs)
    return YesNoScore(
        accuracy=_share(right, len(pairs)),
        precision=_share(hits, said_yes),
        recall=_share(hits, is_yes),
        f1=_share(2 * hits, said_yes + is_yes),  # = 2 P R / (P + R)
        yes_share=_share(said_yes, len(pairs)),
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
