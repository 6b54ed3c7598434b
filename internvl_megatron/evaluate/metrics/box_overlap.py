"""Boxes in answers, and how far two boxes overlap: the metric of RefCOCO, RefCOCO+ and RefCOCOg."""

import re
from collections.abc import Sequence
from typing import Literal

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

SCALE = 1000
"""Coordinates in answers are thousandths of the width and height; where all four add up to less than 4 they are taken for shares
(InternVL `eval/refcoco/evaluate_grounding.py`)."""

MATCH = 0.5
"""Boxes that overlap so far are the same."""

Brackets = Literal["needed", "optional"]
"""InternVL's own harness reads boxes in brackets alone; VLMEvalKit also four numbers without."""

_NUMBER = r"(-?\d+(?:\.\d+)?)"
_FOUR = r"\s*,\s*".join([_NUMBER] * 4)
_IN_BRACKETS = re.compile(rf"\[\s*{_FOUR}\s*\]")
_BARE = re.compile(_FOUR)


def box_in(answer: str, width: float, height: float, brackets: Brackets = "needed") -> Box | None:
    """The first box of an answer, in pixels of an image of this size; None if it has none."""
    found = _IN_BRACKETS.search(answer) or (_BARE.search(answer) if brackets == "optional" else None)
    if found is None:
        return None
    left, top, right, bottom = map(float, found.groups())
    scale = SCALE if left + top + right + bottom >= 4 else 1
    return left * width / scale, top * height / scale, right * width / scale, bottom * height / scale


def overlap(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union, 0 to 1; 0 where the union has no area."""
    sides = [max(0.0, min(first[k + 2], second[k + 2]) - max(first[k], second[k])) for k in (0, 1)]
    shared = sides[0] * sides[1]
    union = _area(first) + _area(second) - shared
    return shared / union if union > 0 else 0.0


def _area(box: Sequence[float]) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
