"""1F1B against closed forms and a case worked out by hand."""

from itertools import pairwise

import numpy as np
import pytest

from internvl_megatron.scaling.pipeline_time import one_f_one_b, passes_of_stage


def same(num_stages, num_rows, forward, backward):
    """Equal passes everywhere."""
    return np.full((num_stages, num_rows), forward), np.full((num_stages, num_rows), backward)


@pytest.mark.parametrize(("num_stages", "num_rows"), [(1, 1), (1, 5), (2, 1), (4, 2), (4, 4), (4, 8), (3, 20)])
def test_equal_passes(num_stages, num_rows):
    times = one_f_one_b(*same(num_stages, num_rows, 1.0, 2.5))
    assert times.makespan == pytest.approx((num_rows + num_stages - 1) * (1.0 + 2.5))


def test_one_stage_runs_everything_one_after_the_other():
    rng = np.random.default_rng(0)
    forward, backward = rng.random((1, 6)), rng.random((1, 6))
    times = one_f_one_b(forward, backward)
    assert times.makespan == pytest.approx(forward.sum() + backward.sum())
    assert times.backward_start[0, 0] == pytest.approx(forward[0, 0])


@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_a_slow_last_stage_works_without_a_pause(num_rows):
    forward, backward = same(4, num_rows, 1.0, 2.0)
    forward[-1], backward[-1] = 5.0, 9.0
    assert one_f_one_b(forward, backward).makespan == pytest.approx(3 * (1.0 + 2.0) + num_rows * (5.0 + 9.0))


@pytest.mark.parametrize("num_rows", [4, 8])
def test_a_slow_first_stage_hides_all_others(num_rows):
    """A first stage whose passes take longer than a forward and a backward pass of the others never waits for them."""
    forward, backward = same(4, num_rows, 1.0, 2.0)
    forward[0], backward[0] = 3.0, 6.0
    assert one_f_one_b(forward, backward).makespan == pytest.approx(num_rows * (3.0 + 6.0))


def test_two_stages_two_unequal_rows():
    """By hand: stage 0 runs F0 F1 B0 B1, stage 1 F0 B0 F1 B1."""
    forward = np.array([[1.0, 4.0], [2.0, 1.0]])
    backward = np.array([[2.0, 3.0], [1.0, 5.0]])
    times = one_f_one_b(forward, backward)
    assert times.forward_start.tolist() == [[0.0, 1.0], [1.0, 5.0]]
    assert times.backward_start.tolist() == [[5.0, 11.0], [3.0, 6.0]]
    assert times.backward_end.tolist() == [[7.0, 14.0], [4.0, 11.0]]
    assert times.makespan == 14.0


def test_no_pass_begins_before_its_input_and_none_overlap():
    rng = np.random.default_rng(1)
    forward, backward = rng.random((4, 7)), rng.random((4, 7))
    times = one_f_one_b(forward, backward)
    assert (times.forward_start[1:] >= times.forward_end[:-1]).all()
    assert (times.backward_start[:-1] >= times.backward_end[1:]).all()
    for stage in range(4):
        spans = [
            (getattr(times, f"{kind}_start")[stage, row], getattr(times, f"{kind}_end")[stage, row])
            for kind, row in passes_of_stage(stage, 4, 7)
        ]
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_further_axes_are_cases_of_their_own():
    rng = np.random.default_rng(2)
    forward, backward = rng.random((3, 5, 2, 4)), rng.random((3, 5, 2, 4))
    together = one_f_one_b(forward, backward).makespan
    assert together.shape == (2, 4)
    for case in np.ndindex(2, 4):
        alone = one_f_one_b(forward[(..., *case)], backward[(..., *case)]).makespan
        assert together[case] == pytest.approx(alone)
