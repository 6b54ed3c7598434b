"""Streams: deterministic, resumable at any row, independent of each other, and clear about bad samples."""

import json
import logging
from collections import Counter
from typing import Any

import numpy as np
import pytest

from internvl_megatron.data.dataset import load_datasets
from internvl_megatron.data.evaluation_rows import eval_rows
from internvl_megatron.data.row_bytes import row_to_bytes
from internvl_megatron.data.stream import LOGGED_OF_A_KIND, SampleStream
from internvl_megatron.errors import DataError

UPSTREAM: dict[str, Any] = {"packing": "first_fit", "packing_window_rows": 1}


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


@pytest.mark.parametrize(("packing", "multiple"), [("best_fit", 16), ("first_fit", 1)])
@pytest.mark.parametrize("rows_before", [0, 1, 7, 25])
def test_a_saved_position_gives_the_same_rows(data_folder, open_stream, rows_before, packing, multiple):
    settings = {"v2pe": "random", "packing": packing, "sample_multiple_tokens": multiple}
    meta = data_folder.mixture()
    stream = open_stream(meta, 1, 3, **settings)
    take(stream, rows_before)
    state = json.loads(json.dumps(stream.state_dict()))
    assert any(state["packing"]["open"]) == (rows_before > 0), "samples wait for a row"
    assert len(state["packing"]["ready"]) == -rows_before % 4, "rows wait for their turn in the window"
    following = take(stream, 12)
    resumed = open_stream(meta, 1, 3, **settings)
    resumed.load_state_dict(state)
    assert take(resumed, 12) == following
    assert resumed.state_dict() == stream.state_dict()


def test_two_runs_are_equal_and_the_seed_matters(data_folder, open_stream):
    meta = data_folder.mixture()
    assert take(open_stream(meta, v2pe="random"), 5) == take(open_stream(meta, v2pe="random"), 5)
    assert take(open_stream(meta, seed=1), 5) != take(open_stream(meta, seed=0), 5)


def test_rows_of_like_cost_meet_in_a_step(data_folder, open_stream):
    """The n-th rows of all streams have the same rank among the four of their window, and the rank changes."""
    meta = data_folder.mixture()
    streams = [open_stream(meta, index, 3) for index in range(3)]
    orders = []
    for _ in range(6):
        windows = [[stream.next_row() for _ in range(4)] for stream in streams]
        costs = [[int((row.segment_lengths[: row.num_samples] ** 2).sum()) for row in rows] for rows in windows]
        ranks = {tuple(sorted(cost).index(value) for value in cost) for cost in costs if len(set(cost)) == 4}
        assert len(ranks) == 1
        orders.append(ranks.pop())
    assert len(set(orders)) > 1


def test_evaluation_rows_keep_room_for_padded_samples(data_folder, make_settings, small):
    meta = data_folder.mixture()
    for row in eval_rows(str(meta), make_settings(sample_multiple_tokens=16), small, 12):
        assert row.segment_lengths.sum() == 256 and (row.segment_lengths % 16 == 0).all()


def test_streams_deal_out_the_records_and_every_pass_has_another_order(data_folder, open_stream, talk):
    """Rows of one sample and no buffer: samples come in the order in which they are drawn."""
    meta = data_folder.dataset("texts", [talk("n", f"{'seven ' * 30} {i}") for i in range(20)])
    drawn = [[], []]
    for index in range(3):
        stream = open_stream(meta, index, 3, tokens_per_row=70, packing_buffer_rows=0, **UPSTREAM)
        sources = [source for _ in range(14) for source in stream.next_row().sources]
        share = 7 if index < 2 else 6
        for number, epoch in enumerate((sources[:share], sources[share : 2 * share])):
            assert {source.pass_number for source in epoch} == {number}
            drawn[number].append([source.record for source in epoch])
    for epoch in drawn:
        assert sorted(record for share in epoch for record in share) == list(range(20))
    assert all(set(one) != set(other) for one, other in zip(*drawn, strict=True))


def image_seeds(stream, num_rows):
    rows = (stream.next_row() for _ in range(num_rows))
    return {
        (source.dataset, source.record, source.pass_number): [image.jpeg_seed for image in row.images]
        for row in rows
        for source in row.sources
    }


def test_a_sample_has_the_same_random_numbers_in_whatever_stream(data_folder, open_stream, talk):
    names = [data_folder.image(f"{index}.png", 30, 30) for index in range(2)]
    record = {**talk("<image><image>?", "x"), "image": names}
    data_folder.dataset("others", [record] * 3, data_augment=True)
    meta = data_folder.dataset("pictures", [record] * 6, data_augment=True, repeat_time=2)
    one_sample = {"tiles_per_row": 2, "max_tiles": 1, "packing_window_rows": 1}
    alone = image_seeds(open_stream(meta, **one_sample), 30)
    shared = [image_seeds(open_stream(meta, index, 3, **one_sample), 10) for index in range(3)]
    assert len(alone) == 30 and {source[2] for source in alone if source[0] == 1} == {0, 1, 2, 3}
    assert {source: seeds for stream in shared for source, seeds in stream.items()} == alone
    seeds = [seed for images in alone.values() for seed in images]
    assert len(seeds) == 60 == len(set(seeds)), "every image of every pass of every data set has its own"


