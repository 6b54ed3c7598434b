"""The replica's loader: the same steps whatever the threads and ranks, exact positions, errors where they belong."""

import json
import threading
import traceback
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from internvl_megatron.data.dataset import load_datasets
from internvl_megatron.data.images import decode_tiles
from internvl_megatron.data.loader import ReplicaLoader
from internvl_megatron.data.row_bytes import row_to_bytes
from internvl_megatron.data.step_rows import StepRows, assign_images
from internvl_megatron.data.stream import SampleStream
from internvl_megatron.errors import DataError

NUM_STREAMS = 4


@pytest.fixture
def open_loader(make_settings, small):
    """A leader's loader on its own (or with the given broadcast); closed at the end of the test."""
    loaders = []

    def make(meta, slots=(0, 1), broadcast=lambda message: message, rank=0, size=1, rows_of_step=None, **changes):
        settings = make_settings(**{"v2pe": "random", **changes})
        streams = None
        if rank == 0:
            datasets = load_datasets(meta)
            streams = [SampleStream(datasets, settings, small, slot, NUM_STREAMS) for slot in slots]
        loaders.append(ReplicaLoader(streams, broadcast, settings, rank, size, None, rows_of_step))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def as_bytes(slots, rows):
    return b"".join(map(row_to_bytes, slots, rows))


def contents(step):
    """Everything a step holds, comparable."""
    decoded = step.tiles()
    return (
        as_bytes(step.slots, step.rows),
        {key: tiles.tobytes() for key, tiles in decoded.tiles.items()},
        decoded.failed,
    )


def steps(loader, count):
    return [contents(loader.next_step()) for _ in range(count)]


def test_rows_are_those_of_the_streams(data_folder, open_loader, make_settings, small):
    meta = data_folder.mixture()
    loader = open_loader(meta, slots=(1, 3))
    streams = [
        SampleStream(load_datasets(meta), make_settings(v2pe="random"), small, slot, NUM_STREAMS) for slot in (1, 3)
    ]
    for _ in range(4):
        step = loader.next_step()
        assert step.slots == [1, 3]
        assert as_bytes(step.slots, step.rows) == as_bytes((1, 3), [stream.next_row() for stream in streams])
        decoded = step.tiles()
        assert set(decoded.tiles) == {(r, i) for r, row in enumerate(step.rows) for i in range(len(row.images))}
        for (row, image), tiles in decoded.tiles.items():
            ref = step.rows[row].images[image]
            assert tiles.shape == (ref.num_tiles, 3, 28, 28) and tiles.dtype == np.uint8
            assert (tiles == decode_tiles(ref, 28, True)).all()
        assert step.tiles() is decoded


def test_workers_and_prefetching_do_not_matter(data_folder, open_loader):
    meta = data_folder.mixture()
    reference = steps(open_loader(meta, num_workers=0, prefetch_steps=1), 5)
    assert len({rows for rows, _, _ in reference}) == 5
    for num_workers, prefetch_steps in ((1, 2), (4, 0), (4, 5)):
        assert steps(open_loader(meta, num_workers=num_workers, prefetch_steps=prefetch_steps), 5) == reference


@pytest.mark.parametrize("steps_before", [0, 1, 4])
def test_the_position_is_that_after_the_last_step_returned(data_folder, open_loader, steps_before):
    meta = data_folder.mixture()
    loader = open_loader(meta, prefetch_steps=3)
    steps(loader, steps_before)
    state = json.loads(json.dumps(loader.state_dict()))
    following = steps(loader, 3)
    resumed = open_loader(meta, prefetch_steps=3)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert steps(resumed, 3) == following


def test_another_number_of_replicas_goes_on_with_the_same_rows(data_folder, open_loader):
    meta = data_folder.mixture()
    two = [open_loader(meta, slots=(0, 1)), open_loader(meta, slots=(2, 3))]
    for loader in two:
        steps(loader, 2)
    state = two[0].state_dict() | two[1].state_dict()
    one = open_loader(meta, slots=(0, 1, 2, 3))
    one.load_state_dict(state)
    rows = [row for loader in two for row in loader.next_step().rows]
    assert as_bytes(range(4), one.next_step().rows) == as_bytes(range(4), rows)
    with pytest.raises(DataError, match="no stream 2; rows_per_step must not change"):
        open_loader(meta, slots=(2,)).load_state_dict(two[0].state_dict())


