"""Which ranks are called slow."""

import numpy as np
import pytest

from internvl_megatron.train.stragglers import find_stragglers

ROWS, TILES = 8, 20
STAGES = [0, 0, 0, 1, 1, 1]


def work(vision: list[float], language: list[float]) -> np.ndarray:
    """[ranks, kinds, 2] of milliseconds per tile and per row."""
    return np.array(
        [[[v * TILES / 1e3, TILES], [x * ROWS / 1e3, ROWS]] for v, x in zip(vision, language, strict=True)]
    )


def test_stages_are_compared_with_themselves() -> None:
    even = work([10] * 6, [50, 50, 50, 200, 200, 200])
    assert find_stragglers(even, STAGES, 1.5, 2.0) == []
    slow = work([10, 10, 10, 10, 30, 10], [50, 50, 110, 200, 200, 200])
    found = find_stragglers(slow, STAGES, 1.5, 2.0)
    assert [(one.name, pytest.approx(one.factor)) for one in found] == [
        ("rank 4 vision", 3.0),
        ("rank 2 language", 2.2),
    ]


def test_one_of_two_peers_can_be_slow() -> None:
    found = find_stragglers(work([10, 21], [50, 50]), [0, 0], 1.5, 1.0)
    assert [(one.rank, one.kind) for one in found] == [(1, "vision")]


def test_what_costs_the_step_nothing_is_not_told() -> None:
    slow = work([10, 10, 25], [50, 50, 50])
    assert find_stragglers(slow, [0, 0, 0], 1.5, step_seconds=5.0)
    assert not find_stragglers(slow, [0, 0, 0], 1.5, step_seconds=10.0), "0.3 s of 10 s"


def test_ranks_without_work_are_left_out() -> None:
    some = work([10, 10, 40], [50, 50, 50])
    some[2, 0] = 0
    some[:, 1, 1] = 0
    assert find_stragglers(some, [0, 0, 0], 1.5, 1.0) == []
    assert find_stragglers(work([90], [90]), [0], 1.5, 1.0) == []


def test_tiles_and_not_their_number_are_compared() -> None:
    uneven = work([10, 10, 10], [50, 50, 50])
    uneven[0, 0] *= 3
    assert find_stragglers(uneven, [0, 0, 0], 1.5, 1.0) == []