def test_data_sets_are_drawn_in_proportion_to_their_length(data_folder, open_stream, talk):
    long = talk("a", "seven " * 30)
    data_folder.dataset("small", [long] * 4, repeat_time=2)
    meta = data_folder.dataset("large", [long] * 24)
    stream = open_stream(meta, tokens_per_row=len(rows_tokens(open_stream(meta))))
    counts = Counter(source.dataset for _ in range(320) for source in stream.next_row().sources)
    assert counts == {0: 80, 1: 240}, "ten epochs"


def test_groups_have_their_share_of_the_tokens(data_folder, open_stream, talk):
    data_folder.dataset("talks", [talk("a", "seven " * (5 * i)) for i in range(1, 9)], group="language")
    meta = data_folder.dataset("more", [talk("a", "seven " * i) for i in range(1, 20)], group="multimodal")
    stream = open_stream(meta, group_weights=("language=1", "multimodal=3"), packing_buffer_rows=0, **UPSTREAM)
    tokens, longest = Counter(), 0
    for _ in range(600):  # rows of one sample, as none may wait
        row = stream.next_row()
        tokens[row.sources[0].dataset] += int(row.segment_lengths[0])
        longest = max(longest, int(row.segment_lengths[0]))
        assert abs(tokens[1] - 0.75 * tokens.total()) < longest
    assert tokens.total() > 100 * longest


def test_groups_that_do_not_fit(data_folder, open_stream, talk):
    meta = data_folder.dataset("texts", [talk("a", "b")] * 4)
    with pytest.raises(DataError, match="data set 'texts' has no 'group' in the meta file"):
        open_stream(meta, group_weights=("language=1",))


def test_a_group_without_good_samples_ends_the_stream(data_folder, open_stream, talk):
    """It would always be the one that is furthest behind."""
    data_folder.dataset("texts", [talk("a", "seven")] * 4, group="good")
    meta = data_folder.dataset("broken", ["{"] * 5, group="bad")
    stream = open_stream(meta, on_bad_sample="skip", group_weights=("good=3", "bad=1"))
    with pytest.raises(DataError, match="a whole pass over its data gave no good sample"):
        for _ in range(20):
            stream.next_row()


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
    meta = data_folder.dataset("texts", [talk("a", "b")] * 4, group="x")
    data_folder.dataset("others", [talk("a", "b")] * 6, group="y")
    weights = ("x=1", "y=2")
    state = open_stream(meta, group_weights=weights).state_dict()

    def refused(message, index=0, num_streams=1, **changes):
        stream = open_stream(meta, index, num_streams, **{"group_weights": weights, **changes})
        with pytest.raises(DataError, match=f"saved position of data stream 0 is for other data .*{message}"):
            stream.load_state_dict(state)

    refused("stream was", 0, 2)
    refused("seed was 0, is 3", seed=3)
    refused("max_tiles was 4, is 2", max_tiles=2)
    refused("groups was", group_weights=("x=1", "y=3"))
    refused("groups was", group_weights=None)
    good = dict(data_folder.meta)
    data_folder.meta = dict(reversed(good.items()))
    data_folder.dataset("texts", [talk("a", "b")] * 4, group="x")
    refused("datasets was")  # another order
    for name, count, entry in [("texts", 5, {"group": "x"}), ("texts", 4, {"group": "y"}), ("renamed", 4, {"group": "x"}),
                               ("texts", 2, {"group": "x", "repeat_time": 2})]:  # fmt: skip
        data_folder.meta = {}
        data_folder.dataset(name, [talk("a", "b")] * count, **entry)
        data_folder.dataset("others", [talk("a", "b")] * 6, group="x" if entry["group"] == "y" else "y")
        refused("datasets was")
    data_folder.meta = {}
    data_folder.dataset("texts", [talk("a", "b")] * 4, group="x")
    data_folder.dataset("others", [talk("a", "b")] * 6, group="y")
    open_stream(meta, group_weights=("y=4", "x=2")).load_state_dict(state)  # the same shares, written otherwise


def test_a_state_is_small_whatever_the_number_of_data_sets(data_folder, open_stream, talk):
    meta = None
    for number in range(300):
        meta = data_folder.dataset(f"a data set with a long name {number}", [talk("a", "b")])
    state = open_stream(meta).state_dict()
    assert len(json.dumps(state)) < 2000


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
