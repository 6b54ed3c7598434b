"""Schedules by who encodes, against closed forms and the simulations that know one of them each."""

from itertools import pairwise

import numpy as np
import pytest

from internvl_megatron.parallel.bubble_plan import BubblePlan
from internvl_megatron.scaling.encoder_schedules import (
    PipelineSeconds,
    disaggregated,
    encoder_order,
    in_bubbles,
    in_first_stage,
    phases_apart,
)
from internvl_megatron.scaling.event_time import Hop, Work, run
from internvl_megatron.scaling.pipeline_time import one_f_one_b, passes_of_stage
from internvl_megatron.scaling.step_time import WindowWork
from tests.unit.scaling.test_bubble_time import random_work


def equal(num_ranks, num_rows, num_chunks=1, forward=1.0, backward=2.0):
    shape = (num_ranks * num_chunks, num_rows)
    return PipelineSeconds(np.full(shape, forward), np.full(shape, backward), num_ranks)


def drawn(num_ranks, num_rows, seed=0):
    rng = np.random.default_rng(seed)
    forward, backward = rng.random((2, num_ranks, num_rows))
    passes = PipelineSeconds(forward, backward, num_ranks)
    return passes, *rng.random((2, num_rows))


def works(tasks):
    return [task.work for task in tasks]


@pytest.mark.parametrize(("num_ranks", "num_rows"), [(2, 3), (4, 8), (4, 2)])
def test_the_first_stage_s_passes_hold_the_encoder(num_ranks, num_rows):
    """As `step_time` counts it: 1F1B with longer passes of the first stage."""
    passes, encode, backprop = drawn(num_ranks, num_rows)
    forward, backward = passes.forward.copy(), passes.backward.copy()
    forward[0] += encode
    backward[0] += backprop
    found = run(in_first_stage(passes, encode, backprop))
    # The first row's gradients leave the stage before its tiles run backward; the next stage waits for neither.
    assert found.makespan == pytest.approx(float(one_f_one_b(forward, backward).makespan))


@pytest.mark.parametrize("num_rows", [4, 16, 64])
def test_in_the_first_stage_the_slowest_stage_is_the_limit(num_rows):
    """Stages that are equal but for the encoder: where that takes as long as the language model's passes of the stages together,
    the first stage never waits; where it is short, the pipeline fills and empties as without it."""
    num_ranks, encode, backprop = 4, 3.0, 6.0
    found = run(in_first_stage(equal(num_ranks, num_rows), [encode] * num_rows, [backprop] * num_rows))
    assert found.makespan == pytest.approx(num_rows * (1.0 + 2.0 + encode + backprop))
    assert found.busy_seconds[0] == pytest.approx(found.makespan)
    mean = (4 * 3.0 + encode + backprop) / 4
    assert found.imbalance == pytest.approx((3.0 + encode + backprop) / mean - 1)
    short = run(in_first_stage(equal(num_ranks, num_rows), [0.1] * num_rows, [0.2] * num_rows))
    assert num_rows * 3.3 <= short.makespan <= num_rows * 3.3 + (num_ranks - 1) * 3.0 + 1e-9


def test_in_the_first_stage_with_chunks_only_the_first_chunk_has_tiles():
    tasks = in_first_stage(equal(2, 4, num_chunks=3), [1.0] * 4, [2.0] * 4)
    order = works(tasks[0])
    for before, after in pairwise(order):
        if before.kind == "encode":
            assert after == Work("forward", before.row, 0)
        if after.kind == "backprop":
            assert before == Work("backward", after.row, 0)
    assert sum(work.kind == "encode" for work in order) == 4
    assert all(work.kind in ("forward", "backward") for work in works(tasks[1]))


@pytest.mark.parametrize(("num_ranks", "num_rows"), [(1, 3), (2, 5), (4, 3), (4, 9)])
def test_encoder_ranks_are_a_stage_before_the_first(num_ranks, num_rows):
    """The order is 1F1B's of the first of P + 1 stages, and so is the time."""
    renamed = {"forward": "encode", "backward": "backprop"}
    expected = [(renamed[kind], row, 0) for kind, row in passes_of_stage(0, num_ranks + 1, num_rows)]
    assert encoder_order(num_ranks, 1, num_rows) == expected
    passes, encode, backprop = drawn(num_ranks, num_rows, seed=num_rows)
    found = run(disaggregated(passes, encode, backprop))
    whole = one_f_one_b(np.vstack([encode, passes.forward]), np.vstack([backprop, passes.backward]))
    assert found.makespan == pytest.approx(float(whole.makespan))


