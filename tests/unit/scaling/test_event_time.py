"""Events by hand: who waits for whom, what messages cost, and how waiting is counted."""

import numpy as np
import pytest

from internvl_megatron.scaling.event_time import Hop, Message, Need, Task, Wait, Work, run
from internvl_megatron.scaling.interleaved_time import timeline

F0, F1, B0, B1 = Work("forward", 0), Work("forward", 1), Work("backward", 0), Work("backward", 1)


def same_hop(seconds, held=0.0):
    return lambda _sender, _receiver, _work: Hop(seconds, held)


def equal(num_stages, num_rows, num_ranks, hop=None, forward=1.0, backward=2.0):
    """A pipeline with equal passes."""
    shape = (num_stages, num_rows)
    more = {} if hop is None else {"hops": hop}
    return timeline(np.full(shape, forward), np.full(shape, backward), num_ranks, **more)


def test_two_ranks_and_a_message_by_hand():
    tasks = [[Task(F0, 1), Task(F1, 1), Task(B0, 2, (Need(1, B0),))], [Task(F0, 3, (Need(0, F0),)), Task(B0, 4)]]
    found = run(tasks, same_hop(0.5))
    # F0 is there at 1.5, rank 1 is through at 8.5, rank 0 begins again at 9.
    assert [span[1:] for span in found.ranks[0]] == [(0, 1), (1, 2), (9, 11)]
    assert [span[1:] for span in found.ranks[1]] == [(1.5, 4.5), (4.5, 8.5)]
    assert found.messages == [Message(F0, 0, 1, 1.0, 1.5), Message(B0, 1, 0, 8.5, 9.0)]
    assert found.exposed == [[Wait(8.5, 9.0)], [Wait(1.0, 1.5)]]
    assert found.makespan == 11
    assert found.exposed_share == pytest.approx(1 / 22)
    assert found.bubble_share == pytest.approx((6.5 + 1 + 2.5) / 22)
    assert found.imbalance == pytest.approx(7 / 5.5 - 1)


def test_a_sender_is_held_up_by_its_own_message():
    tasks = [[Task(F0, 1), Task(F1, 1)], [Task(F0, 1, (Need(0, F0),))]]
    found = run(tasks, same_hop(0.5, held=0.25))
    assert [span[1:] for span in found.ranks[0]] == [(0, 1), (1.25, 2.25)]
    assert found.ranks[1][0].start == 1.5
    assert found.exposed_seconds == [0.25, 0.5]


def test_a_link_sends_one_after_the_other_but_to_all_at_once():
    tasks = [
        [Task(F0, 1), Task(F1, 1)],
        [Task(F0, 1, (Need(0, F0),)), Task(F1, 1, (Need(0, F1),))],
        [Task(F0, 1, (Need(0, F0),))],
    ]
    found = run(tasks, same_hop(3.0))
    assert [message[2:] for message in found.messages] == [(1, 1, 4), (2, 1, 4), (1, 4, 7)]
    assert found.ranks[1][1].start == 7


def test_a_message_nobody_waits_for_is_not_exposed():
    tasks = [[Task(F0, 1)], [Task(F1, 5), Task(F0, 1, (Need(0, F0),))]]
    found = run(tasks, same_hop(2.0))
    assert found.messages
    assert found.exposed_share == 0
    assert found.makespan == 6


def test_the_sender_itself_and_those_that_never_get_anything():
    found = run([[Task(F0, 1), Task(B0, 1, (Need(0, F0),))], []], same_hop(2.0))
    assert found.messages == []
    assert found.makespan == 2
    assert found.most_rows_under_way == [1.0, 0.0]


def test_ranks_stand_for_as_many_gpus_as_said():
    found = run([[Task(F0, 3)], [Task(F0, 1)]], num_gpus=[1, 3])
    assert found.bubble_share == pytest.approx(3 * 2 / (4 * 3))
    assert found.imbalance == pytest.approx(3 / 1.5 - 1)


def test_ranks_that_wait_for_each_other_are_noticed():
    with pytest.raises(AssertionError, match="wait for each other"):
        run([[Task(F0, 1, (Need(1, F0),))], [Task(F0, 1, (Need(0, F0),))]])


@pytest.mark.parametrize(
    ("num_ranks", "num_chunks", "num_rows"), [(4, 1, 8), (2, 1, 5), (4, 2, 8), (3, 4, 12), (1, 1, 3)]
)
def test_bubbles_of_equal_stages(num_ranks, num_chunks, num_rows):
    """(P - 1) / (V M + P - 1), with V = 1 that of 1F1B."""
    found = equal(num_ranks * num_chunks, num_rows, num_ranks)
    assert found.bubble_share == pytest.approx((num_ranks - 1) / (num_chunks * num_rows + num_ranks - 1))
    assert found.imbalance == pytest.approx(0)
    assert found.exposed_share == 0


@pytest.mark.parametrize("num_ranks", [2, 3, 6])
def test_one_row_waits_for_all_messages_there_and_back(num_ranks):
    seconds = 0.25
    found = equal(num_ranks, 1, num_ranks, same_hop(seconds))
    assert found.makespan == pytest.approx(num_ranks * (1.0 + 2.0) + 2 * (num_ranks - 1) * seconds)


@pytest.mark.parametrize(("num_ranks", "num_rows"), [(2, 2), (2, 8), (4, 4), (4, 12), (3, 6), (6, 24)])
def test_messages_beside_passes_cost_a_round_trip_for_as_many_rows_as_stages(num_ranks, num_rows):
    """At most P rows are under way from the first stage, so each P rows wait for 2 (P - 1) messages; filling and emptying the pipeline
    takes 2 (P - 2) more."""
    seconds, without = 0.01, equal(num_ranks, num_rows, num_ranks)
    found = equal(num_ranks, num_rows, num_ranks, same_hop(seconds))
    waited = 2 * seconds * ((num_ranks - 1) * num_rows / num_ranks + num_ranks - 2)
    assert found.makespan - without.makespan == pytest.approx(waited)
    assert len(found.messages) == 2 * (num_ranks - 1) * num_rows
    assert found.exposed_share > 0


@pytest.mark.parametrize(("num_ranks", "num_rows"), [(3, 6), (4, 4), (4, 20), (8, 16)])
def test_messages_that_hold_up_their_senders_lengthen_all_passes(num_ranks, num_rows):
    """As `language_time` counts them, a message more for every pass, but for three that the ends of the pipeline do not have."""
    seconds = 0.01
    found = equal(num_ranks, num_rows, num_ranks, same_hop(seconds, seconds))
    counted = (num_rows + num_ranks - 1) * (1.0 + 2.0 + 2 * seconds)
    assert found.makespan == pytest.approx(counted - 3 * seconds)
    for rank in range(1, num_ranks - 1):
        assert found.exposed_seconds[rank] >= (2 * num_rows - 1) * seconds


def test_shares_are_of_the_whole():
    rng = np.random.default_rng(0)
    found = timeline(rng.random((6, 9)), rng.random((6, 9)), 3, same_hop(0.1, 0.05))
    busy = float(np.mean(found.busy_seconds)) / found.makespan
    assert busy + found.exposed_share + found.bubble_share == pytest.approx(1)
    assert min(busy, found.exposed_share, found.bubble_share) > 0
