"""What a packed row must satisfy."""

from dataclasses import fields

import numpy as np
import pytest

from internvl_megatron.data.images import ImageRef
from internvl_megatron.data.records import Sample
from internvl_megatron.data.row_bytes import row_to_bytes, rows_from_bytes
from internvl_megatron.data.rows import SampleSource, build_row, token_weight

PAD = 999


def sample(length, supervised, images=()):
    """Tokens 1..length, of which those at `supervised` are trained on; images as (start, tiles)."""
    ids = np.arange(1, length + 1, dtype=np.int32)
    labels = np.full(length, -100, dtype=np.int32)
    labels[list(supervised)] = ids[list(supervised)]
    refs = tuple(ImageRef(f"{start}.png", (tiles, 1), tiles, 5 if tiles > 1 else None) for start, tiles in images)
    starts = np.array([start for start, _ in images], dtype=np.int32)
    tiles = np.array([start + 4 * tile for start, count in images for tile in range(count)], dtype=np.int32)
    return Sample(ids, labels, 256 * np.arange(length, dtype=np.int32), refs, starts, tiles)


def row_of(*samples, tokens=64, weighting="square", make_settings, **settings):
    settings = make_settings(tokens_per_row=tokens, **settings)
    settings = type(settings)(data=settings.data, tile_pixels=28, tokens_per_tile=4, weighting=weighting)
    sources = [SampleSource(0, index, index) for index in range(len(samples))]
    return build_row(list(zip(sources, samples, strict=True)), settings, PAD)


@pytest.mark.parametrize(
    ("weighting", "weights", "total", "shares"),
    [("square", (0.5, 0.25), 6, (2, 4)), ("token", (1, 1), 20, (4, 16)), ("sample", (0.25, 0.0625), 2, (1, 1))],
)
def test_weights_of_samples_with_4_and_16_supervised_tokens(make_settings, weighting, weights, total, shares):
    first, second = sample(10, range(6, 10)), sample(30, range(14, 30))
    row = row_of(first, second, weighting=weighting, make_settings=make_settings)
    assert row.weights.dtype == np.float32
    assert np.unique(row.weights[:10]).tolist() == [0, weights[0]]
    assert np.unique(row.weights[10:40]).tolist() == [0, weights[1]]
    assert (row.weights.sum(), row.weights[:10].sum(), row.weights[10:].sum()) == (total, *shares)
    assert ((row.weights > 0) == (row.targets != -100)).all()


def test_weight_of_a_sample_without_supervised_tokens():
    assert token_weight(np.full(4, -100), "square") == token_weight(np.full(4, -100), "token") == 0


def test_targets_stay_inside_their_sample(make_settings):
    # Even a sample whose first token is supervised is not predicted from the sample before it.
    row = row_of(sample(5, range(5)), sample(4, range(4)), tokens=12, make_settings=make_settings)
    assert row.token_ids.tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 4, PAD, PAD, PAD]
    assert row.targets.tolist() == [2, 3, 4, 5, -100, 2, 3, 4, -100, -100, -100, -100]
    assert row.positions.tolist() == [0, 256, 512, 768, 1024, 0, 256, 512, 768, 0, 0, 0]
    assert row.segment_lengths.tolist() == [5, 4, 3]
    assert row.sample_bounds.tolist() == [0, 5, 9]
    assert (row.num_samples, row.num_tokens) == (2, 9)
    assert [array.dtype for array in (row.token_ids, row.targets, row.positions, row.segment_lengths)] == [
        np.int32
    ] * 4


