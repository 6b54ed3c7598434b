"""Relaxed accuracy, the metric of ChartQA: numbers may be 5 % off, other answers must be equal (arXiv 2203.10244, sec. 5.1)."""

from typing import Literal

TOLERANCE = 0.05

RelativeTo = Literal["truth", "answer"]
"""Which of the two numbers the 5 % are of. The metric's own definition is the truth; InternVL's own harness calls its function with
the two swapped, so that they are of the answer (`eval/vqa/evaluate_vqa.py`)."""


def is_relaxed_match(answer: str, truth: str, relative_to: RelativeTo = "truth") -> bool:
    """Whether an answer is right. A `%` at the end divides by 100; where the reference number is 0, texts are compared."""
    given, wanted = answer.strip(), truth.strip()
    number, reference = _number(given), _number(wanted)
    if relative_to == "answer":
        number, reference = reference, number
    if number is not None and reference:
        return abs(number - reference) / abs(reference) <= TOLERANCE
    return given.lower() == wanted.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
