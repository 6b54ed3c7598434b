"""Which rank encodes which tile, and when, so that encoding fills the pauses of the language model's pipeline ("bubbles").

Under 1F1B (Megatron Core's schedule, not interleaved) stage s of P waits

    s forward passes before its first one,
    P - 1 - s backward passes before its first one, after it has run P - s rows forward,
    one forward pass before each of its last P - 1 - s backward passes, and
    s backward passes after its last one,

P - 1 passes of each kind in all, whatever the stage. Tiles cost the same on every rank, and every rank still encodes as many
as the others: what the plan chooses is which. Late stages take tiles of the first rows and encode them before their
pipeline begins; early stages take tiles of later rows and encode them while they wait for their first gradient. Tiles of
the row that comes first are needed before anything else can begin, gradients of the last row come back when all else is
over; those two rows, the cheapest of their replica, are shared out over all ranks.

No rank waits for ever: all ranks run the first chunk before any pipeline begins, the first P rows are encoded by then, and until a stage encodes again, no more than
P - s rows have passed it. Gradients are waited for in the order of rows, those of rows only that have left the pipeline by
then (`_last_row_back`).

Letters: P stages, M rows of a replica, R replicas, C chunks. A row's *slot* is its place in the order in which its
replica's pipeline takes rows.
"""

from dataclasses import dataclass

import numpy as np

from internvl_megatron.config.schema import ParallelConfig
from internvl_megatron.parallel.layout import Layout, VisionLayout
from internvl_megatron.parallel.tile_plan import TilePlan, TileTable, number_among_equals, share_out

BACKWARD_PASSES = 2
"""A backward pass takes as long as so many forward passes."""


@dataclass(frozen=True)
class BubblePlan(TilePlan):
    """A plan whose chunks have a time as well: ascending numbers go through the slots of the pipeline."""

    order: np.ndarray
    """int64 [R, M]: rows of every replica in the order of its pipeline."""
    slot_of_chunk: np.ndarray
    """int64 [C], ascending: the slot of the rows a chunk's tiles are from."""
    chunks_ahead: np.ndarray
    """int64 [P]: so many chunks, from the first, are encoded before a stage's pipeline begins; the others while it waits for
    its first gradient."""
    chunks_back: np.ndarray
    """int64 [P, M]: so many chunks have run backward when a stage waits for the gradient of a slot."""

    def chunks_of(self, slot: int) -> range:
        """Chunks with tiles of the rows in a slot."""
        first, end = np.searchsorted(self.slot_of_chunk, [slot, slot + 1]).tolist()
        return range(first, end)

    def runs(self, unit: int, chunk: int) -> bool:
        """Whether a unit runs a chunk: if it has a tile in it, or if every rank does.

        Megatron Core gathers parameters in the first pass of a step and reduces gradients in the last, so no rank may leave
        those out.
        """
        return chunk in (0, self.num_chunks - 1) or len(self.tiles_of(unit, chunk)) > 0


def settings_against_filling(parallel: ParallelConfig) -> list[str]:
    """Settings that keep the encoder's work out of the pauses, as one would write them."""
    against = {
        "vision_in_bubbles=false": not parallel.vision_in_bubbles,
        # Its ranks gather layers together, and pauses of stages come at different times.
        "vision_sharding=sharded": parallel.vision_sharding == "sharded",
        # What pauses has all rows of a step under way.
        f"vision_window_rows={parallel.vision_window_rows}": parallel.vision_window_rows is not None,
        # Other lengths would be asked for before the gradient.
        "pad_rows=false": not parallel.pad_rows,
    }
    return [f"parallel.{setting}" for setting, holds in against.items() if holds]


def layout_against_filling(layout: VisionLayout, num_rows: int) -> list[str]:
    """Why there are no pauses that this plan knows how to fill: it needs one pipeline pass per stage and row, more rows than stages,
    and units that pause as one."""
    language = layout.language
    ranks = layout.exchange_replicas * language.stage_size
    against = {
        f"parallel.virtual_size={language.virtual_size}": language.virtual_size > 1,
        "parallel.pipeline_size=1": language.pipeline_size == 1,
        f"no more rows of a replica ({num_rows}) than stages": 1 < language.pipeline_size >= num_rows,
        f"parallel.vision_tensor_size={layout.tensor_size}": ranks % layout.tensor_size != 0,
        "parallel.vision_placement=first_stage": layout.first_stage_only,
    }
    return [reason for reason, holds in against.items() if holds]