def growing(step):
    """Two rows, then four: the third step begins in the middle of the streams."""
    return [range(2), range(2, 4), range(4, 6), range(6, 10), range(10, 14), range(14, 18)][step]


@pytest.mark.parametrize("owners", [[(0, 1, 2, 3)], [(0, 2), (1, 3)]])
def test_a_growing_step_takes_the_same_rows_in_the_same_order(data_folder, open_loader, owners):
    meta = data_folder.mixture()
    plain = open_loader(meta, slots=range(NUM_STREAMS), num_workers=0)
    in_order = [row for _ in range(5) for row in plain.next_step().rows]
    loaders = [open_loader(meta, slots=slots, rows_of_step=growing, num_workers=0) for slots in owners]
    for number in range(6):
        rows = growing(number)
        steps = [loader.next_step() for loader in loaders]
        assert [step.slots for step in steps] == [list(range(r, len(rows), len(owners))) for r in range(len(owners))]
        taken = {slot: row for step in steps for slot, row in zip(step.slots, step.rows, strict=True)}
        slots = range(len(rows))
        assert as_bytes(slots, [taken[slot] for slot in slots]) == as_bytes(slots, in_order[rows.start : rows.stop])


@pytest.mark.parametrize("steps_before", [1, 3, 4])
def test_a_growing_run_goes_on_where_it_was(data_folder, open_loader, steps_before):
    """Saved by two replicas, continued by one, in the middle of growing, at its end, and after it."""
    meta = data_folder.mixture()
    two = [open_loader(meta, slots=slots, rows_of_step=growing, num_workers=0) for slots in ((0, 2), (1, 3))]
    for loader in two:
        steps(loader, steps_before)
    state = json.loads(json.dumps(two[0].state_dict() | two[1].state_dict()))
    resumed = open_loader(meta, slots=range(NUM_STREAMS), rows_of_step=growing, num_workers=0)
    resumed.load_state_dict(state, steps_before)
    whole = open_loader(meta, slots=range(NUM_STREAMS), rows_of_step=growing, num_workers=0)
    steps(whole, steps_before)
    assert steps(resumed, 2) == steps(whole, 2)


def run_ranks(size, body):
    """Run body(rank, broadcast) on a thread per rank; returns its results, exceptions included."""
    barrier, box = threading.Barrier(size, timeout=20), [b""]
    results: list[Any] = [None] * size

    def broadcast_of(rank):
        def broadcast(message):
            assert (message is not None) == (rank == 0)
            if rank == 0:
                box[0] = message
            barrier.wait()
            received = box[0]
            barrier.wait()
            return received

        return broadcast

    def run(rank):
        try:
            results[rank] = body(rank, broadcast_of(rank))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_the_ranks_of_a_replica_share_the_decoding(data_folder, open_loader):
    meta = data_folder.mixture()
    alone = steps(open_loader(meta), 3)

    def body(rank, broadcast):
        loader = open_loader(meta, broadcast=broadcast, rank=rank, size=3)
        found = [(step.image_owner, contents(step)) for step in (loader.next_step() for _ in range(3))]
        if rank == 0:
            assert loader.state_dict()
        else:
            with pytest.raises(AssertionError, match="only the leader"):
                loader.state_dict()
        return found

    by_rank = run_ranks(3, body)
    for number, (rows, tiles, _) in enumerate(alone):
        shared = {}
        for rank in range(3):
            owners, (its_rows, its_tiles, _) = by_rank[rank][number]
            assert its_rows == rows and owners == by_rank[0][number][0]
            assert all(owners[row][image] == rank for row, image in its_tiles)
            assert not shared.keys() & its_tiles.keys()
            shared |= its_tiles
        assert shared == tiles


def test_images_are_shared_out_evenly(data_folder, open_loader):
    rows = open_loader(data_folder.mixture(), slots=(0, 1, 2, 3)).next_step().rows
    owners = assign_images(rows, 2)
    load = [0, 0]
    for row, of_row in zip(rows, owners, strict=True):
        for image, owner in zip(row.images, of_row, strict=True):
            load[owner] += image.num_tiles
    largest = max(image.num_tiles for row in rows for image in row.images)
    assert sum(load) == sum(row.num_tiles for row in rows) and abs(load[0] - load[1]) <= largest
    assert owners == assign_images(rows, 2)
    assert assign_images(rows, 1) == [[0] * len(row.images) for row in rows]


