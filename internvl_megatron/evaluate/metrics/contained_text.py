"""Whether a known answer stands somewhere in the answer: OCRBench's metric (arXiv 2305.07895)."""

from collections.abc import Sequence


def contains_any(answer: str, truths: Sequence[str], ignore_blanks: bool = False) -> bool:
    """Whether one of the known answers is part of the answer, line breaks being blanks.

    Args:
        answer: of the model.
        truths: known answers.
        ignore_blanks: compare without blanks and as the letters stand, for formulas; otherwise in small letters.
    """
    return any(_plain(truth, ignore_blanks) in _plain(answer, ignore_blanks) for truth in truths)


def _plain(text: str, ignore_blanks: bool) -> str:
    text = text.strip().replace("\n", " ")
    return text.replace(" ", "") if ignore_blanks else text.lower()
