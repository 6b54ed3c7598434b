"""Which of several answers to a question to take. Imports nothing heavy."""

from collections.abc import Callable, Sequence


def best(scores: Sequence[float]) -> int:
    """Which answer has the highest score; the first of those that share it."""
    return max(range(len(scores)), key=scores.__getitem__)


def most_frequent(answers: Sequence[str], key: Callable[[str], str]) -> int:
    """Self-consistency (arXiv 2203.11171): an answer that says what most say, the first of them; of ties what came first.

    Args:
        answers: of one question, worked out or bare.
        key: what answers that say the same have in common; empty = it says nothing, and has no vote.
    """
    said = [key(answer) for answer in answers]
    votes = [said.count(one) if one else 0 for one in said]
    return best(votes)
