"""Leaders that trade rows: the same rows over all replicas, exact positions, and errors that reach every rank."""

import json
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from internvl_megatron.data.dataset import load_datasets
from internvl_megatron.data.loader import ReplicaLoader
from internvl_megatron.data.row_bytes import row_to_bytes
from internvl_megatron.data.row_cost import RowCost
from internvl_megatron.data.row_exchange import RowExchange
from internvl_megatron.data.stream import SampleStream
from internvl_megatron.errors import DataError

NUM_STREAMS = 8
UPSTREAM: dict[str, Any] = {"packing": "first_fit", "packing_window_rows": 1}
"""Rows as they come, of very different cost."""
COST = RowCost(per_token=10, per_target=1, per_attention_pair=1, cut_multiple=1)


class Run:
    """All ranks of a run, a thread each; messages between them are lists that everyone sees."""

    def __init__(self, num_replicas: int, replica_size: int) -> None:
        self.num_replicas = num_replicas
        self.replica_size = replica_size
        self._leaders = threading.Barrier(num_replicas, timeout=20)
        self._replicas = [threading.Barrier(replica_size, timeout=20) for _ in range(num_replicas)]
        self._sent: list[Any] = [None] * num_replicas
        self._broadcast: list[Any] = [None] * num_replicas

    def exchange(self, replica: int) -> Callable[[Sequence[bytes]], list[bytes]]:
        def exchange(payloads: Sequence[bytes]) -> list[bytes]:
            self._sent[replica] = payloads
            self._leaders.wait()
            received = [sent[replica] for sent in self._sent]
            self._leaders.wait()
            return received

        return exchange

    def broadcast(self, replica: int) -> Callable[[bytes | None], bytes]:
        def broadcast(payload: bytes | None) -> bytes:
            if payload is not None:
                self._broadcast[replica] = payload
            self._replicas[replica].wait()
            received = self._broadcast[replica]
            self._replicas[replica].wait()
            return received

        return broadcast

    def __call__(self, body: Callable[[int, int], Any]) -> list[list[Any]]:
        """Results of body(replica, place) by replica and place, exceptions included."""
        results: list[list[Any]] = [[None] * self.replica_size for _ in range(self.num_replicas)]

        def rank(replica: int, place: int) -> None:
            try:
                results[replica][place] = body(replica, place)
            except Exception as error:
                results[replica][place] = error

        places = [(replica, place) for replica in range(self.num_replicas) for place in range(self.replica_size)]
        threads = [threading.Thread(target=rank, args=where) for where in places]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return results


@pytest.fixture
def open_loader(make_settings, small):
    """`open_loader(meta, run, replica, place, balance=True)`: the loader of one rank; closed at the end of the test."""
    loaders = []

    def make(meta, run, replica, place=0, balance=True, spoil=None, **changes):
        settings = make_settings(**{"v2pe": "random", "tiles_per_row": 6, **changes})
        streams = exchange = None
        if place == 0:
            datasets, slots = load_datasets(meta), range(replica, NUM_STREAMS, run.num_replicas)
            streams = [SampleStream(datasets, settings, small, slot, NUM_STREAMS) for slot in slots]
            if spoil is not None:
                spoil(streams)
            if balance:
                exchange = RowExchange(run.exchange(replica), COST, replica, run.num_replicas)
        loader = ReplicaLoader(streams, run.broadcast(replica), settings, place, run.replica_size, exchange)
        loaders.append(loader)
        return loader

    yield make
    for loader in loaders:
        loader.close()


def rows_of(step):
    assert step.slots == sorted(step.slots)
    return {slot: row_to_bytes(slot, row) for slot, row in zip(step.slots, step.rows, strict=True)}


def tiles_of(step):
    """Decoded tiles by slot and image."""
    return {(step.slots[row], image): tiles.tobytes() for (row, image), tiles in step.tiles().tiles.items()}


def totals(steps):
    """Cost of every replica's rows of one step, computed from the rows themselves."""
    return [sum(COST.of(row) for row in step.rows) for step in steps]


def take(open_loader, meta, run, count, state=None, **options):
    """That many steps on all ranks: [replica][place][number] the steps, [replica] the leader's (state, balances).

    All ranks of a replica must have the same rows.
    """

    def body(replica, place):
        loader = open_loader(meta, run, replica, place, **options)
        if state is not None:
            loader.load_state_dict(state)
        steps, balances = [], []
        for _ in range(count):
            steps.append(loader.next_step())
            balances.append(loader.balance)
        return steps, loader.state_dict() if place == 0 else None, balances

    found = run(body)
    for replica in found:
        for steps, _, balances in replica[1:]:
            assert [rows_of(step) for step in steps] == [rows_of(step) for step in replica[0][0]]
            assert balances == [None] * count
    return [[steps for steps, _, _ in ranks] for ranks in found], [ranks[0][1:] for ranks in found]


