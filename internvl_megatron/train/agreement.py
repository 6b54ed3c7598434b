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
    """Tokens that carry loss."""
    num_failed_images: int
    num_skipped_samples: int
    """Samples all leaders have left out since the run began."""
    attention_pairs: int
    """Sum over all samples of length squared: what the quadratic part of attention costs."""
    stop_requested: bool
    """Some rank was asked to stop after this step."""


def agree(
    batch: StepRows, groups: Groups, tiles_per_row: int, num_skipped_samples: int = 0, stop_requested: bool = False
) -> StepAgreement:
    """Exchange what all ranks must know of each other; collective.

    Args:
        batch: this replica's rows and this rank's tiles.
        groups: process groups.
        tiles_per_row: tile budget of a row; numbers tiles in a way that does not depend on the layout.
        num_skipped_samples: samples this replica's leader has left out; 0 on the other ranks.
        stop_requested: this rank was asked to stop after the step. One rank is enough for all to stop.
    """
    own = _agree_in_replica(batch, groups, num_skipped_samples, stop_requested)
    rows = own.rows
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
        own.num_failed_images,
        own.num_skipped_samples,
        sum(int((row.segment_lengths[: row.num_samples].astype(np.int64) ** 2).sum()) for row in rows),
        int(own.stop_requested),
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
        num_skipped_samples=sums[4],
        attention_pairs=sums[5],
        stop_requested=sums[6] > 0,
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


@dataclass(frozen=True)
class _ReplicaAgreement:
    """What the ranks of one replica know together."""

    rows: list[Row]
    """Without loss on samples with an image that some rank failed to decode."""
    num_failed_images: int
    num_skipped_samples: int
    stop_requested: bool


def _agree_in_replica(
    batch: StepRows, groups: Groups, num_skipped_samples: int, stop_requested: bool
) -> _ReplicaAgreement:
    """Put together what each rank of the replica may know alone: broken images, skipped samples, a request to stop."""
    first = np.concatenate([[0], np.cumsum([len(row.images) for row in batch.rows])])
    known = torch.zeros(2 + int(first[-1]), dtype=torch.int64)
    known[0], known[1] = int(stop_requested), num_skipped_samples
    for row, image in batch.tiles().failed:
        known[2 + int(first[row]) + image] = 1
    dist.all_reduce(known, op=dist.ReduceOp.MAX, group=groups.host_replica)
    failed = known[2:].numpy()
    rows = [
        row.without_samples_of_images(set(np.flatnonzero(failed[first[index] : first[index + 1]]).tolist()))
        for index, row in enumerate(batch.rows)
    ]
    return _ReplicaAgreement(rows, int(failed.sum()), int(known[1]), bool(known[0]))


def _image_of_tiles(row: Row) -> list[int]:
    return [image for image, reference in enumerate(row.images) for _ in range(reference.num_tiles)]


def _table(replicas: list[np.ndarray]) -> TileTable:
    parts = [values.reshape(-1, _COLUMNS) for values in replicas]
    row, start, decoder, number = np.concatenate(parts).T
    replica = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return TileTable(replica=replica, row=row, start=start, decoder=decoder, number=number)
