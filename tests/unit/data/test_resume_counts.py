"""Nothing twice, nothing skipped: samples are counted over interruptions at other numbers of replicas and workers."""

import json
from collections import Counter

import pytest

from internvl_megatron.data.dataset import load_datasets
from internvl_megatron.data.loader import ReplicaLoader
from internvl_megatron.data.row_bytes import row_to_bytes
from internvl_megatron.data.stream import SampleStream

NUM_STREAMS = 4
REPEATS = {"plain": 1, "twice": 2, "few": 1, "first half": 0.5}
RECORDS = {"plain": 30, "twice": 11, "few": 3, "first half": 20}


@pytest.fixture
def meta(data_folder, talk):
    path = None
    for number, (name, count) in enumerate(RECORDS.items()):
        records = [talk("n", f"{'seven ' * (5 + (7 * i + number) % 17)} {i}") for i in range(count)]
        path = data_folder.dataset(name, records, repeat_time=REPEATS[name], group="ab"[number % 2])
    return path


@pytest.fixture
def open_loaders(meta, make_settings, small):
    """Loaders of so many replicas, as the trainer opens them; all closed at the end of the test."""
    opened = []

    def make(num_replicas, num_workers, state=None, **changes):
        settings = make_settings(
            tokens_per_row=100, packing_buffer_rows=2, num_workers=num_workers, on_bad_sample="skip", **changes
        )
        loaders = []
        for replica in range(num_replicas):
            slots, datasets = range(replica, NUM_STREAMS, num_replicas), load_datasets(meta)
            streams = [SampleStream(datasets, settings, small, slot, NUM_STREAMS) for slot in slots]
            loaders.append(ReplicaLoader(streams, lambda message: message or b"", settings, 0, 1))
            if state is not None:
                loaders[-1].load_state_dict(state)
        opened.extend(loaders)
        return loaders

    yield make
    for loader in opened:
        loader.close()


def run(loaders, num_steps):
    """Rows of some steps, by slot, and the position after them, as a checkpoint has it."""
    steps = []
    for _ in range(num_steps):
        made = [loader.next_step() for loader in loaders]
        rows = {slot: row for step in made for slot, row in zip(step.slots, step.rows, strict=True)}
        steps.append([rows[slot] for slot in range(NUM_STREAMS)])
    state = {slot: position for loader in loaders for slot, position in loader.state_dict().items()}
    return steps, json.loads(json.dumps(state))


def counts(steps):
    sources = (source for rows in steps for row in rows for source in row.sources)
    return Counter((source.dataset, source.record, source.pass_number) for source in sources)


def samples_of_epoch(epoch):
    """Every record in use once in each of the epoch's passes."""
    expected = Counter()
    for dataset, name in enumerate(RECORDS):
        used, repeats = int(RECORDS[name] * min(1, REPEATS[name])), max(1, int(REPEATS[name]))
        for number in range(epoch * repeats, (epoch + 1) * repeats):
            expected.update((dataset, record, number) for record in range(used))
    return expected


@pytest.mark.parametrize("weights", [None, ("a=1", "b=3")])
def test_an_interrupted_run_sees_every_sample_of_an_epoch_once(open_loaders, weights):
    before, state = run(open_loaders(2, 2, group_weights=weights), 3)
    between, state = run(open_loaders(4, 1, state, group_weights=weights), 5)
    after, _ = run(open_loaders(1, 3, state, group_weights=weights), 42)
    steps = before + between + after
    seen = counts(steps)
    for epoch in (0, 1):
        expected = samples_of_epoch(epoch)
        assert {key: seen[key] for key in expected} == expected, f"epoch {epoch}"
    cut = counts(before)
    assert 0 < cut.total() < samples_of_epoch(0).total(), "it was interrupted inside the first epoch"

    uninterrupted, _ = run(open_loaders(1, 0, group_weights=weights), 50)
    as_bytes = [[row_to_bytes(slot, row) for slot, row in enumerate(rows)] for rows in steps]
    assert as_bytes == [[row_to_bytes(slot, row) for slot, row in enumerate(rows)] for rows in uninterrupted]
