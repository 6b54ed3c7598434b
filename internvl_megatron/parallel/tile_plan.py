"""Which ranks encode which tile: a pure function of numbers every rank knows.

A tile costs the same wherever it comes from, so the vision encoder is data parallel over tiles: inside an exchange group
each unit of ranks takes its share (most - fewest <= 1), whichever replica the tile belongs to. All ranks compute the same
plan from the same table, so none of it is communicated.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from internvl_megatron.parallel.layout import VisionLayout


@dataclass(frozen=True)
class TileTable:
    """All tiles of a step over all replicas, ordered by replica, row and place in the row; int64 [n] each."""

    replica: np.ndarray
    row: np.ndarray
    """Micro-batch of the replica the tile's tokens are in."""
    row_tokens: np.ndarray
    """Length of that row."""
    span_start: np.ndarray
    """Place of the first token of the tile's sample in the row."""
    span_tokens: np.ndarray
    """Length of the tile's sample."""
    start: np.ndarray
    """Place of the tile's first token in its row."""
    decoder: np.ndarray
    """Global rank that holds the tile's pixels."""
    number: np.ndarray
    """Number of the tile in the global batch that does not depend on the layout; seeds its drop path."""
    second: np.ndarray | None = None
    """int64 [n, 3]: `start`, `span_start` and `span_tokens` of the other place in the row where the tile's embeddings are
    needed too; None = each is needed once."""

    def __len__(self) -> int:
        """Number of tiles."""
        return len(self.replica)

    def select(self, chosen: np.ndarray) -> "TileTable":
        """The tiles at these indices or where this mask is true, order kept."""
        columns: Any = {name: None if column is None else column[chosen] for name, column in vars(self).items()}
        return TileTable(**columns)

    def of_rows(self, rows: range) -> "TileTable":
        """The tiles of these micro-batches."""
        return self.select((self.row >= rows.start) & (self.row < rows.stop))


@dataclass(frozen=True)
class TilePlan:
    """Assignment of the tiles of one window to the units that encode them."""

    table: TileTable
    encoder: np.ndarray
    """int64 [n]: unit that encodes each tile (`VisionLayout.units`)."""
    chunk: np.ndarray
    """int64 [n]: pass in which its unit encodes each tile, from 0; its row where rows are encoded by themselves."""
    num_chunks: int
    """Encoder passes per rank; the same on every rank, because collectives hang off them."""

    @property
    def num_tiles(self) -> int:
        """Tiles of the window over all replicas."""
        return len(self.table)

    def tiles_of(self, unit: int | None, chunk: int | None = None) -> np.ndarray:
        """Table indices of the tiles a unit encodes, in one pass or in all, ascending; none for a rank that is in no unit."""
        if unit is None:
            return np.empty(0, dtype=np.int64)
        mine = self.encoder == unit
        return np.flatnonzero(mine if chunk is None else mine & (self.chunk == chunk))

    def encoded_places(self, unit: int | None, chunk: int) -> np.ndarray | None:
        """For every place of the tiles a unit encodes in a pass, in the order of `places`, which of these tiles it is, int64;
        None where every tile has one place."""
        if self.table.second is None:
            return None
        mine = self.places.tile[self.places.tiles_of(unit, chunk)]
        return np.searchsorted(self.tiles_of(unit, chunk), mine)

    @cached_property
    def places(self) -> "TilePlaces":
        """The plan of embeddings, which are sent to every place a tile has: that of tiles, if each has one."""
        table = self.table
        tile = np.arange(len(table))
        if table.second is None:
            return TilePlaces(table, self.encoder, self.chunk, self.num_chunks, tile)
        start, span_start, span_tokens = table.second.T
        columns = {name: column for name, column in vars(table).items() if name != "second"}
        other = {**columns, "start": start, "span_start": span_start, "span_tokens": span_tokens}
        both = {name: np.concatenate([column, other[name]]) for name, column in columns.items()}
        order = np.lexsort((both["start"], both["row"], both["replica"]))
        tile = np.concatenate([tile, tile])[order]
        everywhere = TileTable(**both).select(order)
        return TilePlaces(everywhere, self.encoder[tile], self.chunk[tile], self.num_chunks, tile)


