"""What all replicas must agree on before a step: every tile, every loss weight, every broken image.

All of it is host data, so the global loss weight is known before the first forward pass and nothing has to be read back
from a device or rescaled after backward.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from internvl_megatron.config.plan import cut_multiple
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.data.positions import STRIDES
from internvl_megatron.data.row_cost import RowCost
from internvl_megatron.data.rows import Row
from internvl_megatron.data.step_rows import ImageKey, StepRows
from internvl_megatron.errors import DataError
from internvl_megatron.parallel.groups import Groups
from internvl_megatron.parallel.host import gather_integers
from internvl_megatron.parallel.layout import Layout
from internvl_megatron.parallel.tile_plan import TileTable

_COLUMNS = 7  # row, row_tokens, span_start, span_tokens, start, decoder, number
_SECOND_COLUMNS = 3  # start, span_start, span_tokens
_COUNTS = 7 + len(STRIDES)  # data sets, tokens, samples, supervised tokens, failed images, stops, pairs; strides


@dataclass(frozen=True)
class StepAgreement:
    """One step as every rank sees it."""

    rows: list[Row]
    """This replica's rows, without loss on samples whose image could not be decoded."""
    table: TileTable
    """Tiles of all replicas."""
    row_weights: np.ndarray
    """fp64 [M]: loss weight of micro-batch m over all replicas."""
    row_costs: np.ndarray
    """int64 [R, M]: FLOPs of a forward pass through the language model, of micro-batch m of every replica."""
    num_tokens: int
    """Tokens of all replicas, padding not counted."""
    num_samples: int
    num_supervised_tokens: int
    """Tokens that carry loss."""
    num_failed_images: int
    attention_pairs: int
    """Sum over all samples of length squared: what the quadratic part of attention costs."""
    num_datasets: int
    """1 + the highest number of a data set that some sample is from."""
    stride_counts: np.ndarray
    """int64 [9]: images and videos whose tokens advance by each of `positions.STRIDES`."""


def agree(batch: StepRows, groups: Groups, config: RunConfig) -> StepAgreement:
    """Exchange what all ranks must know of each other; collective.

    Args:
        batch: this replica's rows and this rank's tiles.
        groups: process groups.
        config: its tile budget numbers tiles by the slots of their rows, so that numbers do not depend on the layout; rows
            keep their full length, or end with their last sample, or where the ranks that share a row need it.

    Raises:
        DataError: on all ranks, if one of them has an image that cannot be decoded and the policy is to stop; only its own
            message says which.
    """
    error: DataError | None = None
    try:
        failed = batch.tiles().failed
    except DataError as raised:  # the others must hear of it: they would wait for this rank
        error, failed = raised, {}
    rows, num_failed_images, must_stop = _agree_in_replica(batch, groups, failed, error is not None)
    multiple = cut_multiple(config, groups.layout)
    if multiple is not None:
        rows = [row.cut(multiple) for row in rows]
    replica = groups.layout.replica(groups.rank)
    message = replica_message(rows, batch, replica, groups.layout, config, num_failed_images, must_stop)
    gathered = gather_integers(message, groups.host_data)
    split = [np.split(values, _COUNTS + len(rows) * np.arange(3)) for values in gathered]
    sums = np.sum([part[0][1:] for part in split], axis=0).tolist()
    if sums[4]:
        raise error or DataError("another rank has an image that cannot be decoded; its message says which")
    return StepAgreement(
        rows=rows,
        table=_table([part[3] for part in split], config.loss.kind == "mpo"),
        row_weights=np.sum([np.ascontiguousarray(part[2]).view(np.float64) for part in split], axis=0),
        row_costs=np.array([part[1] for part in split]),
        num_tokens=sums[0],
        num_samples=sums[1],
        num_supervised_tokens=sums[2],
        num_failed_images=sums[3],
        attention_pairs=sums[5],
        num_datasets=max(int(part[0][0]) for part in split),
        stride_counts=np.array(sums[6:]),
    )


