"""Streams: deterministic, resumable at any row, independent of each other, and clear about bad samples."""

import json
import logging
from collections import Counter

import numpy as np
import pytest

from internvl_megatron.data.evaluation_rows import eval_rows
from internvl_megatron.data.meta import load_datasets
from internvl_megatron.data.row_bytes import row_to_bytes
from internvl_megatron.data.stream import LOGGED_OF_A_KIND, SampleStream
from internvl_megatron.errors import DataError


@pytest.fixture
def open_stream(make_settings, small):
    def make(meta, index=0, num_streams=1, **changes):
        return SampleStream(load_datasets(meta), make_settings(**changes), small, index, num_streams)

    return make


def as_bytes(rows):
    return [row_to_bytes(0, row) for row in rows]


def take(stream, count):
    return as_bytes(stream.next_row() for _ in range(count))


def test_rows_are_within_budgets_and_whole(data_folder, open_stream, small):
    stream = open_stream(data_folder.mixture(), v2pe="random")
    kinds = set()
    for _ in range(40):
        row = stream.next_row()
        assert len(row.token_ids) == 256 and row.segment_lengths.sum() == 256
        assert row.num_tiles <= 12
        context = np.flatnonzero(row.token_ids == small.image_context_id)
        assert context.tolist() == [start + k for start in row.tile_starts for k in range(4)]
        for start, end in zip(row.sample_bounds, row.sample_bounds[1:], strict=False):
            assert row.positions[start] == 0 and row.targets[end - 1] == -100
            assert row.token_ids[start] == small.turn_start_id
        kinds |= {source.dataset for source in row.sources}
    assert kinds == {0, 1}


@pytest.mark.parametrize("rows_before", [0, 1, 7, 25])
def test_a_saved_position_gives_the_same_rows(data_folder, open_stream, rows_before):
    meta = data_folder.mixture()
    stream = open_stream(meta, 1, 3, v2pe="random")
    take(stream, rows_before)
    state = json.loads(json.dumps(stream.state_dict()))
    assert bool(state["open_packs"]) == (rows_before > 0), "samples are waiting in the buffer"
    following = take(stream, 12)
    resumed = open_stream(meta, 1, 3, v2pe="random")
    resumed.load_state_dict(state)
    assert take(resumed, 12) == following
    assert resumed.state_dict() == stream.state_dict()


def test_two_runs_are_equal_and_the_seed_matters(data_folder, open_stream):
    meta = data_folder.mixture()
    assert take(open_stream(meta, v2pe="random"), 5) == take(open_stream(meta, v2pe="random"), 5)
    assert take(open_stream(meta, seed=1), 5) != take(open_stream(meta, seed=0), 5)


def test_streams_deal_out_the_records_and_repeat_in_the_same_order(data_folder, open_stream, talk):
    meta = data_folder.dataset("texts", [talk("n", f"{'seven ' * 20} {i}") for i in range(20)])
    drawn = []
    for index in range(3):
        stream = open_stream(meta, index, 3, tokens_per_row=128)
        sources = sorted(
            (source for _ in range(40) for source in stream.next_row().sources), key=lambda source: source.serial
        )
        records = [source.record for source in sources]
        share = 7 if index < 2 else 6
        assert records[:share] == records[share : 2 * share] and len(set(records[:share])) == share
        drawn += records[:share]
    assert sorted(drawn) == list(range(20))


def test_a_record_is_augmented_anew_each_time_and_in_each_stream(data_folder, open_stream, talk):
    record = {**talk("?", "x"), "image": data_folder.image("a.png", 30, 30)}
    meta = data_folder.dataset("pictures", [record], data_augment=True)
    streams = [open_stream(meta, index, 2) for index in range(2)]
    seeds = [image.jpeg_seed for stream in streams for _ in range(3) for image in stream.next_row().images]
    assert len(seeds) > 20 and len(set(seeds)) == len(seeds)


def test_a_data_set_smaller_than_the_number_of_streams_is_in_every_stream(data_folder, open_stream, talk):
    meta = data_folder.dataset("one", [talk("a", "seven " * 30), talk("b", "seven " * 30)])
    first = [open_stream(meta, index, 5, tokens_per_row=100).next_row().sources[0].record for index in range(5)]
    assert set(first) == {0, 1}


def test_data_sets_are_drawn_in_proportion_to_their_length(data_folder, open_stream, talk):
    long = talk("a", "seven " * 30)
    data_folder.dataset("small", [long] * 4, repeat_time=2)
    meta = data_folder.dataset("large", [long] * 24)
    stream = open_stream(meta, tokens_per_row=len(rows_tokens(open_stream(meta))))
    counts = Counter(source.dataset for _ in range(800) for source in stream.next_row().sources)
    assert 0.2 < counts[0] / counts.total() < 0.3


def rows_tokens(stream):
    row = stream.next_row()
    return row.token_ids[: row.segment_lengths[0]]


def test_bad_samples_stop_the_stream(data_folder, open_stream, talk):
    meta = data_folder.dataset("texts", [talk("a", "b"), "{broken"])
    with pytest.raises(DataError, match=r"texts\.jsonl:2: is not valid JSON"):
        take(open_stream(meta), 5)


