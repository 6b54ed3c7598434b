"""The critical path of a training step: how long it takes if ranks only wait for work they need, and messages take no time.

Three schedules. With phases apart every rank encodes its tiles, the replicas' pipelines run, every rank runs its tiles
backward; each of the three begins when the slowest rank has finished the one before. In bubbles, a `BubblePlan` says who
encodes what and when, and `bubble_time` what comes of it. Where the first stage encodes inside the pipeline, its passes hold
that work. Durations are measured seconds or counted FLOPs.

Shapes: R ranks, D replicas, P pipeline stages, M rows (micro-batches) of a replica, "..." any further axes: cases that
have nothing to do with each other.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from internvl_megatron.config.schema import ModelConfig, ParallelConfig
from internvl_megatron.parallel.bubble_plan import BubblePlan, can_fill_bubbles, plan_bubbles
from internvl_megatron.parallel.layout import Layout, VisionLayout
from internvl_megatron.parallel.tile_plan import TileTable
from internvl_megatron.scaling.bubble_time import BubbleWork
from internvl_megatron.scaling.counts import BACKWARD_AND_FORWARD, layer_flops, output_layer_flops, tile_flops
from internvl_megatron.scaling.pipeline_time import one_f_one_b

Encoders = Literal["in_bubbles", "phases_apart", "first_stage"]
"""Who encodes, and when: all ranks (the decoupled schedule), in the pauses of the pipelines or before and after them; or
the first stage in its passes."""

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

    @property
    def least(self) -> np.ndarray:
        """What the critical path cannot be below, [...]: with nothing to fill, it is what it is."""
        return self.critical_path

    def steps(self) -> "list[WindowWork]":
        """Each of the steps by itself, [..., S], where the further axes are [..., steps, S]."""
        num_steps = self.forward.shape[3]
        return [WindowWork(*(part[..., step, :] for part in vars(self).values())) for step in range(num_steps)]


@dataclass(frozen=True)
class RowSizes:
    """What decides how much work rows are; int64 [M, D, steps] each."""

    tokens: np.ndarray
    """Tokens through the language model, padding included where rows are padded."""
    attention_pairs: np.ndarray
    """Sum over the samples of a row of their length squared."""
    supervised: np.ndarray
    """Tokens through the output layer."""
    tiles: np.ndarray

    def mean(self) -> "RowSizes":
        """One step of as many rows and replicas, [M, D, 1], all of average size."""
        shape = (*self.tiles.shape[:2], 1)
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
    chunk_tiles: int = ParallelConfig.vision_chunk_tiles
    """Most tiles a rank encodes at a time."""


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


def plan_of_step(case: StepCase, tiles: np.ndarray, row_tiles: np.ndarray) -> BubblePlan | None:
    """The trainer's plan of a step; None where it keeps the phases apart: no tiles, or no pauses it can fill.

    Args:
        case: model and layout; all replicas exchange tiles.
        tiles: int64 [M, D], tiles of the rows.
        row_tiles: [M, D], how long one stage takes for the forward pass of each row: in tiles a rank encodes in this time.
    """
    num_rows, num_replicas = tiles.shape
    language = Layout(case.tensor_size, case.pipeline_size, num_replicas)
    layout = VisionLayout(language, exchange_replicas=num_replicas)
    if not tiles.any() or not can_fill_bubbles(layout, num_rows):
        return None
    replica, row = np.divmod(np.repeat(np.arange(tiles.size), tiles.T.ravel()), num_rows)
    # Who holds a tile decides which of equally busy ranks encodes it, its place where its tokens go: no time depends on them.
    holder = np.array([language.replica_ranks(number)[0] for number in range(num_replicas)])[replica]
    nowhere = np.zeros_like(row)
    table = TileTable(replica, row, nowhere, nowhere, nowhere, nowhere, holder, nowhere)
    return plan_bubbles(table, layout, case.chunk_tiles, row_tiles.T)


def counted_steps(case: StepCase, rows: RowSizes, splits: np.ndarray) -> list[WindowWork | BubbleWork]:
    """FLOPs of the parts of some steps of the trainer, one after the other, where encoding fills bubbles.

    Args:
        case: model and layout.
        rows: of the steps, [M, D, steps].
        splits: as in `counted_window`.
    """
    window = counted_window(case, rows, splits)
    row_tiles = window.forward[..., 0].sum(axis=0) / (case.pipeline_size * tile_flops(case.model))
    steps: list[WindowWork | BubbleWork] = []
    for step, work in enumerate(window.steps()):
        plan = plan_of_step(case, rows.tiles[..., step], row_tiles[..., step])
        steps.append(work if plan is None else _in_bubbles(case, work, plan))
    return steps


def _in_bubbles(case: StepCase, work: WindowWork, plan: BubblePlan) -> BubbleWork:
    num_replicas = work.forward.shape[2]
    counts = np.zeros((case.pipeline_size * num_replicas * case.tensor_size, plan.num_chunks))
    np.add.at(counts, (plan.encoder, plan.chunk), 1)
    # These every rank runs, on a dummy tile if it has none.
    counts[:, [0, -1]] = np.maximum(counts[:, [0, -1]], 1)
    encode = case.vision_cost * tile_flops(case.model) * by_stage(counts, case.pipeline_size, case.tensor_size)
    return BubbleWork(
        plan=plan,
        forward=in_slots(work.forward, plan),
        backward=in_slots(work.backward, plan),
        encode=encode[..., None],
        backprop=(BACKWARD_AND_FORWARD - 1) * encode[..., None],
    )


def in_slots(passes: np.ndarray, plan: BubblePlan) -> np.ndarray:
    """Durations [P, M, D, ...] by row, put in the order of the pipelines."""
    return passes[:, plan.order.T, np.arange(len(plan.order))]


def by_stage(values: np.ndarray, pipeline_size: int, tensor_size: int) -> np.ndarray:
    """Values of chunks on every rank, [R, C], as [P, C, D, T]: by stage, replica and rank of a tensor-parallel group."""
    return values.reshape(pipeline_size, -1, tensor_size, values.shape[1]).transpose(0, 3, 1, 2)


def critical_paths(case: StepCase, rows: RowSizes, splits: np.ndarray) -> np.ndarray:
    """Duration of each of some steps, [steps, S], in FLOPs one after the other; arguments as in `counted_steps`."""
    if case.encoders == "in_bubbles":
        return np.stack([work.critical_path for work in counted_steps(case, rows, splits)])
    return counted_window(case, rows, splits).critical_path


def all_splits(num_layers: int, num_stages: int) -> np.ndarray:
    """All ways to divide layers over stages, int64 [P, S], at least one layer in each."""
    borders = np.array(list(combinations(range(1, num_layers), num_stages - 1)), dtype=np.int64)
    return np.diff(borders, axis=1, prepend=0, append=num_layers).T


def best_split(case: StepCase, rows: RowSizes) -> tuple[int, ...]:
    """Layers of every stage with the shortest critical path, on average over the steps of these rows."""
    splits = all_splits(case.model.language.num_layers, case.pipeline_size)
    rough = critical_paths(case, rows.mean(), splits).mean(axis=0)
    splits = splits[:, np.argsort(rough, kind="stable")[:EXACTLY_COMPARED_SPLITS]]
    exact = critical_paths(case, rows, splits)
    return tuple(splits[:, exact.mean(axis=0).argmin()].tolist())
