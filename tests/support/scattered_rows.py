"""Steps whose images may be in any of the rows, or in none; a row may be text, nothing but padding, or nothing to learn."""

import numpy as np

from internvl_megatron.config.schema import ModelConfig
from tests.support.rows import Picture, Sample, StepData, Tiles, packed_row, without_targets

MOST_IMAGES_OF_A_ROW = 4
TEXT_OF_AN_IMAGE = 4
"""Tokens of text before and after an image, at most."""


def scattered_step(model: ModelConfig, num_rows: int, seed: int, tokens_per_row: int, most_tiles: int) -> StepData:
    """Rows of a step with up to so many tiles over all rows."""
    rng = np.random.default_rng(seed)
    per_tile, pixels = model.vision.tokens_per_tile, model.vision.tile_pixels
    rows, tiles = [], Tiles()
    for index, num_tiles in enumerate(_tiles_of_rows(rng, num_rows, tokens_per_row, per_tile, most_tiles)):
        samples = samples_with_images(rng, num_tiles) if num_tiles else samples_without(rng)
        row = packed_row(rng, samples, tokens_per_row, per_tile, model.language.vocab_size)
        for image, reference in enumerate(row.images):
            tiles[index, image] = rng.integers(0, 256, (reference.num_tiles, 3, pixels, pixels), dtype=np.uint8)
        rows.append(without_targets(StepData([row], {})).rows[0] if rng.random() < 0.2 else row)
    return StepData(rows, tiles)


def _tiles_of_rows(
    rng: np.random.Generator, num_rows: int, tokens_per_row: int, per_tile: int, most_tiles: int
) -> list[int]:
    room = (tokens_per_row - MOST_IMAGES_OF_A_ROW * TEXT_OF_AN_IMAGE) // per_tile
    chosen = rng.permutation(num_rows)[: rng.integers(1, num_rows + 1)]
    few, many = int(rng.integers(2, 9)), int(rng.integers(2, most_tiles + 1))
    wanted = (0, 1, few, many)[rng.integers(4)]
    places = rng.permutation(np.repeat(chosen, room))[:wanted]
    return np.bincount(places, minlength=num_rows).tolist()


def samples_with_images(rng: np.random.Generator, num_tiles: int) -> list[Sample]:
    cuts = np.sort(rng.integers(0, num_tiles + 1, MOST_IMAGES_OF_A_ROW - 1)).tolist()
    sizes = np.diff([0, *cuts, num_tiles])
    samples: list[Sample] = []
    for size in sizes[sizes > 0].tolist():
        picture = [1, Picture(size, int(rng.choice([256, 32, 1]))), int(rng.integers(1, TEXT_OF_AN_IMAGE))]
        if samples and rng.random() < 0.5:
            samples[-1].extend(picture)
        else:
            samples.append(picture)
    return samples


def samples_without(rng: np.random.Generator) -> list[Sample]:
    """Text, or nothing."""
    return [[int(rng.integers(1, 12))] for _ in range(int(rng.integers(0, 4)))]
