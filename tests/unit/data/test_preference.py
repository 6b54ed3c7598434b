"""Pairs of answers: what is wrong with a record is said, and a pair lies in one row with its images listed once."""

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from internvl_megatron.data.dataset import load_datasets
from internvl_megatron.data.evaluation_rows import eval_rows
from internvl_megatron.data.records import SampleError, SampleSettings
from internvl_megatron.data.row_bytes import row_to_bytes, rows_from_bytes
from internvl_megatron.data.rows import Row
from internvl_megatron.data.stream import SampleStream, check_stores
from internvl_megatron.errors import DataError

GOOD: dict[str, Any] = {"question": "how many?", "chosen": "three: seven, two and one.", "rejected": "two"}


def settings_of(make_settings, **changes: Any) -> SampleSettings:
    plain = make_settings(**changes)
    return replace(plain, pairs=True)


def first_row(data_folder, small, settings, records: list[Any], **entry: Any) -> Row:
    data_folder.dataset("pairs", records, **entry)
    return eval_rows(str(data_folder.folder / "meta.json"), settings, small, 1)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen": None}, "field 'chosen' must be a string"),
        ({"question": ["how many?"]}, "field 'question' must be a string"),
        ({"rejected": "  \n"}, "field 'rejected' is empty"),
        ({"rejected": GOOD["chosen"]}, "nothing to prefer"),
        ({"image": 5}, "field 'image' must be a path"),
        ({"image": "none.png"}, "field 'image': "),
        ({"question": "<image> and <image>?", "image": "one.png"}, "field 'question': 2 <image>"),
        ({"question": "half \udc00"}, "field 'question' has half a surrogate pair"),
        ({"chosen": "word " * 200}, "half of tokens_per_row 256"),
    ],
)
def test_wrong_records_name_the_field(data_folder, small, make_settings, changes, message) -> None:
    data_folder.image("one.png", 28, 28)
    settings = settings_of(make_settings, on_long_sample="stop")
    with pytest.raises(SampleError, match=r"pairs\.jsonl:1: .*") as raised:
        first_row(data_folder, small, settings, [json.dumps({**GOOD, **changes})])
    assert message in str(raised.value)


def test_the_two_kinds_of_records_are_told_apart(data_folder, small, make_settings, talk) -> None:
    with pytest.raises(SampleError, match=r"is a conversation, but loss\.kind=mpo"):
        first_row(data_folder, small, settings_of(make_settings), [talk("a", "b")])
    with pytest.raises(SampleError, match=r"is a pair of answers; set loss\.kind=mpo"):
        first_row(data_folder, small, make_settings(), [GOOD])


def test_an_answer_that_is_cut_away_is_an_error(data_folder, small, make_settings) -> None:
    record = {**GOOD, "question": "how many " * 200}
    with pytest.raises(SampleError, match="nothing is left of the answer in field 'chosen'"):
        first_row(data_folder, small, settings_of(make_settings, on_long_sample="truncate"), [record])


def test_packed_rows_are_refused(data_folder, small, make_settings) -> None:
    data_folder.dataset("pairs", [GOOD])
    datasets = load_datasets(data_folder.folder / "meta.json")
    datasets[0].store = object()  # pyright: ignore[reportAttributeAccessIssue] - it is not looked at
    with pytest.raises(DataError, match="packed rows hold no pairs"):
        check_stores(datasets, settings_of(make_settings), small)


def check_pairs(row: Row, tokenizer) -> None:
    """Every pair: the same question and image tokens, then different answers, trained on with weight 1."""
    bounds, spans = row.sample_bounds, []
    for first, end in pairwise(bounds.tolist()):
        trained = np.flatnonzero(row.weights[first:end])
        assert len(trained), "every answer is trained on"
        spans.append((first, first + int(trained[0]) + 1, first + int(trained[-1]) + 1))
    for (start, answer, end), (second, other, last) in zip(spans[::2], spans[1::2], strict=True):
        np.testing.assert_array_equal(row.token_ids[start:answer], row.token_ids[second:other])
        np.testing.assert_array_equal(row.positions[start:answer], row.positions[second:other])
        assert row.token_ids[answer:end].tolist() != row.token_ids[other:last].tolist()
    assert row.sources[::2] == row.sources[1::2]
    assert set(np.unique(row.weights)) == {0.0, 1.0}, "no weight but 1, whatever loss.weighting says"
    context = np.flatnonzero(row.token_ids == tokenizer.image_context_id)
    starts = np.concatenate([row.tile_starts, row.second_tile_starts])
    np.testing.assert_array_equal(context, np.sort((starts[:, None] + np.arange(4)).ravel()))


@pytest.mark.parametrize("multiple", [1, 8])
def test_a_row_of_pairs(data_folder, small, make_settings, multiple: int) -> None:
    names = [data_folder.image(f"{n}.png", 28 * (n + 1), 28, seed=n) for n in range(3)]
    records = [
        {**GOOD, "image": names[2], "question": "<image>\nhow many?"},
        GOOD,
        {**GOOD, "image": names[:2], "question": "<image><image>how many?", "rejected": "seven"},
        {**GOOD, "image": names[0]},  # without a mark: the image comes first
    ]
    settings = settings_of(make_settings, tokens_per_row=512, v2pe="random", sample_multiple_tokens=multiple)
    row = first_row(data_folder, small, settings, records)
    assert (row.num_samples, len(row.images)) == (8, 4)
    assert row.num_tiles == sum(image.num_tiles for image in row.images)
    assert not (row.segment_lengths[:8] % multiple).any()
    check_pairs(row, small)
    (again,) = rows_from_bytes(row_to_bytes(3, row)).values()
    assert again.has_pairs
    np.testing.assert_array_equal(again.second_tile_starts, row.second_tile_starts)


def test_a_broken_image_takes_its_whole_pair_out(data_folder, small, make_settings) -> None:
    names = [data_folder.image(f"{n}.png", 28, 28, seed=n) for n in range(2)]
    records = [{**GOOD, "image": names[0]}, {**GOOD, "image": names[1]}]
    row = first_row(data_folder, small, settings_of(make_settings), records)
    left = row.without_samples_of_images({1})
    bounds = row.sample_bounds
    np.testing.assert_array_equal(left.weights[: bounds[2]], row.weights[: bounds[2]])
    assert row.weights[bounds[2] :].any()
    assert not left.weights[bounds[2] :].any()


def test_streams_give_pairs_and_continue(data_folder, small, make_settings) -> None:
    names = [data_folder.image(f"{n}.png", 28 * (1 + n % 3), 28, seed=n) for n in range(6)]
    records = [{**GOOD, "image": name, "rejected": "two " * (n + 1)} for n, name in enumerate(names)]
    data_folder.dataset("pairs", records, data_augment=True, max_dynamic_patch=2)
    settings = settings_of(make_settings, v2pe="random")
    datasets = load_datasets(data_folder.folder / "meta.json")

    def stream() -> SampleStream:
        return SampleStream(datasets, settings, small, 0, 1)

    one = stream()
    for _ in range(3):
        check_pairs(one.next_row(), small)
    state = one.state_dict()
    other = stream()
    other.load_state_dict(state)
    for _ in range(3):
        assert row_to_bytes(0, one.next_row()) == row_to_bytes(0, other.next_row())
