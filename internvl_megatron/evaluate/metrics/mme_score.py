"""MME's score: for each subtask the accuracy of its questions plus that of its images, in percent, at most 200 (arXiv 2306.13394)."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


@dataclass(frozen=True)
class MmeScore:
    """Sums over subtasks, of at most 2000 and 800."""

    by_subtask: Mapping[str, float]

    @property
    def perception(self) -> float:
        """Of ten subtasks."""
        return sum(self.by_subtask.get(name, 0.0) for name in PERCEPTION)

    @property
    def cognition(self) -> float:
        """Of four."""
        return sum(self.by_subtask.get(name, 0.0) for name in COGNITION)

    @property
    def total(self) -> float:
        """What InternVL3's paper gives."""
        return self.perception + self.cognition


def mme_score(answers: Iterable[tuple[str, str, bool]]) -> MmeScore:
    """Of (subtask, image, whether the answer is right) for every question; an image counts if all of its questions are right."""
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for subtask, image, is_right in answers:
        right[subtask][image].append(is_right)
    scores = {}
    for subtask, images in right.items():
        questions = [is_right for own in images.values() for is_right in own]
        scores[subtask] = 100 * (sum(questions) / len(questions) + sum(map(all, images.values())) / len(images))
    return MmeScore(scores)
