"""Run a piece of the trainer on several ranks of this machine."""

from dataclasses import replace

import numpy as np

from internvl_megatron.config.schema import DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from internvl_megatron.data.images import ImageRef
from internvl_megatron.data.packing import Row, SampleSource


def run_config(model: ModelConfig, **changes: object) -> RunConfig:
    """A configuration for tests: fp32 on the CPU, SGD, rows of 64 tokens."""
    base = RunConfig(
        name="test",
        model=model,
        data=DataConfig(tokens_per_row=64, tiles_per_row=8),
        optimizer=OptimizerConfig(name="sgd", learning_rate=0.1, weight_decay=0.0, warmup_ratio=0.0, clip_grad_norm=1.0),
        dtype="fp32",
        device="cpu",
        num_steps=5,
        rows_per_step=4,
    )
    return replace(base, **changes)  # pyright: ignore[reportArgumentType]


def parallel(tensor: int = 1, pipeline: int = 1, sequence: bool = False, **changes: object) -> ParallelConfig:
    """Short for a layout."""
    return ParallelConfig(
        tensor_size=tensor, pipeline_size=pipeline, sequence_parallel=sequence, vision_chunk_tiles=2, **changes
    )  # pyright: ignore[reportArgumentType]


class MemoryRows:
    """Stands in for `StepRows` with tiles from memory instead of image files."""

    def __init__(self, rows: list[Row], tiles: dict[tuple[int, int], np.ndarray], rank: int, replica_size: int) -> None:
        from internvl_megatron.data.step_rows import DecodedTiles, assign_images

        self.rows = rows
        self.image_owner = assign_images(rows, replica_size)
        owned = {key: value for key, value in tiles.items() if self.image_owner[key[0]][key[1]] == rank}
        self._decoded = DecodedTiles(owned)

    def tiles(self) -> object:
        """This rank's tiles."""
        return self._decoded


def random_rows(
    model: ModelConfig, num_rows: int, seed: int, tokens_per_row: int = 64, with_images: bool = True
) -> tuple[list[Row], dict[tuple[int, int], np.ndarray]]:
    """Packed rows of random samples with fractional positions and square weights, and their tiles.

    Rows differ in what they hold: text only, one image, several images of several tiles, padding or none.
    """
    from tests.support.models import IMAGE_TOKEN

    rng = np.random.default_rng(seed)
    per_tile, pixels = model.vision.tokens_per_tile, model.vision.tile_pixels
    rows, tiles = [], {}
    for row in range(num_rows):
        token_ids, targets = np.zeros(tokens_per_row, np.int32), np.full(tokens_per_row, -100, np.int32)
        weights, positions = np.zeros(tokens_per_row, np.float32), np.zeros(tokens_per_row, np.int32)
        lengths, images, starts, tile_starts, at = [], [], [], [], 0
        while at < tokens_per_row - 12:
            room = tokens_per_row - at
            counts = rng.integers(1, 3, size=rng.integers(0, 3)).tolist() if with_images and row % 4 != 3 else []
            while sum(counts) * per_tile + 6 > room:
                counts.pop()
            text = int(rng.integers(6, min(16, room - sum(counts) * per_tile) + 1))
            ids = rng.integers(8, model.language.vocab_size, size=text).tolist()
            steps = [256] * text
            for count in counts:
                place = int(rng.integers(1, 3))
                starts.append(at + place)
                tile_starts += [at + place + per_tile * tile for tile in range(count)]
                ids[place:place] = [IMAGE_TOKEN] * (per_tile * count)
                steps[place:place] = [int(rng.choice([256, 64, 16]))] * (per_tile * count)
                # later images of the sample come in front of this one: keep the list in order of tokens
                images.append(ImageRef(path=f"{row}/{len(images)}", grid=(count, 1), num_tiles=count, jpeg_seed=None))
                if len(counts) > 1:
                    break
            length = len(ids)
            span = slice(at, at + length)
            token_ids[span] = ids
            positions[span] = np.cumsum([0, *steps[:-1]])
            answer = int(rng.integers(2, 5))
            targets[at + length - 1 - answer : at + length - 1] = ids[length - answer :]
            weights[at + length - 1 - answer : at + length - 1] = answer**-0.5
            lengths.append(length)
            at += length
        if at < tokens_per_row:
            lengths.append(tokens_per_row - at)
        for index, image in enumerate(images):
            tiles[row, index] = rng.integers(0, 256, (image.num_tiles, 3, pixels, pixels), dtype=np.uint8)
        num_samples = len(lengths) - (at < tokens_per_row)
        rows.append(
            Row(
                token_ids=token_ids,
                targets=targets,
                weights=weights,
                positions=positions,
                segment_lengths=np.array(lengths, np.int32),
                sources=tuple(SampleSource(0, index, index) for index in range(num_samples)),
                images=tuple(images),
                image_starts=np.array(starts, np.int32),
                tile_starts=np.array(tile_starts, np.int32),
            )
        )
    return rows, tiles
