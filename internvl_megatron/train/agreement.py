"""What all replicas must agree on before a step: every tile, every loss weight, every broken image.

All of it is host data, so the global loss weight is known before the first forward pass and nothing has to be read back
from a device or rescaled after backward.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from internvl_megatron.data.packing import Row
from internvl_megatron.data.step_rows import StepRows
from internvl_megatron.parallel.groups import Groups
from internvl_megatron.parallel.host import gather_integers
from internvl_megatron.parallel.tile_plan import TileTable

_COLUMNS = 4  # row, start, decoder, number


@dataclass(frozen=True)
class StepAgreement:
    """One step as every rank sees it."""

    rows: list[Row]
    """This replica's rows, without loss on samples whose image could not be decoded."""
    table: TileTable
    """Tiles of all replicas."""
    row_weights: np.ndarray
    """fp64 [M]: loss weight of micro-batch m over all replicas."""
    num_tokens: int
    """Tokens of all replicas, padding not counted."""
    num_samples: int
    num_supervised_tokens: int
    num_failed_images: int
    attention_pairs: int
    """Sum over all samples of length squared: what the quadratic part of attention costs."""
    stop_requested: bool
    """Some rank was asked to stop after this step."""


def agree(batch: StepRows, groups: Groups, tiles_per_row: int, stop_requested: bool = False) -> StepAgreement:
    """Exchange what the replicas must know of each other; collective over all ranks."""
    rows, num_failed = _without_failed_samples(batch, groups)
    layout = groups.layout
    replica = layout.replica(groups.rank)
    ranks = layout.replica_ranks(replica)
    tiles = [
        (
            index,
            start,
            ranks[batch.image_owner[index][image]],
            (index * layout.data_size + replica) * tiles_per_row + number,
        )
        for index, row in enumerate(rows)
        for number, (start, image) in enumerate(zip(row.tile_starts.tolist(), _image_of_tiles(row), strict=True))
    ]
    weights = np.array([row.weights.sum(dtype=np.float64) for row in rows])
    totals = [
        sum(row.num_tokens for row in rows),
        sum(row.num_samples for row in rows),
        sum(int((row.weights > 0).sum()) for row in rows),
        num_failed,
        sum(int((row.segment_lengths[: row.num_samples].astype(np.int64) ** 2).sum()) for row in rows),
        int(stop_requested),
    ]
    message = np.concatenate([totals, weights.view(np.int64), np.array(tiles, dtype=np.int64).ravel()])
    gathered = gather_integers(message, groups.host_data)
    split = [np.split(values, [len(totals), len(totals) + len(rows)]) for values in gathered]
    sums = np.sum([part[0] for part in split], axis=0).tolist()
    return StepAgreement(
        rows=rows,
        table=_table([part[2] for part in split]),
        row_weights=np.sum([np.ascontiguousarray(part[1]).view(np.float64) for part in split], axis=0),
        num_tokens=sums[0],
        num_samples=sums[1],
        num_supervised_tokens=sums[2],
        num_failed_images=sums[3],
        attention_pairs=sums[4],
        stop_requested=sums[5] > 0,
    )


def decoded_tiles(batch: StepRows, tile_pixels: int, rows: range) -> np.ndarray:
    """This rank's tiles of some rows in table order, uint8 [t, 3, pixels, pixels]; broken images are black."""
    decoded = batch.tiles()
    parts: list[np.ndarray] = [np.empty((0, 3, tile_pixels, tile_pixels), dtype=np.uint8)]
    for row in rows:
        for image, reference in enumerate(batch.rows[row].images):
            if (row, image) in decoded.tiles:
                parts.append(decoded.tiles[row, image])
            elif (row, image) in decoded.failed:
                parts.append(np.zeros((reference.num_tiles, 3, tile_pixels, tile_pixels), dtype=np.uint8))
    return np.concatenate(parts)


def _without_failed_samples(batch: StepRows, groups: Groups) -> tuple[list[Row], int]:
    """Rows without loss on samples with an image that any rank of the replica failed to decode, and how many."""
    counts = [len(row.images) for row in batch.rows]
    first = np.concatenate([[0], np.cumsum(counts)])
    flags = torch.zeros(int(first[-1]), dtype=torch.uint8)
    for row, image in batch.tiles().failed:
        flags[int(first[row]) + image] = 1
    if len(flags):
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=groups.host_replica)
    failed = flags.numpy()
    rows = [
        row.without_samples_of_images(set(np.flatnonzero(failed[first[index] : first[index + 1]]).tolist()))
        for index, row in enumerate(batch.rows)
    ]
    return rows, int(failed.sum())


def _image_of_tiles(row: Row) -> list[int]:
    return [image for image, reference in enumerate(row.images) for _ in range(reference.num_tiles)]


def _table(replicas: list[np.ndarray]) -> TileTable:
    parts = [values.reshape(-1, _COLUMNS) for values in replicas]
    row, start, decoder, number = np.concatenate(parts).T
    replica = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return TileTable(replica=replica, row=row, start=start, decoder=decoder, number=number)
