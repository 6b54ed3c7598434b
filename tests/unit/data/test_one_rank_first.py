"""Work of one rank for all: the others wait as long as it takes, and hear of errors."""

import threading
from typing import Any

import pytest

from internvl_megatron.data.one_rank_first import one_rank_first
from internvl_megatron.errors import DataError


def run_ranks(size, work, seconds):
    """Run it on a thread per rank; returns what each raised, and how many messages were sent."""
    barrier, box, count = threading.Barrier(size, timeout=20), [b""], [0]
    results: list[Any] = [None] * size

    def body(rank):
        def broadcast(message):
            assert (message is not None) == (rank == 0)
            if message is not None:
                box[0] = message
                count[0] += 1
            barrier.wait()
            received = box[0]
            barrier.wait()
            return received

        try:
            one_rank_first(work, rank == 0, broadcast, seconds)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results, count[0]


@pytest.mark.parametrize("slow", [False, True])
def test_all_wait_until_it_is_done(slow):
    done = []

    def work():
        threading.Event().wait(0.5 if slow else 0)
        done.append(threading.current_thread())

    results, num_messages = run_ranks(3, work, 0.05 if slow else 20)
    assert results == [None] * 3 and len(done) == 1
    assert num_messages > 4 if slow else num_messages == 1, "waiting ranks hear that the work goes on"


def test_an_error_reaches_all():
    def work():
        raise DataError("a.jsonl: is bad")

    (own, *others), _ = run_ranks(3, work, 20)
    assert isinstance(own, DataError) and str(own) == "a.jsonl: is bad"
    assert [(type(error), str(error)) for error in others] == [(DataError, "rank 0 failed: a.jsonl: is bad")] * 2


def test_an_error_of_ours_is_not_passed_off_as_the_users():
    (own, other), _ = run_ranks(2, lambda: [].pop(), 20)
    assert isinstance(own, IndexError)
    assert type(other) is RuntimeError and "pop from empty list" in str(other)