def test_bad_samples_are_left_out_and_counted(data_folder, open_stream, talk, caplog):
    good = [talk("a", "seven " * 30) for _ in range(6)]
    missing = {**talk("a", "b"), "image": "none.png"}
    meta = data_folder.dataset("texts", [*good, "{broken", missing, missing, talk("x", "seven " * 300)])
    stream = open_stream(meta, on_bad_sample="skip", on_long_sample="skip")
    with caplog.at_level(logging.WARNING):
        rows = [stream.next_row() for _ in range(30)]
    assert {source.record for row in rows for source in row.sources} == set(range(6))
    skipped = stream.skipped
    assert set(skipped) == {"json", "missing", "long"} and skipped["missing"] > LOGGED_OF_A_KIND
    assert len(caplog.records) == sum(min(count, LOGGED_OF_A_KIND) for count in skipped.values()), (
        "the first of a kind"
    )
    assert "texts.jsonl:7: " in caplog.text and "none.png: file not found" in caplog.text
    # The counters are part of the position.
    other = open_stream(meta, on_bad_sample="skip", on_long_sample="skip")
    other.load_state_dict(stream.state_dict())
    assert other.skipped == skipped and take(other, 5) == take(stream, 5)


def test_long_samples_have_their_own_policy(data_folder, open_stream, talk):
    meta = data_folder.dataset("texts", [talk("a", "seven " * 30), talk("x", "seven " * 300)])
    with pytest.raises(DataError, match=r"texts\.jsonl:2: \d+ tokens are over tokens_per_row 256"):
        take(open_stream(meta, on_bad_sample="skip", on_long_sample="stop"), 9)
    truncating = open_stream(meta, on_bad_sample="stop", on_long_sample="truncate")
    assert any((truncating.next_row().segment_lengths == 256).any() for _ in range(9))


@pytest.mark.parametrize(("num_bad", "stops"), [(1, False), (2, False), (8, True)])
def test_too_large_a_share_of_bad_samples_stops_the_stream(data_folder, open_stream, talk, num_bad, stops):
    """Of 20: 5 %, exactly the limit of 10 %, 40 %. Whatever the limit, long samples do not count."""
    records = [talk("a", "seven " * 30)] * (19 - num_bad) + ["{"] * (num_bad - 1)
    records += [{**talk("a", "b"), "image": "none.png"}, talk("a", "seven " * 300)]
    meta = data_folder.dataset("texts", records)
    stream = open_stream(meta, on_bad_sample="skip", on_long_sample="skip", max_skipped_share=0.1)
    if not stops:
        take(stream, 500)
        assert sum(stream.skipped.values()) > 100
        return
    with pytest.raises(
        DataError, match=r"(\d+) of (\d+) samples are bad, more than data\.max_skipped_share=0\.1"
    ) as caught:
        take(stream, 500)
    text = str(caught.value)
    assert all(f"{kind} {count}" in text for kind, count in stream.skipped.items())
    assert "texts.jsonl:" in text.rpartition("the last one: ")[2]
    bad, seen = map(int, text.split(" samples")[0].split(" of "))
    assert bad > 20 and seen < 150, "a stream that is far over the limit stops early"
    unlimited = open_stream(meta, on_bad_sample="skip", on_long_sample="skip", max_skipped_share=None)
    take(unlimited, 200)


def test_nothing_but_bad_samples(data_folder, open_stream, talk):
    data_folder.dataset("broken", ["{"] * 5)
    meta = data_folder.dataset("missing", [{**talk("a", "b"), "image": "none.png"}] * 3)
    with pytest.raises(DataError, match="data stream 0: a whole pass over its data gave no good sample"):
        open_stream(meta, on_bad_sample="skip").next_row()


def test_a_position_for_other_data_is_refused(data_folder, open_stream, talk):
    meta = data_folder.dataset("texts", [talk("a", "b")] * 4)
    state = open_stream(meta).state_dict()
    for stream, changed in [(open_stream(meta, 0, 2), "stream was"), (open_stream(meta, seed=3), "seed was 0, is 3"),
                            (open_stream(meta, max_tiles=2), "max_tiles was 4, is 2")]:  # fmt: skip
        with pytest.raises(DataError, match=f"saved position of data stream 0 is for other data .*{changed}"):
            stream.load_state_dict(state)
    data_folder.dataset("texts", [talk("a", "b")] * 5)
    with pytest.raises(DataError, match="datasets was"):
        open_stream(meta).load_state_dict(state)


def test_evaluation_rows_are_each_record_once_and_always_the_same(data_folder, make_settings, small):
    meta = data_folder.mixture()
    settings = make_settings(v2pe="random", seed=1)
    rows = eval_rows(str(meta), settings, small, 100)
    assert len(rows) == 100
    full = [row for row in rows if row.num_samples]
    seen = Counter((source.dataset, source.record) for row in full for source in row.sources)
    assert seen == Counter([(0, i) for i in range(40)] + [(1, i) for i in range(24)])
    assert all(not row.weights.any() and row.segment_lengths.tolist() == [256] for row in rows[len(full) :])
    for row in full:
        assert all(image.jpeg_seed is None for image in row.images)
        for start, end in zip(row.sample_bounds, row.sample_bounds[1:], strict=False):
            assert row.positions[start:end].tolist() == [256 * i for i in range(end - start)]
    first = eval_rows(str(meta), make_settings(seed=2, num_workers=0), small, 3)
    assert as_bytes(first) == as_bytes(rows[:3])
    assert {source.dataset for row in first for source in row.sources} == {0, 1}


def test_evaluation_follows_the_policies(data_folder, make_settings, small, talk):
    meta = data_folder.dataset("texts", ["{", talk("a", "b")])
    with pytest.raises(DataError, match=r"texts\.jsonl:1"):
        eval_rows(str(meta), make_settings(), small, 1)
    (row,) = eval_rows(str(meta), make_settings(on_bad_sample="skip"), small, 1)
    assert row.num_samples == 1
    meta = data_folder.dataset("texts", ["{"])
    with pytest.raises(DataError, match="gives no good sample"):
        eval_rows(str(meta), make_settings(on_bad_sample="skip"), small, 1)
