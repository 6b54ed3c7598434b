"""The critical path of a training step: how long it takes if ranks only wait for work they need, and messages take no time.

In a window of micro-batches every rank encodes its tiles, the replicas' pipelines run, every rank runs its tiles backward;
each of the three begins when the slowest rank has finished the one before. Where the first stage encodes inside the
pipeline, its passes hold that work. Durations are measured seconds or counted FLOPs.

Shapes: R ranks, D replicas, P pipeline stages, M rows (micro-batches) of a replica, "..." any further axes: cases that
have nothing to do with each other.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from internvl_megatron.config.schema import ModelConfig
from internvl_megatron.scaling.counts import BACKWARD_AND_FORWARD, layer_flops, output_layer_flops, tile_flops
from internvl_megatron.scaling.pipeline_time import one_f_one_b

Encoders = Literal["all_ranks", "first_stage"]
"""Who encodes: all ranks ahead of the pipelines (the decoupled schedule), or the first stage in its passes."""

EXACTLY_COMPARED_SPLITS = 300
"""Of all ways to divide the layers: the best for rows of average size are tried on the rows themselves."""


@dataclass(frozen=True)
class WindowWork:
    """Durations of the parts of one window."""

    encode: np.ndarray
    """[R, ...], all tiles of a rank forward, before the pipelines."""
    forward: np.ndarray
    """[P, M, D, ...], forward pass of a stage on a row; of the slowest of the ranks that share it."""
    backward: np.ndarray
    """[P, M, D, ...]."""
    backprop: np.ndarray
    """[R, ...], all tiles of a rank backward, after the pipelines."""

    @property
    def critical_path(self) -> np.ndarray:
        """Duration of the window, [...]."""
        pipelines = one_f_one_b(self.forward, self.backward).makespan
        return self.encode.max(axis=0) + pipelines.max(axis=0) + self.backprop.max(axis=0)


@dataclass(frozen=True)
class RowSizes:
    """What decides how much work rows are; int64 [M, D, ...] each."""

    tokens: np.ndarray
    """Tokens through the language model, padding included where rows are padded."""
    attention_pairs: np.ndarray
    """Sum over the samples of a row of their length squared."""
    supervised: np.ndarray
    """Tokens through the output layer."""
    tiles: np.ndarray

    def mean(self) -> "RowSizes":
        """As many rows and replicas, [M, D], all of average size."""
        shape = self.tiles.shape[:2]
        return RowSizes(**{name: np.full(shape, round(sizes.mean())) for name, sizes in vars(self).items()})


@dataclass(frozen=True)
class StepCase:
    """A model and how it is laid out; what is left open is how the layers are divided over the stages."""

    model: ModelConfig
    pipeline_size: int
    tensor_size: int
    encoders: Encoders
    vision_cost: float = 1.0
    """Time of a FLOP of the vision side over that of one of the language model, where their speeds differ."""


def counted_window(case: StepCase, rows: RowSizes, splits: np.ndarray) -> WindowWork:
    """FLOPs of the parts of a window, for several ways to divide the layers: one more axis, S, at the end.

    A backward pass is two forward passes. Tensor parallelism divides all of the language model's work. Ranks that encode
    have as many tiles as the others, up to one: of the window, or, in the first stage, of each row.

    Args:
        case: model and layout.
        rows: of the window.
        splits: int64 [P, S], layers of every stage.
    """
    model, tensor_size = case.model, case.tensor_size
    num_ranks = case.pipeline_size * tensor_size * rows.tiles.shape[1]
    tile = case.vision_cost * tile_flops(model)
    layer = layer_flops(model.language, rows.tokens, rows.attention_pairs)[..., None] / tensor_size
    forward = np.stack([layer * layers for layers in splits])
    forward[-1] += output_layer_flops(model.language, rows.supervised)[..., None] / tensor_size
    encode = np.zeros((num_ranks, *forward.shape[3:]))
    if case.encoders == "first_stage":
        forward[0] += tile * -(-rows.tiles[..., None] // tensor_size)
    else:
        tiles = rows.tiles.sum(axis=(0, 1))[..., None]
        for rank in range(num_ranks):
            encode[rank] = tile * ((tiles + rank) // num_ranks)
    again = BACKWARD_AND_FORWARD - 1
    return WindowWork(encode, forward, again * forward, again * encode)


def all_splits(num_layers: int, num_stages: int) -> np.ndarray:
    """All ways to divide layers over stages, int64 [P, S], at least one layer in each."""
    borders = np.array(list(combinations(range(1, num_layers), num_stages - 1)), dtype=np.int64)
    return np.diff(borders, axis=1, prepend=0, append=num_layers).T


def best_split(case: StepCase, rows: RowSizes) -> tuple[int, ...]:
    """Layers of every stage with the shortest critical path, on average over the cases of these rows."""
    splits = all_splits(case.model.language.num_layers, case.pipeline_size)
    rough = counted_window(case, rows.mean(), splits).critical_path
    splits = splits[:, np.argsort(rough, kind="stable")[:EXACTLY_COMPARED_SPLITS]]
    exact = counted_window(case, rows, splits).critical_path
    return tuple(splits[:, exact.reshape(-1, splits.shape[1]).mean(axis=0).argmin()].tolist())
