"""Small copies of drawn rows (`scaling/drawn_rows.py`), for narrow models, and random pixels for their images.

A small copy has the same tiles in the same places, each with fewer tokens, and less text in proportion. Pixels and words are random.
"""

import numpy as np

from internvl_megatron.config.schema import ModelConfig
from internvl_megatron.data.images import ImageRef
from internvl_megatron.data.rows import Row, SampleSource
from internvl_megatron.data.step_rows import DecodedTiles, assign_images
from internvl_megatron.scaling.drawn_rows import TILE_TOKENS, PackedRow


def small_row(samples: PackedRow, model: ModelConfig, tokens_per_row: int, seed: int) -> Row:
    """A row for a model with fewer tokens per tile; text shrinks alike, and text that shrinks to nothing is left out.

    Args:
        samples: sizes at 256 tokens a tile.
        model: of the small copy.
        tokens_per_row: at 256 tokens a tile; the copy is padded to what it is in proportion.
        seed: of words.
    """
    tile_tokens = model.vision.tokens_per_tile
    factor = TILE_TOKENS // tile_tokens
    rng = np.random.default_rng(seed)
    length = tokens_per_row // factor
    token_ids = rng.integers(0, model.language.vocab_size, length, dtype=np.int32)
    targets = np.full(length, -100, np.int32)
    positions = np.zeros(length, np.int32)
    ends, image_starts, tile_starts, images = [0], [], [], []

    def shrunk(tokens: int) -> int:
        """To the nearest: a place some whole tiles later stays as many whole tiles later."""
        return (tokens + factor // 2) // factor

    at = 0
    for sample in samples:
        start, end = ends[-1], shrunk(at + sample.num_tokens)
        most_supervised = end - start - 1
        if sample.num_tiles:
            first = shrunk(at + sample.num_tokens_before_image)
            most_supervised = end - first - sample.num_tiles * tile_tokens
            image_starts.append(first)
            tile_starts += [first + tile * tile_tokens for tile in range(sample.num_tiles)]
            images.append(ImageRef(f"image {len(images)}", (sample.num_tiles, 1), sample.num_tiles, None))
        at += sample.num_tokens
        if end == start:
            continue
        positions[start:end] = np.arange(end - start) * 256
        supervised = min(shrunk(sample.num_supervised_tokens), most_supervised)
        targets[end - 1 - supervised : end - 1] = token_ids[end - supervised : end]
        ends.append(end)
    padding = [length - ends[-1]] if ends[-1] < length else []
    return Row(
        token_ids=token_ids,
        targets=targets,
        weights=(targets >= 0).astype(np.float32),
        positions=positions,
        segment_lengths=np.array([*np.diff(ends), *padding], np.int32),
        sources=tuple(SampleSource(0, index, index) for index in range(len(ends) - 1)),
        images=tuple(images),
        image_starts=np.array(image_starts, np.int32),
        tile_starts=np.array(tile_starts, np.int32),
    )


class RandomPixels:
    """Rows of one step of one replica with random pixels; has what `Step` asks of `StepRows`."""

    def __init__(self, rows: list[Row], model: ModelConfig, rank_in_replica: int, replica_size: int) -> None:
        self.rows = rows
        self.slots = list(range(len(rows)))
        self.image_owner = assign_images(rows, replica_size)
        rng = np.random.default_rng(rank_in_replica)
        side = model.vision.tile_pixels
        self._tiles = DecodedTiles(
            {
                (row, image): rng.integers(0, 256, (rows[row].images[image].num_tiles, 3, side, side), dtype=np.uint8)
                for row, owners in enumerate(self.image_owner)
                for image, owner in enumerate(owners)
                if owner == rank_in_replica
            }
        )

    def tiles(self) -> DecodedTiles:
        """The tiles this rank holds."""
        return self._tiles
