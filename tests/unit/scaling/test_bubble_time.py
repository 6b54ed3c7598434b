"""The filled schedule against closed forms, bounds and the pipeline by itself."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from internvl_megatron.parallel.bubble_plan import BubblePlan
from internvl_megatron.parallel.tile_plan import TileTable
from internvl_megatron.scaling.bubble_time import BubbleWork, operations_of_stage
from internvl_megatron.scaling.pipeline_time import one_f_one_b, passes_of_stage
from internvl_megatron.scaling.step_time import StepCase, by_stage, in_slots, plan_of_step
from tests.support.models import small_model


def planned(tiles, pass_tiles, num_stages, tensor_size=1, chunk_tiles=2):
    """The trainer's plan for rows with these tiles, [M, R], whose forward passes take as long as `pass_tiles` of them."""
    case = StepCase(small_model(), num_stages, tensor_size, "in_bubbles", chunk_tiles=chunk_tiles)
    plan = plan_of_step(case, np.array(tiles), np.broadcast_to(pass_tiles, np.shape(tiles)).astype(float))
    assert plan is not None
    return plan


def by_hand(slot_of_chunk, chunks_ahead, chunks_back):
    """A plan of one replica that has only a time for its chunks."""
    nothing = np.zeros(0, dtype=np.int64)
    back = np.array(chunks_back)
    return BubblePlan(
        table=TileTable(*[nothing] * 8),
        encoder=nothing,
        chunk=nothing,
        num_chunks=len(slot_of_chunk),
        order=np.arange(back.shape[1])[None],
        slot_of_chunk=np.array(slot_of_chunk, dtype=np.int64),
        chunks_ahead=np.array(chunks_ahead),
        chunks_back=back,
    )


def tiles_of_ranks(plan, num_stages, num_ranks, tensor_size=1):
    """[P, C, R, T]."""
    counts = np.zeros((num_ranks, plan.num_chunks))
    np.add.at(counts, (plan.encoder, plan.chunk), 1)
    return by_stage(counts, num_stages, tensor_size)


def random_work(seed, num_stages, num_rows, num_replicas, tensor_size, vision):
    """Random rows, and passes and tiles of random durations."""
    rng = np.random.default_rng(seed)
    tiles = rng.integers(0, 12, (num_rows, num_replicas))
    passes = rng.uniform(1, 3, (num_stages, num_rows, num_replicas))
    plan = planned(tiles, passes.mean(axis=0) / vision, num_stages, tensor_size)
    encode = tiles_of_ranks(plan, num_stages, num_stages * num_replicas * tensor_size, tensor_size)
    encode = encode * vision * rng.uniform(0.8, 1.2, encode.shape)
    return BubbleWork(plan, in_slots(passes, plan), in_slots(2 * passes, plan), encode, 2 * encode)


CASES = [
    (seed, *case)
    for seed, case in enumerate(
        (stages, rows, replicas, tensor, vision)
        for stages, rows in ((2, 3), (4, 5), (4, 8), (3, 12))
        for replicas, tensor in ((1, 1), (3, 1), (2, 2))
        for vision in (0.05, 1.0)
    )
]


@pytest.mark.parametrize(("num_stages", "num_rows", "num_replicas"), [(2, 3, 1), (4, 8, 2), (3, 4, 1)])
def test_without_tiles_it_is_the_pipeline_by_itself(num_stages, num_rows, num_replicas):
    rng = np.random.default_rng(num_rows)
    forward, backward = rng.random((2, num_stages, num_rows, num_replicas, 5))
    plan = by_hand([], [0] * num_stages, np.zeros((num_stages, num_rows), dtype=np.int64))
    nothing = np.zeros((num_stages, 0, num_replicas, 1, 1))
    work = BubbleWork(plan, forward, backward, nothing, nothing)
    pipelines = one_f_one_b(forward, backward).makespan.max(axis=0)
    assert work.critical_path == pytest.approx(pipelines)
    assert work.least == pytest.approx(np.maximum(pipelines, (forward + backward).sum(axis=1).max(axis=(0, 1))))


def test_what_is_all_needed_first_and_back_last_is_in_phases():
    """One chunk in the first slot, encoded ahead, backward at the end: only the wait for the slowest is between."""
    rng = np.random.default_rng(0)
    forward, backward = rng.random((2, 3, 5, 1))
    encode, backprop = rng.uniform(4, 5, (2, 3, 1, 1, 2))  # longer than anything a rank could do before
    work = BubbleWork(by_hand([0], [1, 1, 1], np.zeros((3, 5), dtype=np.int64)), forward, backward, encode, backprop)
    times = one_f_one_b(forward, backward)
    # A stage runs backward when its own passes are over, the first stage last.
    ends = times.backward_end[:, -1, 0]
    assert work.critical_path == pytest.approx(encode.max() + (ends[:, None] + backprop[:, 0, 0]).max())


