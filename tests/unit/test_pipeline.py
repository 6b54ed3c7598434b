"""What the pipeline's figures mean, where they are known beforehand."""

import pytest

from tools.pipeline import preferred, ranking

MIXED = [(0.9, True), (0.5, False), (0.1, False)]


def test_order() -> None:
    assert (preferred(2, 1), preferred(1, 2), preferred(1, 1)) == (1.0, 0.0, 0.5)


def test_a_perfect_judge_and_its_opposite() -> None:
    questions = [MIXED, [(0.2, False), (0.3, True)], [(0.7, True)], [(0.2, False), (0.9, False)]]
    assert ranking(questions) == {"questions": 2, "pairs": 3, "order": 1.0, "best": 1.0, "any": pytest.approx(5 / 12)}
    reverse = ranking([[(-score, is_right) for score, is_right in own] for own in questions])
    assert (reverse["order"], reverse["best"]) == (0.0, 0.0)


def test_a_judge_that_says_the_same_of_all_is_chance() -> None:
    figures = ranking([[(0.5, is_right) for _, is_right in MIXED]])
    assert figures["order"] == 0.5 and figures["best"] == figures["any"] == pytest.approx(1 / 3)


def test_pairs_count_alike() -> None:
    figures = ranking([MIXED, [(0.4, True), (0.6, False)]])
    assert figures["order"] == pytest.approx(2 / 3) and figures["best"] == 0.5