def can_fill_bubbles(layout: VisionLayout, num_rows: int) -> bool:
    """Whether there are pauses that this plan knows how to fill."""
    return not layout_against_filling(layout, num_rows)


def plan_bubbles(table: TileTable, layout: VisionLayout, chunk_tiles: int, row_tiles: np.ndarray) -> BubblePlan:
    """Share the tiles of a step out over ranks and pauses.

    Args:
        table: tiles of all replicas, of all rows of a step.
        layout: units and exchange groups; see `can_fill_bubbles`.
        chunk_tiles: most tiles a unit encodes at a time.
        row_tiles: [R, M], how long one stage takes for the forward pass of each row: in tiles a unit encodes in this time.
    """
    language = layout.language
    num_stages, num_rows = language.pipeline_size, row_tiles.shape[1]
    order = _order_of_rows(table, row_tiles, language)
    slot_of_row = np.argsort(order, axis=1)
    slot = slot_of_row[table.replica, table.row]
    encoder = np.empty(len(table), dtype=np.int64)
    group_of_tile, size = table.replica // layout.exchange_replicas, layout.units_per_group
    unit_of_rank = np.array([-1 if unit is None else unit for unit in layout.unit_of_rank])
    home = np.array([language.replica(unit[0]) for unit in layout.units])
    for group in range(layout.num_groups):
        first = group * size
        mine = group_of_tile == group
        tiles_of_slot = np.bincount(slot[mine], minlength=num_rows)
        quotas = _quotas(_shares_of_stages(tiles_of_slot, size // num_stages, num_stages), size // num_stages)
        for number in np.flatnonzero(tiles_of_slot).tolist():
            tiles = np.flatnonzero(mine & (slot == number))
            holder = unit_of_rank[table.decoder[tiles]] - first
            encoder[tiles] = first + share_out(
                holder, table.replica[tiles], home[first : first + size], quotas[number]
            )
    place = number_among_equals(encoder * num_rows + slot) // chunk_tiles  # of the unit's chunks in a slot
    chunks_of_slot = np.zeros(num_rows, dtype=np.int64)
    np.maximum.at(chunks_of_slot, slot, place + 1)
    first_chunk = np.cumsum(chunks_of_slot) - chunks_of_slot
    chunk = first_chunk[slot] + place
    slot_of_chunk = np.repeat(np.arange(num_rows), chunks_of_slot)
    stage_of_unit = np.array([language.stage(unit[0]) for unit in layout.units])
    most = _most_tiles(encoder, chunk, stage_of_unit, num_stages, len(slot_of_chunk))
    pass_tiles = float(row_tiles.mean())
    return BubblePlan(
        table=table,
        encoder=encoder,
        chunk=chunk,
        num_chunks=len(slot_of_chunk),
        order=order,
        slot_of_chunk=slot_of_chunk,
        chunks_ahead=_chunks_ahead(most, slot_of_chunk, pass_tiles),
        chunks_back=_chunks_back(most, slot_of_chunk, pass_tiles, num_rows),
    )


def _order_of_rows(table: TileTable, row_tiles: np.ndarray, layout: Layout) -> np.ndarray:
    """Rows of every replica, int64 [R, M]: the cheapest last, the second cheapest first, the others from dear to cheap.

    Nothing hides what the ends of a pipeline cost: P - 1 passes of the first row and of the last, and their tiles. A backward
    pass costs more than a forward pass, so the cheapest row is the last.
    """
    ranks = layout.pipeline_size * layout.stage_size
    order = []
    for replica, passes in enumerate(row_tiles):
        tiles = np.bincount(table.row[table.replica == replica], minlength=len(passes))
        cost = (layout.pipeline_size - 1) * passes + tiles / ranks
        last, first = np.argsort(cost, kind="stable")[:2].tolist()
        between = [row for row in np.argsort(-passes, kind="stable").tolist() if row not in (first, last)]
        order.append([first, *between, last])
    return np.array(order, dtype=np.int64)


def _shares_of_stages(tiles: np.ndarray, units: int, num_stages: int) -> np.ndarray:
    """Tiles of every slot that each stage encodes, int64 [P, M].

    Args:
        tiles: int64 [M], tiles of an exchange group in every slot.
        units: of the group on a stage.
        num_stages: P.
    """
    num_rows, stages = len(tiles), np.arange(num_stages)
    base, surplus = divmod(int(tiles.sum()), units * num_stages)
    left = units * base + (surplus + stages) // num_stages
    shares, open_tiles = np.zeros((num_stages, num_rows), dtype=np.int64), tiles.copy()
    for slot in (0, num_rows - 1):
        shares[:, slot] = np.minimum((open_tiles[slot] + stages) // num_stages, left)
        left -= shares[:, slot]
        open_tiles[slot] -= shares[:, slot].sum()
    # Early stages can do nothing before the pipeline reaches slot P, and have most time for the first slots after it.
    for slot in [*range(num_stages, num_rows - 1), *range(1, num_stages), 0, num_rows - 1]:
        for stage in range(num_stages):
            taken = min(int(left[stage]), int(open_tiles[slot]))
            shares[stage, slot] += taken
            left[stage] -= taken
            open_tiles[slot] -= taken
    return shares


def _quotas(shares: np.ndarray, units: int) -> np.ndarray:
    """Tiles of every slot for each unit of an exchange group, int64 [M, P * units]; the units of a stage take turns."""
    ends = np.cumsum(shares, axis=1)[:, :, None]  # [P, M, 1]
    starts = ends - shares[:, :, None]
    turn = np.arange(units)

    def before(count: np.ndarray) -> np.ndarray:
        """Of so many tiles dealt out in turn, how many each unit has."""
        return (count - turn + units - 1) // units

    return (before(ends) - before(starts)).transpose(1, 0, 2).reshape(shares.shape[1], -1)


def _most_tiles(
    encoder: np.ndarray, chunk: np.ndarray, stage_of_unit: np.ndarray, num_stages: int, num_chunks: int
) -> np.ndarray:
    """Tiles of every chunk on the busiest unit of each stage, int64 [P, C]."""
    counts = np.zeros((len(stage_of_unit), num_chunks), dtype=np.int64)
    np.add.at(counts, (encoder, chunk), 1)
    return np.array([counts[stage_of_unit == stage].max(axis=0, initial=0) for stage in range(num_stages)])


def _chunks_ahead(most_tiles: np.ndarray, slot_of_chunk: np.ndarray, pass_tiles: float) -> np.ndarray:
    """Chunks each stage encodes ahead, int64 [P]: of the first P slots, what fits into its wait for the first row, and what
    does not fit into its wait for the first gradient.

    The first chunk is encoded ahead wherever its tiles are from: all ranks gather parameters in it, and one that waited in
    it for another whose pipeline has begun would keep that pipeline waiting.
    """
    num_stages = len(most_tiles)
    needed = max(1, int(np.searchsorted(slot_of_chunk, num_stages)))
    stages, tiles = np.arange(num_stages), np.cumsum(most_tiles, axis=1)
    fitting = (tiles <= stages[:, None] * pass_tiles).sum(axis=1)
    later = (num_stages - 1 - stages) * BACKWARD_PASSES * pass_tiles
    too_many = (tiles[:, -1:] - tiles + most_tiles / 2 > later[:, None]).sum(axis=1)  # to the nearest chunk
    ahead = np.maximum.reduce([np.full(num_stages, needed), fitting, too_many])
    ahead[-1] = len(slot_of_chunk)  # it does not wait for its first gradient
    return ahead


def _chunks_back(most_tiles: np.ndarray, slot_of_chunk: np.ndarray, pass_tiles: float, num_rows: int) -> np.ndarray:
    """Chunks that have run backward when a stage waits for each slot's gradient, int64 [P, M]; never the last one."""
    num_stages, num_chunks = most_tiles.shape
    back = np.zeros((num_stages, num_rows), dtype=np.int64)
    for stage in range(num_stages):
        done, wait_tiles = 0, pass_tiles / BACKWARD_PASSES
        for slot in range(num_rows - (num_stages - 1 - stage), num_rows):
            end = int(np.searchsorted(slot_of_chunk, _last_row_back(stage, slot), side="right"))
            time = 0
            while done < min(end, num_chunks - 1) and time + most_tiles[stage, done] / 2 <= wait_tiles:
                time += most_tiles[stage, done]
                done += 1
            back[stage, slot] = done
    return back


def _last_row_back(stage: int, slot: int) -> int:
    """The last slot whose gradients have left the pipeline when a stage waits for those of `slot`."""
    return slot - 1 - stage