def test_a_slot_waits_for_its_tiles_and_their_gradients_for_the_first_stage():
    """By hand, two stages, three rows of passes 1 and 2; the second chunk is of the last slot, which waits for it."""
    plan = by_hand([0, 2], [1, 2], np.zeros((2, 3), dtype=np.int64))
    forward, backward = np.full((2, 3, 1), 1.0), np.full((2, 3, 1), 2.0)
    encode = np.array([[3.0, 9.0], [3.0, 0.0]])[..., None, None]
    # Stage 0: encode to 3, F0 4, F1 5, encode to 14, B0 16, F2 17, B1 19. Stage 1: F0 5, B0 7, F1 8, B1 10, F2 18, B2 20.
    # Stage 0: B2 22, backward 1 + 1; stage 1, which has no tile in the second chunk: first chunk at 20 (B0 was over at 16).
    work = BubbleWork(plan, forward, backward, encode, np.array([[1.0, 1.0], [5.0, 0.0]])[..., None, None])
    assert work.critical_path == 25.0
    # A rank that has a tile there waits for the gradient of the last slot.
    assert BubbleWork(plan, forward, backward, encode, np.full((2, 2, 1, 1), 4.0)).critical_path == 30.0


@pytest.mark.parametrize("tiles_per_row", [4, 8])
def test_equal_rows_cost_the_pipeline_and_the_first_and_last_row(tiles_per_row):
    num_stages, num_rows, vision, forward, backward = 4, 8, 0.02, 1.0, 2.0
    plan = planned(np.full((num_rows, 1), tiles_per_row), forward / vision, num_stages)
    encode = vision * tiles_of_ranks(plan, num_stages, num_stages)
    passes = np.ones((num_stages, num_rows, 1))
    work = BubbleWork(plan, forward * passes, backward * passes, encode, 2 * encode)
    share = vision * tiles_per_row / num_stages
    expected = (num_rows + num_stages - 1) * (forward + backward) + share + 2 * share
    assert work.critical_path == pytest.approx(expected)
    assert work.least == pytest.approx(expected)


@pytest.mark.parametrize(("seed", "num_stages", "num_rows", "num_replicas", "tensor_size", "vision"), CASES)
def test_never_faster_than_the_least_nor_slower_than_no_overlap(
    seed, num_stages, num_rows, num_replicas, tensor_size, vision
):
    work = random_work(seed, num_stages, num_rows, num_replicas, tensor_size, vision)
    assert work.critical_path >= work.least * (1 - 1e-9)
    in_turn = (
        work.forward.max(axis=2).sum()
        + work.backward.max(axis=2).sum()
        + (work.encode + work.backprop).max(axis=(2, 3)).sum()
    )
    assert work.critical_path <= in_turn * (1 + 1e-9)


@pytest.mark.parametrize(("seed", "num_stages", "num_rows", "num_replicas", "tensor_size", "vision"), CASES)
def test_every_stage_does_everything_once_with_megatrons_passes(
    seed, num_stages, num_rows, num_replicas, tensor_size, vision
):
    plan = random_work(seed, num_stages, num_rows, num_replicas, tensor_size, vision).plan
    for stage in range(num_stages):
        operations = operations_of_stage(plan, stage)
        passes = [operation for operation in operations if operation.kind in ("forward", "backward")]
        assert passes == passes_of_stage(stage, num_stages, num_rows)
        for kind in ("encode", "backprop"):
            chunks = [operation.number for operation in operations if operation.kind == kind]
            assert chunks == list(range(plan.num_chunks))
        last_encode = max(place for place, operation in enumerate(operations) if operation.kind == "encode")
        first_backprop = min(place for place, operation in enumerate(operations) if operation.kind == "backprop")
        assert last_encode < first_backprop
        # The pauses of the encoder are before gradients, or before and after all passes.
        for before, after in pairwise(operations):
            if before.kind == "encode":
                assert after.kind in ("encode", "backward") or after == ("forward", 0)


def test_longer_work_never_ends_earlier_and_all_scales():
    work = random_work(7, 4, 8, 2, 2, 0.2)
    path = work.critical_path
    parts = {name: getattr(work, name) for name in ("forward", "backward", "encode", "backprop")}
    twice = replace(work, **{name: 2 * part for name, part in parts.items()})
    assert twice.critical_path == pytest.approx(2 * path)
    for name, part in parts.items():
        assert replace(work, **{name: 1.3 * part}).critical_path >= path


def test_further_axes_are_cases_of_their_own():
    work = random_work(3, 3, 6, 2, 1, 0.3)
    factors = np.array([1.0, 2.0, 0.5])
    together = BubbleWork(
        plan=work.plan,
        forward=work.forward[..., None] * factors,
        backward=work.backward[..., None] * factors,
        encode=work.encode[..., None],
        backprop=work.backprop[..., None],
    )
    for case, factor in enumerate(factors):
        alone = replace(work, forward=factor * work.forward, backward=factor * work.backward)
        assert together.critical_path[case] == pytest.approx(alone.critical_path)
        assert together.least[case] == pytest.approx(alone.least)


def test_ranks_that_wait_for_each_other_are_noticed():
    plan = by_hand([0, 2], [1, 2], np.zeros((2, 3), dtype=np.int64))
    plan.chunks_back[0, 0] = 2  # gradients of the last slot, which has not even begun
    passes, chunks = np.ones((2, 3, 1)), np.ones((2, 2, 1, 1))
    with pytest.raises(AssertionError, match="wait for each other"):
        _ = BubbleWork(plan, passes, passes, chunks, chunks).critical_path
