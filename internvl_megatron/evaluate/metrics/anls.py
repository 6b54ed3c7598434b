"""Average normalised Levenshtein similarity, the metric of DocVQA and InfographicVQA (arXiv 1905.13648)."""

from collections.abc import Sequence

THRESHOLD = 0.5
"""Similarities below it count as 0."""


def anls(answer: str, truths: Sequence[str]) -> float:
    """Similarity to the nearest of the known answers, 0 to 1.

    The distance is between texts in small letters whose white space is one blank, its divisor the longer length as the texts
    stand: so do both public harnesses.
    """
    nearest = min(_distance_share(answer, truth) for truth in truths)
    return 1 - nearest if 1 - nearest >= THRESHOLD else 0.0


def edit_distance(first: str, second: str) -> int:
    """Characters to insert, remove or replace to make one of the other."""
    row = list(range(len(second) + 1))
    for number, character in enumerate(first, 1):
        diagonal, row[0] = row[0], number
        for place, other in enumerate(second, 1):
            diagonal, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, diagonal + (character != other))
    return row[-1]


def _distance_share(answer: str, truth: str) -> float:
    longest = max(len(answer), len(truth))
    return edit_distance(_plain(answer), _plain(truth)) / longest if longest else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
