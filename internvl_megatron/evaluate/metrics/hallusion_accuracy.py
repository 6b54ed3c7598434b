"""HallusionBench's three accuracies: of questions, of figures and of questions over all their figures (arXiv 2310.14566)."""

from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class HallusionAccuracy:
    """Shares from 0 to 1."""

    all: float
    """Of right answers (aAcc)."""
    figures: float
    """Of figures all of whose questions are answered right (fAcc)."""
    questions: float
    """Of questions that are answered right for every figure they are asked of (qAcc)."""

    @property
    def mean(self) -> float:
        """What InternVL3's paper gives."""
        return (self.all + self.figures + self.questions) / 3


def hallusion_accuracy(answers: Iterable[tuple[Hashable, Hashable, bool]]) -> HallusionAccuracy:
    """Of (figure, question, whether the answer is right); both are told apart from those of other sets."""
    right: list[bool] = []
    by_figure: dict[Hashable, list[bool]] = defaultdict(list)
    by_question: dict[Hashable, list[bool]] = defaultdict(list)
    for figure, question, is_right in answers:
        right.append(is_right)
        by_figure[figure].append(is_right)
        by_question[question].append(is_right)
    return HallusionAccuracy(_mean(right), _mean(map(all, by_figure.values())), _mean(map(all, by_question.values())))


def _mean(values: Iterable[bool]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