def test_the_largest_image_is_given_out_first():
    rows: Any = [SimpleNamespace(images=[SimpleNamespace(num_tiles=tiles) for tiles in row]) for row in ([1, 1], [2])]
    assert assign_images(rows, 2) == [[1, 1], [0]]


def test_an_error_of_the_leader_reaches_all_ranks_at_its_step(data_folder, open_loader, talk):
    good = [talk("a", "seven " * 33) for _ in range(20)]
    meta = data_folder.dataset("texts", [*good[:3], "{broken", *good[3:]])
    settings = {"tokens_per_row": 128, "packing": "first_fit", "packing_window_rows": 1, "packing_buffer_rows": 0}

    def body(rank, broadcast):
        loader = open_loader(meta, slots=range(NUM_STREAMS), broadcast=broadcast, rank=rank, size=2, **settings)
        count = 0
        try:
            while True:
                loader.next_step()
                count += 1
        except DataError as error:
            with pytest.raises(DataError, match="not valid JSON"):
                loader.next_step()  # the error stays
            return count, str(error), "".join(traceback.format_tb(error.__traceback__))

    (count, message, trace), (other_count, other_message, _) = run_ranks(2, body)
    assert count == other_count > 0
    assert "texts.jsonl:4: is not valid JSON" in message
    assert "stream.py" in trace and "next_row" in trace, "the traceback of the thread that failed"
    assert other_message == f"the leader of this replica failed: {message}"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_that_fail_when_decoded(data_folder, open_loader, talk, num_workers):
    name = data_folder.image("cut.png", 60, 30)
    path = data_folder.folder / name
    path.write_bytes(path.read_bytes()[:1000])
    images = [name, data_folder.image("good.png", 30, 30)] * 8
    meta = data_folder.dataset("pictures", [{**talk("?", "x"), "image": image} for image in images])
    every = range(NUM_STREAMS)
    step = open_loader(meta, every, num_workers=num_workers).next_step()
    with pytest.raises(DataError, match=r"cut\.png: cannot be read"):
        step.tiles()
    step = open_loader(meta, every, num_workers=num_workers, on_bad_sample="skip").next_step()
    decoded = step.tiles()
    keys = {(r, i): image.path for r, row in enumerate(step.rows) for i, image in enumerate(row.images)}
    failed = {key for key, path in keys.items() if path.endswith("cut.png")}
    assert set(decoded.failed) == failed and failed
    assert all("cut.png: cannot be read" in message for message in decoded.failed.values())
    assert set(decoded.tiles) == set(keys) - failed and decoded.tiles
    for index, row in enumerate(step.rows):
        kept = row.without_samples_of_images({image for at, image in failed if at == index})
        num_lost = sum(at == index for at, _ in failed)
        assert kept.weights.sum() == pytest.approx(row.weights.sum() * (1 - num_lost / row.num_samples))


def test_evaluation_rows_are_decoded_without_a_loader(data_folder, open_loader, make_settings):
    rows = open_loader(data_folder.mixture()).next_step().rows
    found = [StepRows(rows, (0, 1), make_settings(), rank, 2).tiles().tiles for rank in range(2)]
    assert not found[0].keys() & found[1].keys()
    assert len(found[0]) + len(found[1]) == sum(len(row.images) for row in rows)


def test_skipped_samples_are_counted_over_the_streams(data_folder, open_loader, talk):
    meta = data_folder.dataset("texts", [*(talk("a", "seven " * 33) for _ in range(8)), *(["{"] * 8)])
    loader = open_loader(meta, on_bad_sample="skip", tokens_per_row=128)
    assert loader.skipped() == {}
    steps(loader, 8)
    assert loader.skipped()["json"] == sum(s["skipped"]["json"] for s in loader.state_dict().values()) > 1


def test_close_ends_the_threads(data_folder, open_loader):
    before = set(threading.enumerate())
    loader = open_loader(data_folder.mixture(), num_workers=3)
    loader.next_step()
    assert set(threading.enumerate()) - before
    loader.close()
    assert set(threading.enumerate()) == before
    loader.close()
    with pytest.raises(AssertionError, match="closed"):
        loader.next_step()


def test_the_position_cannot_be_set_once_started(data_folder, open_loader):
    loader = open_loader(data_folder.mixture())
    state = loader.state_dict()
    loader.next_step()
    with pytest.raises(AssertionError, match="before the first step"):
        loader.load_state_dict(state)
