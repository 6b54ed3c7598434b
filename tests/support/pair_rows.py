"""Packed rows of random pairs of answers with their tiles, made without the data room."""

from dataclasses import dataclass

import numpy as np

from internvl_megatron.config.schema import ModelConfig
from internvl_megatron.data.images import ImageRef
from internvl_megatron.data.rows import Row, SampleSource
from tests.support.rows import FIRST_TEXT_TOKEN, IGNORED, IMAGE_TOKEN, StepData


@dataclass(frozen=True)
class RandomPair:
    """Tokens of a question and of both answers, and the tiles of the images that come after its first token."""

    question: list[int]
    answers: tuple[list[int], list[int]]
    images: list[np.ndarray]
    """uint8 [tiles, 3, H, W] each."""
    stride: int


def random_pairs(model: ModelConfig, num_pairs: int, seed: int) -> list[RandomPair]:
    """Pairs with no image, one or two, of one or two tiles each."""
    rng = np.random.default_rng([seed, 7])
    pixels, vocab_size = model.vision.tile_pixels, model.language.vocab_size

    def text(least: int, most: int) -> list[int]:
        return rng.integers(FIRST_TEXT_TOKEN, vocab_size, int(rng.integers(least, most + 1))).tolist()

    pairs = []
    for number in range(num_pairs):
        sizes = rng.integers(1, 3, number % 3)
        images = [rng.integers(0, 256, (size, 3, pixels, pixels), dtype=np.uint8) for size in sizes]
        pairs.append(RandomPair(text(2, 4), (text(1, 6), text(1, 6)), images, int(rng.choice([256, 16]))))
    return pairs


def pair_row(
    pairs: list[RandomPair], tokens_per_row: int, per_tile: int, sample_multiple: int = 1
) -> tuple[Row, list[np.ndarray]]:
    """A row of these pairs, padded, and the tiles of its images."""
    token_ids: list[int] = []
    positions: list[int] = []
    targets = np.full(tokens_per_row, IGNORED, np.int32)
    lengths, images, image_starts, tile_starts = [], [], [], []
    for pair in pairs:
        for answer in pair.answers:
            first, position = len(token_ids), 0
            token_ids.append(pair.question[0])
            positions.append(0)
            for tiles in pair.images:
                count = len(tiles) * per_tile
                if answer is pair.answers[0]:
                    image_starts.append(len(token_ids))
                    tile_starts += [len(token_ids) + tile * per_tile for tile in range(len(tiles))]
                    images.append(ImageRef(f"image {len(images)}", (len(tiles), 1), len(tiles), None))
                token_ids += [IMAGE_TOKEN] * count
                positions += [position + pair.stride * (token + 1) for token in range(count)]
                position = -(-positions[-1] // 256) * 256
            rest = [*pair.question[1:], *answer]
            token_ids += rest
            positions += [position + 256 * (token + 1) for token in range(len(rest))]
            last = len(token_ids)
            targets[last - 1 - len(answer) : last - 1] = answer
            more = -(last - first) % sample_multiple
            token_ids += [0] * more
            positions += [0] * more
            lengths.append(last - first + more)
    padding = tokens_per_row - len(token_ids)
    assert padding >= 0, f"{len(token_ids)} tokens in a row of {tokens_per_row}"
    row = Row(
        token_ids=np.array(token_ids + [0] * padding, np.int32),
        targets=targets,
        weights=(targets != IGNORED).astype(np.float32),
        positions=np.array(positions + [0] * padding, np.int32),
        segment_lengths=np.array(lengths + [padding] * (padding > 0), np.int32),
        sources=tuple(SampleSource(0, index // 2, 0) for index in range(len(lengths))),
        images=tuple(images),
        image_starts=np.array(image_starts, np.int32),
        tile_starts=np.array(tile_starts, np.int32),
        has_pairs=True,
    )
    return row, [tiles for pair in pairs for tiles in pair.images]


def rows_of(
    groups: list[list[RandomPair]], model: ModelConfig, tokens_per_row: int, sample_multiple: int = 1
) -> StepData:
    """A step with a row of each group of pairs."""
    rows, tiles = [], {}
    for index, group in enumerate(groups):
        row, images = pair_row(group, tokens_per_row, model.vision.tokens_per_tile, sample_multiple)
        rows.append(row)
        tiles |= {(index, image): pixels for image, pixels in enumerate(images)}
    return StepData(rows, tiles)


def random_pair_step(
    model: ModelConfig, num_rows: int, seed: int, tokens_per_row: int, sample_multiple: int = 1
) -> StepData:
    """Rows of one pair, two or none."""
    pairs = iter(random_pairs(model, 2 * num_rows, seed))
    groups = [[next(pairs) for _ in range((1, 2, 0, 2)[(row + seed) % 4])] for row in range(num_rows)]
    return rows_of(groups, model, tokens_per_row, sample_multiple)