@pytest.mark.parametrize(("num_ranks", "num_chunks", "num_rows"), [(2, 2, 4), (4, 5, 8), (3, 4, 12), (4, 2, 4)])
def test_encoder_ranks_keep_up_with_chunks(num_ranks, num_chunks, num_rows):
    order = encoder_order(num_ranks, num_chunks, num_rows)
    for kind in ("encode", "backprop"):
        assert [work.row for work in order if work.kind == kind] == list(range(num_rows))
    passes = equal(num_ranks, num_rows, num_chunks)
    text = run(passes.tasks()).makespan
    found = run(disaggregated(passes, [0.01] * num_rows, [0.02] * num_rows))
    assert text + 0.03 - 1e-9 <= found.makespan <= text + 0.03 * num_ranks + 1e-9


@pytest.mark.parametrize("num_encoders", [10, 100, 1000])
def test_with_enough_encoder_ranks_text_alone_is_the_limit(num_encoders):
    """What is left is the first row's tiles forward and the last one's backward."""
    num_ranks, num_rows = 4, 12
    encode, backprop = 10.0 / num_encoders, 20.0 / num_encoders
    passes = equal(num_ranks, num_rows)
    found = run(disaggregated(passes, [encode] * num_rows, [backprop] * num_rows))
    assert found.makespan == pytest.approx(float(run(passes.tasks()).makespan) + encode + backprop)
    assert found.most_rows_under_way[-1] == num_ranks + 1


def test_with_too_few_encoder_ranks_they_are_the_limit():
    num_rows, encode, backprop = 12, 8.0, 16.0
    found = run(
        disaggregated(equal(4, num_rows), [encode] * num_rows, [backprop] * num_rows), num_gpus=[8, 8, 8, 8, 4]
    )
    assert found.makespan == pytest.approx(num_rows * (encode + backprop))
    assert found.busy_seconds[-1] == pytest.approx(found.makespan)
    busy = (4 * 8 * num_rows * 3.0 + 4 * found.makespan) / 36
    assert found.bubble_share == pytest.approx(1 - busy / found.makespan)


def test_messages_of_encoder_ranks_show_at_the_ends_alone():
    num_rows, sent = 12, 0.25
    passes = equal(4, num_rows)

    def hop(_sender, _receiver, work):
        return Hop(sent) if work.kind == "encode" or (work.kind == "backward" and _sender == 0) else Hop()

    without = run(disaggregated(passes, [0.5] * num_rows, [1.0] * num_rows))
    found = run(disaggregated(passes, [0.5] * num_rows, [1.0] * num_rows), hop)
    assert found.makespan == pytest.approx(without.makespan + 2 * sent)
    assert len(found.messages) == 2 * num_rows
    assert found.exposed_seconds[0] == pytest.approx(sent)


@pytest.mark.parametrize(("num_rows", "window_rows"), [(6, 6), (6, 3), (7, 3), (4, 1)])
def test_phases_follow_one_another(num_rows, window_rows):
    """Each window takes what `step_time` says of it."""
    passes, encode, backprop = drawn(3, num_rows)
    firsts = range(0, num_rows, window_rows)
    found = run(phases_apart(passes, encode[: len(firsts)], backprop[: len(firsts)], window_rows))
    total = 0.0
    for window, first in enumerate(firsts):
        part = passes.of_rows(slice(first, first + window_rows))
        of_ranks = (np.full(3, seconds[window]) for seconds in (encode, backprop))
        total += float(
            WindowWork(next(of_ranks), part.forward[..., None], part.backward[..., None], next(of_ranks)).critical_path
        )
    assert found.makespan == pytest.approx(total)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("num_stages", "num_rows"), [(2, 3), (4, 8), (3, 12)])
def test_pauses_are_filled_as_the_other_simulation_finds(seed, num_stages, num_rows):
    work = random_work(seed, num_stages, num_rows, 1, 1, 0.3)
    passes = PipelineSeconds(work.forward[..., 0], work.backward[..., 0], num_stages)
    found = run(in_bubbles(passes, work.plan, work.encode[:, :, 0], work.backprop[:, :, 0]))
    assert found.makespan == pytest.approx(float(work.critical_path))


def test_ranks_of_a_stage_wait_for_its_slowest_at_passes_alone():
    """Two ranks take turns with a tile each: between two passes, four chunks of one tile cost two of them."""
    nothing = np.zeros(0, dtype=np.int64)
    plan = BubblePlan(
        table=random_work(0, 2, 3, 1, 1, 1.0).plan.table,
        encoder=nothing,
        chunk=nothing,
        num_chunks=4,
        order=np.arange(3)[None],
        slot_of_chunk=np.zeros(4, dtype=np.int64),
        chunks_ahead=np.array([4, 4]),
        chunks_back=np.zeros((2, 3), dtype=np.int64),
    )
    in_turn = np.zeros((2, 4, 2))
    in_turn[:, [0, 2], 0] = in_turn[:, [1, 3], 1] = 1.0
    found = run(in_bubbles(equal(2, 3), plan, in_turn, 2 * in_turn))
    assert found.ranks[0][4].start == 2.0, "the first pass"
    assert found.makespan == pytest.approx(2 + (3 + 1) * 3.0 + 4)