@pytest.mark.parametrize("multiple", [1, 4])
def test_no_token_is_trained_on_or_attended_to_across_samples(make_settings, multiple):
    """Every token carries the number of its sample; every one of them is supervised, as in records without a template."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, 12, int(rng.integers(1, 7))).tolist()
        samples = []
        for number, length in enumerate(lengths):
            ids = (100 * (number + 1) + np.arange(length)).astype(np.int32)
            none = np.zeros(0, np.int32)
            samples.append(Sample(ids, ids.copy(), np.arange(length, dtype=np.int32), (), none, none))
        row = row_of(*samples, tokens=96, make_settings=make_settings, sample_multiple_tokens=multiple)
        segments = np.repeat(np.arange(len(row.segment_lengths)), row.segment_lengths)
        seen = 0
        for at in range(96):
            token, target = int(row.token_ids[at]), int(row.targets[at])
            if token == PAD:
                assert target == -100 and row.weights[at] == 0
                continue
            seen += 1
            assert segments[at] == token // 100 - 1, "a segment holds one sample: attention sees no other"
            last = token % 100 == lengths[token // 100 - 1] - 1
            assert target == (-100 if last else token + 1)
            assert (row.weights[at] == 0) == last
            assert row.positions[at] == token % 100
        assert seen == sum(lengths)


def test_a_full_row_has_no_padding_segment_and_an_empty_row_is_all_padding(make_settings):
    assert row_of(sample(5, [4]), sample(3, [2]), tokens=8, make_settings=make_settings).segment_lengths.tolist() == [
        5,
        3,
    ]
    empty = row_of(tokens=8, make_settings=make_settings)
    assert empty.segment_lengths.tolist() == [8] and empty.num_samples == empty.num_tokens == 0
    assert (empty.token_ids == PAD).all() and not empty.weights.any()


def test_samples_are_padded_to_a_multiple(make_settings):
    row = row_of(sample(5, [4]), sample(4, [2]), tokens=16, make_settings=make_settings, sample_multiple_tokens=4)
    assert row.token_ids.tolist() == [1, 2, 3, 4, 5, PAD, PAD, PAD, 1, 2, 3, 4, PAD, PAD, PAD, PAD]
    assert row.targets.tolist() == [-100, -100, -100, 5, *[-100] * 5, 3, *[-100] * 6]
    assert row.segment_lengths.tolist() == [8, 4, 4]


def test_a_row_is_cut_where_its_samples_end(make_settings):
    row = row_of(sample(5, [4]), sample(4, [2]), tokens=64, make_settings=make_settings)
    for multiple, length, segments in ((1, 9, [5, 4]), (4, 12, [5, 4, 3]), (9, 9, [5, 4])):
        cut = row.cut(multiple)
        for array in ("token_ids", "targets", "weights", "positions"):
            np.testing.assert_array_equal(getattr(cut, array), getattr(row, array)[:length])
        assert cut.segment_lengths.tolist() == segments
        assert (cut.num_tokens, cut.num_samples) == (9, 2)
    empty = row_of(tokens=8, make_settings=make_settings).cut(4)
    assert empty.segment_lengths.tolist() == [4] and len(empty.token_ids) == 4


def image_row(make_settings):
    return row_of(
        sample(20, [18, 19], [(1, 1), (7, 2)]),
        sample(6, [5]),
        sample(12, [10, 11], [(3, 1)]),
        make_settings=make_settings,
    )


def test_images_in_row_coordinates(make_settings):
    row = image_row(make_settings)
    assert row.image_starts.tolist() == [1, 7, 29]
    assert row.tile_starts.tolist() == [1, 7, 11, 29]
    assert [image.path for image in row.images] == ["1.png", "7.png", "3.png"]
    assert row.num_tiles == 4 and row.tile_starts.dtype == np.int32


@pytest.mark.parametrize(("failed", "lost"), [(set(), []), ({0}, [0]), ({1}, [0]), ({2}, [2]), ({0, 1, 2}, [0, 2])])
def test_samples_of_failed_images_lose_their_weight(make_settings, failed, lost):
    row = image_row(make_settings)
    before = row.weights.copy()
    without = row.without_samples_of_images(failed)
    bounds = row.sample_bounds
    for index in range(3):
        part = slice(bounds[index], bounds[index + 1])
        expected = np.zeros_like(before[part]) if index in lost else before[part]
        assert without.weights[part].tolist() == expected.tolist()
    assert before.any() and (row.weights == before).all(), "the row itself is not changed"
    assert without.token_ids is row.token_ids and without.images is row.images


def same_row(a, b):
    for field in fields(a):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype and left.tobytes() == right.tobytes(), field.name
        else:
            assert left == right, field.name


def test_rows_survive_the_round_trip_through_bytes(make_settings):
    rows = [image_row(make_settings), row_of(tokens=8, make_settings=make_settings)]
    buffer = row_to_bytes(9, rows[1]) + row_to_bytes(4, rows[0])
    back = rows_from_bytes(buffer)
    assert list(back) == [4, 9], "by slot, whatever their order in the buffer"
    for row, copy in zip(rows, back.values(), strict=True):
        same_row(row, copy)
    assert back[4].weights.flags.writeable
    assert rows_from_bytes(b"") == {}
    with pytest.raises(ValueError, match="buffer"):
        rows_from_bytes(buffer[:-4])
    with pytest.raises(AssertionError, match="two rows for slot 4"):
        rows_from_bytes(buffer + row_to_bytes(4, rows[0]))