def replica_message(
    rows: list[Row],
    batch: StepRows,
    replica: int,
    layout: Layout,
    config: RunConfig,
    num_failed_images: int = 0,
    must_stop: bool = False,
) -> np.ndarray:
    """What the ranks of a replica tell those of the others, int64.

    Args:
        rows: the replica's, as they are trained on.
        batch: says who decodes their images, and their slots.
        replica: which one.
        layout: of the language model.
        config: of the run.
        num_failed_images: of the replica.
        must_stop: some rank of the replica has an image that cannot be decoded, and the policy is to stop.
    """
    ranks = layout.replica_ranks(replica)
    tiles = [
        (
            index,
            len(row.token_ids),
            *span,
            start,
            ranks[batch.image_owner[index][image]],
            batch.slots[index] * config.data.tiles_per_row + number,
            *second,
        )
        for index, row in enumerate(rows)
        for number, (start, span, image, second) in enumerate(
            zip(
                row.tile_starts.tolist(),
                _samples_of_tiles(row, row.tile_starts),
                _image_of_tiles(row),
                _second_places(row),
                strict=True,
            )
        )
    ]
    has_pairs = config.loss.kind == "mpo"
    assert all(row.has_pairs == has_pairs for row in rows), f"loss.kind={config.loss.kind}, and other rows than that"
    cost = RowCost.of_model(config.model.language, cut_multiple=None)  # what is to be cut is cut
    costs = [cost.of(row) for row in rows]
    weights = np.array([row.weights.sum(dtype=np.float64) for row in rows])
    totals = [
        sum(row.num_tokens for row in rows),
        sum(row.num_samples for row in rows),
        sum(int((row.weights > 0).sum()) for row in rows),
        num_failed_images,
        int(must_stop),
        sum(int((row.segment_lengths[: row.num_samples].astype(np.int64) ** 2).sum()) for row in rows),
        *_stride_counts(rows),
    ]
    num_datasets = 1 + max((source.dataset for row in rows for source in row.sources), default=-1)
    counts = [num_datasets, *totals]
    assert len(counts) == _COUNTS, f"{len(counts)} counts, not {_COUNTS}"
    return np.concatenate([counts, costs, weights.view(np.int64), np.array(tiles, dtype=np.int64).ravel()])


def decoded_tiles(batch: StepRows, tile_pixels: int, rows: range) -> list[np.ndarray]:
    """This rank's tiles of some rows in table order, uint8 [3, pixels, pixels] each; broken images are black."""
    decoded = batch.tiles()
    black = np.zeros((3, tile_pixels, tile_pixels), dtype=np.uint8)
    tiles: list[np.ndarray] = []
    for row in rows:
        for image, reference in enumerate(batch.rows[row].images):
            if (row, image) in decoded.tiles:
                tiles.extend(decoded.tiles[row, image])
            elif (row, image) in decoded.failed:
                tiles.extend([black] * reference.num_tiles)
    return tiles


def _agree_in_replica(
    batch: StepRows, groups: Groups, failed: Iterable[ImageKey], must_stop: bool
) -> tuple[list[Row], int, bool]:
    """Put together what each rank of the replica may know alone.

    Returns:
        Rows without loss on samples with an image that some rank failed to decode, the number of those images, and whether
        some rank must stop.
    """
    first = np.concatenate([[0], np.cumsum([len(row.images) for row in batch.rows])])
    known = torch.zeros(1 + int(first[-1]), dtype=torch.int64)
    known[0] = int(must_stop)
    for row, image in failed:
        known[1 + int(first[row]) + image] = 1
    dist.all_reduce(known, op=dist.ReduceOp.MAX, group=groups.host_replica)
    broken = known[1:].numpy()
    rows = [
        row.without_samples_of_images(set(np.flatnonzero(broken[first[index] : first[index + 1]]).tolist()))
        for index, row in enumerate(batch.rows)
    ]
    return rows, int(broken.sum()), bool(known[0])


def _stride_counts(rows: list[Row]) -> np.ndarray:
    """See `StepAgreement.stride_counts`. Behind tiles of a single token comes text, which counts as 256."""
    strides = np.concatenate([row.image_strides for row in rows])
    return np.bincount(np.searchsorted(STRIDES, strides.clip(max=STRIDES[-1])), minlength=len(STRIDES))


def _image_of_tiles(row: Row) -> list[int]:
    return [image for image, reference in enumerate(row.images) for _ in range(reference.num_tiles)]


def _samples_of_tiles(row: Row, tile_starts: np.ndarray) -> list[tuple[int, int]]:
    """First place and length of the sample that a tile starting there is in."""
    bounds = row.sample_bounds
    sample = np.searchsorted(bounds, tile_starts, side="right") - 1
    return list(zip(bounds[sample].tolist(), np.diff(bounds)[sample].tolist(), strict=True))


def _second_places(row: Row) -> list[tuple[int, ...]]:
    """The `TileTable.second` of each tile; empty where tiles have one place."""
    if not row.has_pairs:
        return [()] * row.num_tiles
    starts = row.second_tile_starts
    return [(start, *span) for start, span in zip(starts.tolist(), _samples_of_tiles(row, starts), strict=True)]


def _table(replicas: list[np.ndarray], has_pairs: bool) -> TileTable:
    parts = [values.reshape(-1, _COLUMNS + _SECOND_COLUMNS * has_pairs) for values in replicas]
    replica = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    columns = np.concatenate(parts)
    return TileTable(replica, *columns[:, :_COLUMNS].T, second=columns[:, _COLUMNS:] if has_pairs else None)
