"""Drawn rows keep to their budgets and shares; small copies have the same tiles in proportion."""

import numpy as np
import pytest

from internvl_megatron.config.schema import LanguageConfig, ModelConfig, VisionConfig
from internvl_megatron.scaling.drawn_rows import TILE_TOKENS, draw_rows
from tools.image_text_rows import RandomPixels, small_row

BUDGET = 8192, 24
MODEL = ModelConfig(
    vision=VisionConfig(hidden_size=8, num_layers=1, num_heads=1, ffn_hidden_size=8, tile_pixels=56),
    language=LanguageConfig(
        hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_size=8, ffn_hidden_size=8, vocab_size=99
    ),
)
FACTOR = TILE_TOKENS // MODEL.vision.tokens_per_tile


@pytest.fixture(scope="module")
def rows():
    return draw_rows(0.5, 60, *BUDGET, seed=3)


def test_rows_keep_to_both_budgets(rows):
    for row in rows:
        assert sum(sample.num_tokens for sample in row) <= BUDGET[0]
        assert sum(sample.num_tiles for sample in row) <= BUDGET[1]


def test_image_tokens_have_their_share(rows):
    tiles = sum(sample.num_tiles for row in rows for sample in row)
    assert TILE_TOKENS * tiles / sum(sample.num_tokens for row in rows for sample in row) == pytest.approx(
        0.5, abs=0.05
    )
    assert not any(sample.num_tiles for row in draw_rows(0.0, 5, *BUDGET, seed=3) for sample in row)


def test_rows_depend_on_the_seed_alone_and_more_rows_begin_alike(rows):
    assert draw_rows(0.5, 20, *BUDGET, seed=3) == rows[:20]
    assert draw_rows(0.5, 20, *BUDGET, seed=4) != rows[:20]


def test_small_rows_have_the_same_tiles_and_a_proportion_of_everything_else(rows):
    small = [small_row(row, MODEL, BUDGET[0], seed) for seed, row in enumerate(rows)]
    for row, copy in zip(rows, small, strict=True):
        assert len(copy.token_ids) == BUDGET[0] // FACTOR == copy.segment_lengths.sum()
        assert copy.num_tiles == sum(sample.num_tiles for sample in row)
        assert copy.num_tokens == pytest.approx(sum(sample.num_tokens for sample in row) / FACTOR, abs=1)
        assert copy.num_samples == len(copy.segment_lengths) - (copy.num_tokens < len(copy.token_ids))
    supervised = sum(sample.num_supervised_tokens for row in rows for sample in row)
    assert sum((copy.weights > 0).sum() for copy in small) == pytest.approx(supervised / FACTOR, rel=0.05)


def test_tiles_and_targets_lie_within_their_samples(rows):
    per_tile = MODEL.vision.tokens_per_tile
    for seed, row in enumerate(rows):
        copy = small_row(row, MODEL, BUDGET[0], seed)
        bounds = copy.sample_bounds
        first = np.searchsorted(bounds, copy.tile_starts, side="right")
        last = np.searchsorted(bounds, copy.tile_starts + per_tile - 1, side="right")
        assert (first == last).all()
        assert (np.diff(copy.tile_starts) >= per_tile).all()
        assert (copy.targets[bounds[1:] - 1] == -100).all(), "a sample's last token predicts nothing"
        predicted = np.flatnonzero(copy.targets >= 0)
        assert (copy.targets[predicted] == copy.token_ids[predicted + 1]).all()
        image = (copy.tile_starts[:, None] + np.arange(1, per_tile)).ravel() - 1
        assert not copy.weights[image].any(), "an image token that an image token follows predicts nothing"


def test_ranks_hold_all_tiles_once(rows):
    small = [small_row(row, MODEL, BUDGET[0], seed) for seed, row in enumerate(rows[:4])]
    held = [RandomPixels(small, MODEL, rank, 3).tiles().tiles for rank in range(3)]
    images = {(index, image) for index, row in enumerate(small) for image in range(len(row.images))}
    assert sorted(key for tiles in held for key in tiles) == sorted(images)
    for tiles in held:
        assert all(
            values.shape == (small[row].images[image].num_tiles, 3, 56, 56) for (row, image), values in tiles.items()
        )
