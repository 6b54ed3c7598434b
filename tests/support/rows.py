"""Packed rows of random samples with their tiles, made without the data room.

A sample is a list of pieces, a row a list of samples. Rows take turns: several images in one sample; a tile across the
middle of the row (where sequence parallelism cuts it in two); text only; a full row without padding.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from internvl_megatron.config.schema import ModelConfig
from internvl_megatron.data.images import ImageRef
from internvl_megatron.data.rows import Row, SampleSource
from internvl_megatron.data.step_rows import DecodedTiles, ImageKey, assign_images

IMAGE_TOKEN = 7
FIRST_TEXT_TOKEN = 8
IGNORED = -100

RowKind = Literal["mixed", "text", "one_tile", "sparse"]
Tiles = dict[ImageKey, np.ndarray]


@dataclass(frozen=True)
class Picture:
    """Image tokens of one image."""

    num_tiles: int
    stride: int
    """Position step of its tokens, in units of 1/256."""


Sample = list[int | Picture]
"""Pieces in order; a number is that many text tokens."""


@dataclass(frozen=True)
class StepData:
    """Rows of one step over all replicas, and the tiles of all images by (row, image)."""

    rows: list[Row]
    tiles: Tiles


class MemoryRows:
    """Stands in for `StepRows` with tiles from memory instead of image files."""

    def __init__(
        self,
        data: StepData,
        own_rows: range,
        rank_in_replica: int,
        replica_size: int,
        broken: frozenset[ImageKey] = frozenset(),
        image_owner: list[list[int]] | None = None,
    ) -> None:
        """Take one replica's rows.

        Args:
            data: the step's rows over all replicas.
            own_rows: those of this replica.
            rank_in_replica: place of this rank among those that decode.
            replica_size: how many decode.
            broken: images, by (row over all replicas, image), that cannot be decoded.
            image_owner: who decodes which image, [own row][image]; None = as in training.
        """
        self.rows = [data.rows[row] for row in own_rows]
        self.slots = list(own_rows)
        self.image_owner = assign_images(self.rows, replica_size) if image_owner is None else image_owner
        self._decoded = DecodedTiles({}, {})
        for (row, image), tiles in data.tiles.items():
            if row not in own_rows or self.image_owner[own_rows.index(row)][image] != rank_in_replica:
                continue
            if (row, image) in broken:
                self._decoded.failed[own_rows.index(row), image] = "broken for the test"
            else:
                self._decoded.tiles[own_rows.index(row), image] = tiles

    def tiles(self) -> DecodedTiles:
        return self._decoded


def random_step(
    model: ModelConfig,
    num_rows: int,
    seed: int,
    tokens_per_row: int = 64,
    kind: RowKind = "mixed",
    weight_exponent: float = 0.5,
    sample_multiple: int = 1,
) -> StepData:
    """Rows of a step; the weight of a token in a sample with l supervised tokens is l to the minus `weight_exponent`."""
    rng = np.random.default_rng(seed)
    per_tile, pixels = model.vision.tokens_per_tile, model.vision.tile_pixels
    rows: list[Row] = []
    tiles: Tiles = {}
    for index in range(num_rows):
        samples = _samples(rng, kind, index, seed, tokens_per_row - 4 * (sample_multiple - 1), per_tile)
        vocab_size = model.language.vocab_size
        row = packed_row(rng, samples, tokens_per_row, per_tile, vocab_size, weight_exponent, sample_multiple)
        for image, reference in enumerate(row.images):
            tiles[index, image] = rng.integers(0, 256, (reference.num_tiles, 3, pixels, pixels), dtype=np.uint8)
        rows.append(row)
    return StepData(rows, tiles)


def without_targets(data: StepData) -> StepData:
    """The same rows with nothing to learn from."""
    rows = [
        replace(row, weights=np.zeros_like(row.weights), targets=np.full_like(row.targets, IGNORED))
        for row in data.rows
    ]
    return StepData(rows, data.tiles)


def _samples(
    rng: np.random.Generator, kind: RowKind, index: int, seed: int, tokens_per_row: int, per_tile: int
) -> list[Sample]:
    turn = (index + seed) % 4
    if kind == "one_tile" and index == 0:
        return [[5, Picture(1, 64), 7], [12]]
    if kind == "sparse" and seed % 2 and index == seed // 2 % 4:
        return [[5, Picture(3, 64), 7], [12]]
    if kind != "mixed" or turn == 2:
        return [[_text(rng)] for _ in range(int(rng.integers(2, 5)))]
    if (
        turn == 0
    ):  # several images in one sample, then text alone and an image at the very start of a sample's second token
        return [[_text(rng), _picture(rng), 2, _picture(rng), _text(rng)], [4], [1, _picture(rng), 3]]
    first = _text(rng)
    if turn == 1:  # the middle of the row is the middle of a tile
        before = tokens_per_row // 2 - per_tile // 2 - first
        return [[first], [before, Picture(2, 16), _text(rng)], [2, Picture(1, 256), 3]]
    used = first + per_tile * 2 + 3  # a full row: the rest is text
    return [[first, Picture(2, 1), 3], [tokens_per_row - used]]


def _text(rng: np.random.Generator) -> int:
    return int(rng.integers(6, 11))


def _picture(rng: np.random.Generator) -> Picture:
    return Picture(int(rng.integers(1, 4)), int(rng.choice([256, 64, 16, 1])))


def packed_row(
    rng: np.random.Generator,
    samples: list[Sample],
    tokens_per_row: int,
    per_tile: int,
    vocab_size: int,
    weight_exponent: float = 0.5,
    sample_multiple: int = 1,
) -> Row:
    """A row of these samples, padded; the end of each sample's last text is its answer."""
    token_ids: list[int] = []
    positions: list[int] = []
    targets = np.full(tokens_per_row, IGNORED, np.int32)
    weights = np.zeros(tokens_per_row, np.float32)
    lengths: list[int] = []
    images: list[ImageRef] = []
    image_starts: list[int] = []
    tile_starts: list[int] = []
    for sample in samples:
        first = len(token_ids)
        position = -256  # of the token before
        for piece in sample:
            if isinstance(piece, Picture):
                count = piece.num_tiles * per_tile
                image_starts.append(len(token_ids))
                tile_starts += [len(token_ids) + tile * per_tile for tile in range(piece.num_tiles)]
                images.append(ImageRef(f"image {len(images)}", (piece.num_tiles, 1), piece.num_tiles, None))
                token_ids += [IMAGE_TOKEN] * count
                positions += [position + piece.stride * (token + 1) for token in range(count)]
                position = -(-positions[-1] // 256) * 256
            else:
                token_ids += rng.integers(FIRST_TEXT_TOKEN, vocab_size, piece).tolist()
                positions += [position + 256 * (token + 1) for token in range(piece)]
                position = positions[-1]
        last = len(token_ids)
        lengths.append(last - first)
        last_text = sample[-1]
        assert isinstance(last_text, int), "a sample ends with text"
        # Up to the whole last piece: then the last image token predicts its first token. Some samples teach nothing.
        answer = min(int(rng.integers(0, last_text + 1)), last - first - 1)
        targets[last - 1 - answer : last - 1] = token_ids[last - answer :]
        weights[last - 1 - answer : last - 1] = answer**-weight_exponent if answer else 0.0
        more = -(last - first) % sample_multiple
        token_ids += [0] * more
        positions += [0] * more
        lengths[-1] += more
    padding = tokens_per_row - len(token_ids)
    assert padding >= 0, f"{len(token_ids)} tokens in a row of {tokens_per_row}"
    return Row(
        token_ids=np.array(token_ids + [0] * padding, np.int32),
        targets=targets,
        weights=weights,
        positions=np.array(positions + [0] * padding, np.int32),
        segment_lengths=np.array(lengths + [padding] * (padding > 0), np.int32),
        sources=tuple(SampleSource(0, index, index) for index in range(len(samples))),
        images=tuple(images),
        image_starts=np.array(image_starts, np.int32),
        tile_starts=np.array(tile_starts, np.int32),
    )