@dataclass(frozen=True)
class TilePlaces(TilePlan):
    """A plan whose table lists places instead of tiles, in the same order."""

    tile: np.ndarray
    """int64 [places]: the tile at each place, by its index in the table of tiles."""


def plan_tiles(table: TileTable, layout: VisionLayout, chunk_tiles: int) -> TilePlan:
    """Share the tiles out evenly in every exchange group, leaving as many as possible with the unit that decoded them.

    Tiles that have to move go to units of their own replica first, and there to those of the first stage, which own its image
    tokens.

    Args:
        table: tiles of all replicas.
        layout: units and exchange groups.
        chunk_tiles: tiles a unit encodes at a time.
    """
    encoder = np.full(len(table), -1, dtype=np.int64)
    unit_of_rank = np.array([-1 if unit is None else unit for unit in layout.unit_of_rank])
    home = np.array([layout.language.replica(unit[0]) for unit in layout.units])
    group_of_tile = table.replica // layout.exchange_replicas
    size = layout.units_per_group
    for group in range(layout.num_groups):
        first = group * size
        tiles = np.flatnonzero(group_of_tile == group)
        holder = unit_of_rank[table.decoder[tiles]]
        # A tile may come from another group's rank only where that rank encodes nothing; then it has no holder here.
        holder = np.where(holder >= 0, holder - first, -1)
        encoder[tiles] = first + share_out(holder, table.replica[tiles], home[first : first + size])
    chunk = number_among_equals(encoder) // chunk_tiles
    return TilePlan(table, encoder, chunk, num_chunks=int(chunk.max(initial=-1)) + 1)


def plan_rows(table: TileTable, layout: VisionLayout) -> TilePlan:
    """Share the tiles of every row out by itself, for a vision encoder that runs inside the pipeline, row by row."""
    encoder = np.empty(len(table), dtype=np.int64)
    for row in np.unique(table.row):
        mine = table.row == row
        encoder[mine] = plan_tiles(table.select(mine), layout, chunk_tiles=1).encoder
    return TilePlan(table, encoder, chunk=table.row, num_chunks=0)


def share_out(
    holder: np.ndarray, replica: np.ndarray, home: np.ndarray, quota: np.ndarray | None = None
) -> np.ndarray:
    """Units [n] of one exchange group's tiles, counted from 0.

    Args:
        holder: int64 [n], unit that holds each tile, -1 for none.
        replica: int64 [n], replica of each tile.
        home: int64 [u], replica each unit belongs to; its units of the first stage come first.
        quota: int64 [u], tiles for each unit; None = equal shares.
    """
    num_units = len(home)
    if quota is None:
        held = np.bincount(holder[holder >= 0], minlength=num_units)
        base, surplus = divmod(len(holder), num_units)
        quota = np.full(num_units, base, dtype=np.int64)
        # The units that hold most tiles take one more; ties go to the first.
        quota[np.argsort(-held, kind="stable")[:surplus]] += 1
    unit = np.where(number_among_equals(holder) < quota[holder], holder, -1)
    missing = quota - np.bincount(unit[unit >= 0], minlength=num_units)
    for own in np.unique(replica[unit < 0]):
        moving = np.flatnonzero((unit < 0) & (replica == own))
        units = np.flatnonzero(home == own)
        places = np.repeat(units, missing[units])[: len(moving)]
        unit[moving[: len(places)]] = places
        missing -= np.bincount(places, minlength=num_units)
    unit[unit < 0] = np.repeat(np.arange(num_units), missing)
    return unit


def number_among_equals(values: np.ndarray) -> np.ndarray:
    """How many equal values come before each."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    result = np.empty(len(values), dtype=np.int64)
    result[order] = np.arange(len(values)) - np.searchsorted(ordered, ordered)
    return result