@pytest.mark.parametrize(("num_replicas", "replica_size"), [(2, 2), (4, 1)])
def test_rows_change_their_replica_and_nothing_else(data_folder, open_loader, num_replicas, replica_size):
    meta, run = data_folder.mixture(), Run(num_replicas, replica_size)
    balanced, kept_by_leaders = take(open_loader, meta, run, 6, **UPSTREAM)
    unbalanced, others = take(open_loader, meta, run, 6, balance=False, **UPSTREAM)
    moved = 0
    for number in range(6):
        after = [ranks[0][number] for ranks in balanced]
        before = [ranks[0][number] for ranks in unbalanced]
        assert [len(step.rows) for step in after] == [NUM_STREAMS // num_replicas] * num_replicas
        by_slot = {slot: row for step in after for slot, row in rows_of(step).items()}
        assert by_slot == {slot: row for step in before for slot, row in rows_of(step).items()}
        assert sorted(by_slot) == list(range(NUM_STREAMS))
        assert max(totals(after)) <= max(totals(before))
        moved += sum(slot % num_replicas != replica for replica, step in enumerate(after) for slot in step.slots)
        for _, balances in kept_by_leaders:
            mean = sum(totals(after)) / num_replicas
            assert balances[number].after == pytest.approx(max(totals(after)) / mean)
            assert balances[number].before == pytest.approx(max(totals(before)) / mean)
        tiles = [tiles_of(ranks[place][number]) for ranks in balanced for place in range(replica_size)]
        wanted = [tiles_of(ranks[place][number]) for ranks in unbalanced for place in range(replica_size)]
        assert sum(map(len, tiles)) == sum(map(len, wanted)), "every image is decoded by one rank"
        assert {key: part[key] for part in tiles for key in part} == {
            key: part[key] for part in wanted for key in part
        }
    assert moved > 0, "nothing was tested"
    improved = [balance.before - balance.after for balance in kept_by_leaders[0][1]]
    assert sum(improved) / len(improved) > 0.02
    assert [state for state, _ in kept_by_leaders] == [state for state, _ in others], "streams stay with their leaders"
    assert all(balances == [None] * 6 for _, balances in others)


@pytest.mark.parametrize("steps_before", [0, 3])
def test_resuming_is_exact_with_and_without_trade(data_folder, open_loader, steps_before):
    meta, run = data_folder.mixture(), Run(2, 1)
    whole, _ = take(open_loader, meta, run, steps_before + 3)
    _, kept_by_leaders = take(open_loader, meta, run, steps_before)
    state = json.loads(json.dumps({slot: at for state, _ in kept_by_leaders for slot, at in state.items()}))
    resumed, _ = take(open_loader, meta, run, 3, state=state)
    for replica in range(2):
        wanted = [rows_of(step) for step in whole[replica][0][steps_before:]]
        assert [rows_of(step) for step in resumed[replica][0]] == wanted
    alone, _ = take(open_loader, meta, Run(1, 1), 3, state=state, balance=False)
    for number, step in enumerate(alone[0][0]):
        assert rows_of(step) == {
            slot: row for replica in range(2) for slot, row in rows_of(resumed[replica][0][number]).items()
        }


def until_error(open_loader, meta, run, **options):
    """(steps before it, the error) of every rank."""

    def body(replica, place):
        loader, count = open_loader(meta, run, replica, place, **options), 0
        try:
            while count < 30:
                loader.next_step()
                count += 1
        except Exception as error:
            assert loader.peek() is None
            return count, error
        raise AssertionError("no error")

    return run(body)


def test_an_error_of_one_leader_reaches_all_ranks_of_all_replicas(data_folder, open_loader, talk):
    good = [talk("a", "seven " * 33) for _ in range(40)]
    meta = data_folder.dataset("texts", [*good[:9], "{broken", *good[9:]])
    run = Run(2, 2)
    found = until_error(open_loader, meta, run, tokens_per_row=128, packing_buffer_rows=0, **UPSTREAM)
    assert len({count for ranks in found for count, _ in ranks}) == 1, found
    assert found[0][0][0] > 0, "some steps were good"
    errors = [[error for _, error in ranks] for ranks in found]
    assert all(isinstance(error, DataError) for ranks in errors for error in ranks)
    (failed,) = (
        replica for replica in range(2) if "next_row" in "".join(traceback.format_tb(errors[replica][0].__traceback__))
    )
    message = str(errors[failed][0])
    assert "texts.jsonl:10: is not valid JSON" in message
    others = [*errors[1 - failed], errors[failed][1]]
    assert [str(error) for error in others] == [f"the leader of replica {failed} failed: {message}"] * 3


def spoiled(failing: dict[int, Exception]):
    """Makes the streams of these slots fail at their third row."""

    def spoil(streams):
        for stream in streams:
            if stream.index in failing:
                rows = [stream.next_row() for _ in range(2)]

                def next_row(rows=rows, error=failing[stream.index]):
                    if rows:
                        return rows.pop(0)
                    raise error

                stream.next_row = next_row

    return spoil


def test_an_internal_error_is_not_passed_off_as_the_users(data_folder, open_loader):
    spoil = spoiled({1: KeyError("ours"), 3: DataError("theirs")})
    found = until_error(open_loader, data_folder.mixture(), Run(4, 2), spoil=spoil)
    assert [count for ranks in found for count, _ in ranks] == [2] * 8
    errors = [[error for _, error in ranks] for ranks in found]
    assert repr(errors[1][0]) == "KeyError('ours')" and str(errors[3][0]) == "theirs"
    told = "the leader of replica 1 failed: KeyError('ours'); the leader of replica 3 failed: theirs"
    for error in (errors[0][0], errors[0][1], errors[1][1], errors[2][0], errors[2][1], errors[3][1]):
        assert isinstance(error, RuntimeError) and str(error) == told


def test_leaders_that_made_other_rows_than_they_should_are_refused(data_folder, open_loader):
    meta, run = data_folder.mixture(), Run(2, 1)

    def swapped(replica, place):
        return open_loader(meta, run, replica, spoil=lambda streams: streams.reverse()).next_step()

    assert ["made rows for slots" in str(error) for (error,) in run(swapped)] == [True, True]
