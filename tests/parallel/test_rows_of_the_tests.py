"""The rows the layouts are trained on hold what the tests of this folder claim to cover."""

import numpy as np
import pytest

from tests.support.layouts import Scenario
from tests.support.models import small_model
from tests.support.rows import IMAGE_TOKEN, random_step

MODEL = small_model()
PER_TILE = MODEL.vision.tokens_per_tile
ROWS = [row for step in range(5) for row in random_step(MODEL, 4, Scenario().seed + step).rows]


def test_every_feature_occurs() -> None:
    middle = len(ROWS[0].token_ids) // 2
    ends = [np.cumsum(row.segment_lengths) for row in ROWS]
    images_per_sample = [
        np.bincount(np.searchsorted(end, row.image_starts, side="right"))
        for row, end in zip(ROWS, ends, strict=True)
        if row.images
    ]
    features = {
        "text-only row": any(not row.images for row in ROWS),
        "several images in a sample": any(counts.max() > 1 for counts in images_per_sample),
        "several tiles in an image": any(image.num_tiles > 1 for row in ROWS for image in row.images),
        "several samples in a row": any(row.num_samples > 1 for row in ROWS),
        "padding": any(row.num_tokens < len(row.token_ids) for row in ROWS),
        "no padding": any(row.num_tokens == len(row.token_ids) for row in ROWS),
        "tile across the middle": any(
            start < middle < start + PER_TILE for row in ROWS for start in row.tile_starts.tolist()
        ),
        "fractional positions": any((row.positions % 256).any() for row in ROWS),
        "sample without targets": any(
            not row.weights[end - length : end].any()
            for row, row_ends in zip(ROWS, ends, strict=True)
            for end, length in zip(row_ends[: row.num_samples], row.segment_lengths, strict=False)
        ),
        "image token with a target": any(((row.token_ids == IMAGE_TOKEN) & (row.weights > 0)).any() for row in ROWS),
    }
    assert all(features.values()), f"missing: {[name for name, found in features.items() if not found]}"


@pytest.mark.parametrize("row", ROWS)
def test_rows_are_consistent(row: object) -> None:
    from internvl_megatron.data.rows import Row

    assert isinstance(row, Row)
    assert row.segment_lengths.sum() == len(row.token_ids)
    tokens = [start + place for start in row.tile_starts.tolist() for place in range(PER_TILE)]
    assert tokens == np.flatnonzero(row.token_ids == IMAGE_TOKEN).tolist(), "tiles cover the image tokens, in order"
    assert (np.diff(row.image_starts) > 0).all(), "images are in the order of their tokens"
    assert sum(image.num_tiles for image in row.images) == row.num_tiles
    supervised = np.flatnonzero(row.targets >= 0)
    np.testing.assert_array_equal(row.targets[supervised], row.token_ids[supervised + 1])
    np.testing.assert_array_equal(row.weights > 0, row.targets >= 0)
    first = np.concatenate([[0], np.cumsum(row.segment_lengths)[:-1]])
    assert not row.positions[first].any(), "positions start at 0 in every sample"
