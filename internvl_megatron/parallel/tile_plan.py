"""Which rank encodes which tile: a pure function of numbers every rank knows.

A tile costs the same wherever it comes from, so the vision encoder is data parallel over tiles: each rank of the
exchange group takes its share (most - fewest <= 1), whichever replica the tile belongs to. All ranks compute the same
plan from the same table, so none of it is communicated.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TileTable:
    """All tiles of a step over all replicas, ordered by replica, row and place in the row; int64 [n] each."""

    replica: np.ndarray
    row: np.ndarray
    """Micro-batch of the replica the tile's tokens are in."""
    start: np.ndarray
    """Place of the tile's first token in its row."""
    decoder: np.ndarray
    """Global rank that holds the tile's pixels."""
    number: np.ndarray
    """Number of the tile in the global batch that does not depend on the layout; seeds its drop path."""

    def __len__(self) -> int:
        """Number of tiles."""
        return len(self.replica)

    def select(self, chosen: np.ndarray) -> "TileTable":
        """The tiles at these indices or where this mask is true, order kept."""
        return TileTable(
            self.replica[chosen], self.row[chosen], self.start[chosen], self.decoder[chosen], self.number[chosen]
        )


@dataclass(frozen=True)
class TilePlan:
    """Assignment of the tiles of one window to the ranks that encode them."""

    table: TileTable
    encoder: np.ndarray
    """int64 [n]: global rank that encodes each tile."""
    num_chunks: int
    """Encoder passes per rank; the same on every rank, because collectives hang off them."""

    @property
    def num_tiles(self) -> int:
        """Tiles of the window over all replicas."""
        return len(self.table)

    def tiles_of(self, rank: int) -> np.ndarray:
        """Table indices of the tiles a rank encodes, ascending."""
        return np.flatnonzero(self.encoder == rank)


def plan_tiles(table: TileTable, num_ranks: int, chunk_tiles: int) -> TilePlan:
    """Share the tiles out evenly, leaving as many as possible on the rank that decoded them.

    Args:
        table: tiles of all replicas.
        num_ranks: ranks of the exchange group.
        chunk_tiles: tiles a rank encodes at a time.
    """
    held = np.bincount(table.decoder, minlength=num_ranks)
    base, surplus = divmod(len(table), num_ranks)
    quota = np.full(num_ranks, base, dtype=np.int64)
    # The ranks that hold most tiles take one more; ties go to the lower rank.
    quota[np.argsort(-held, kind="stable")[:surplus]] += 1
    encoder = np.full(len(table), -1, dtype=np.int64)
    for rank in range(num_ranks):
        encoder[np.flatnonzero(table.decoder == rank)[: quota[rank]]] = rank
    missing = quota - np.bincount(encoder[encoder >= 0], minlength=num_ranks)
    encoder[encoder < 0] = np.repeat(np.arange(num_ranks), missing)
    return TilePlan(table, encoder, num_chunks=-(-int(quota.max(initial=0)) // chunk_tiles))
