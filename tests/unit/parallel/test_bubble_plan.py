"""Which rank encodes which tile, and when, in the pauses of the pipeline."""

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest

from internvl_megatron.parallel.bubble_plan import BubblePlan, can_fill_bubbles, plan_bubbles
from internvl_megatron.parallel.layout import Layout, VisionLayout
from internvl_megatron.parallel.tile_plan import TileTable

LAYOUTS = [
    VisionLayout(Layout(1, 2, 1)),
    VisionLayout(Layout(1, 4, 1)),
    VisionLayout(Layout(2, 3, 1, 2)),
    VisionLayout(Layout(1, 2, 4), exchange_replicas=4),
    VisionLayout(Layout(2, 4, 4), exchange_replicas=2),
    VisionLayout(Layout(1, 5, 2), exchange_replicas=1),
    VisionLayout(Layout(4, 2, 2), tensor_size=2, exchange_replicas=2),
]
"""With one and several exchange groups, replicas, ranks of a stage, ranks of a unit."""


def random_table(rng: np.random.Generator, layout: Layout, num_rows: int, most_tiles: int) -> TileTable:
    """Rows with any number of tiles, which any ranks of their replica decode."""
    tiles = rng.integers(0, most_tiles + 1, (layout.data_size, num_rows))
    tiles[rng.random(tiles.shape) < 0.2] = 0
    replica = np.repeat(np.arange(layout.data_size), tiles.sum(axis=1))
    row = np.concatenate([np.repeat(np.arange(num_rows), counts) for counts in tiles])
    decoder = np.array([rng.choice(layout.replica_ranks(number)) for number in replica.tolist()], dtype=np.int64)
    number, length = np.arange(len(row)), np.full(len(row), 64)
    return TileTable(replica, row, length, 0 * length, length, number, decoder, number)


def cases(vision: VisionLayout) -> Iterator[BubblePlan]:
    rng = np.random.default_rng(0)
    layout = vision.language
    for num_rows, most_tiles in product((1, 3, 8), (1, 6, 40)):
        rows = layout.pipeline_size + num_rows
        table = random_table(rng, layout, rows, most_tiles)
        row_tiles = rng.uniform(1, 30) * rng.uniform(0.5, 1.5, (layout.data_size, rows))
        yield plan_bubbles(table, vision, int(rng.integers(1, 9)), row_tiles)


def slots(plan: BubblePlan) -> np.ndarray:
    """Slot of every tile."""
    places = [
        order.tolist().index(row) for order, row in zip(plan.order[plan.table.replica], plan.table.row, strict=True)
    ]
    return np.array(places, dtype=np.int64)


def equal_rows(vision: VisionLayout, num_rows: int, tiles: int, pass_tiles: float) -> BubblePlan:
    """All rows have the same tiles and take the same time."""
    data_size = vision.language.data_size
    replica = np.repeat(np.arange(data_size), num_rows * tiles)
    row = np.tile(np.repeat(np.arange(num_rows), tiles), data_size)
    decoder = np.array([vision.language.replica_ranks(number)[0] for number in replica.tolist()], dtype=np.int64)
    number, length = np.arange(len(row)), np.full(len(row), 64)
    table = TileTable(replica, row, length, 0 * length, length, number, decoder, number)
    return plan_bubbles(table, vision, tiles, np.full((data_size, num_rows), pass_tiles))


@pytest.mark.parametrize("vision", LAYOUTS)
def test_every_tile_is_encoded_once_and_loads_differ_by_one_tile_at_most(vision: VisionLayout) -> None:
    for plan in cases(vision):
        tiles = np.concatenate([plan.tiles_of(unit) for unit in range(len(vision.units))])
        assert sorted(tiles.tolist()) == list(range(plan.num_tiles))
        for tile, unit in enumerate(plan.encoder.tolist()):
            group = int(plan.table.replica[tile]) // vision.exchange_replicas
            assert all(vision.group_of(rank) == group for rank in vision.units[unit])
        loads = np.bincount(plan.encoder, minlength=len(vision.units)).reshape(vision.num_groups, -1)
        assert (loads.max(axis=1) - loads.min(axis=1)).max() <= 1, loads


@pytest.mark.parametrize("vision", LAYOUTS)
def test_chunks_go_through_the_slots(vision: VisionLayout) -> None:
    for plan in cases(vision):
        assert (np.diff(plan.slot_of_chunk) >= 0).all()
        np.testing.assert_array_equal(plan.slot_of_chunk[plan.chunk], slots(plan))
        for slot in range(plan.order.shape[1]):
            assert [chunk for chunk in range(plan.num_chunks) if plan.slot_of_chunk[chunk] == slot] == list(
                plan.chunks_of(slot)
            )
        assert set(plan.chunk.tolist()) == set(range(plan.num_chunks)), "no chunk is empty everywhere"


def test_chunks_have_their_size() -> None:
    table = random_table(np.random.default_rng(1), Layout(1, 4, 1), 9, 40)
    for size in (1, 3, 100):
        plan = plan_bubbles(table, VisionLayout(Layout(1, 4, 1)), size, np.ones((1, 9)))
        counts = [len(plan.tiles_of(unit, chunk)) for unit in range(4) for chunk in range(plan.num_chunks)]
        assert max(counts) <= size
        for unit, slot in product(range(4), range(9)):
            own = [len(plan.tiles_of(unit, chunk)) for chunk in plan.chunks_of(slot)]
            full, rest = divmod(sum(own), size)
            wanted = [size] * full + [rest] * (rest > 0)
            assert own == wanted + [0] * (len(own) - len(wanted)), "full chunks, a rest, then nothing"


@pytest.mark.parametrize("vision", LAYOUTS)
def test_the_cheapest_rows_are_at_the_ends(vision: VisionLayout) -> None:
    for plan in cases(vision):
        for order in plan.order.tolist():
            assert sorted(order) == list(range(len(order)))
    tiles = [5, 0, 9, 2, 7, 7]
    table = TileTable(*np.zeros((8, sum(tiles)), dtype=np.int64))
    table = TileTable(**{**vars(table), "row": np.repeat(np.arange(6), tiles)})
    by_tiles = plan_bubbles(table, VisionLayout(Layout(1, 2, 1)), 4, np.full((1, 6), 10.0))
    assert by_tiles.order.tolist() == [[3, 0, 2, 4, 5, 1]]
    by_passes = plan_bubbles(table, VisionLayout(Layout(1, 2, 1)), 4, np.array([[10.0, 50, 30, 40, 60, 20]]))
    assert by_passes.order.tolist() == [[5, 4, 1, 3, 2, 0]]


@pytest.mark.parametrize("vision", LAYOUTS)
def test_nobody_waits_for_ever(vision: VisionLayout) -> None:
    """Play the step: a rank goes on when what it needs has been done; all of them must come to their end."""
    layout = vision.language
    num_stages = layout.pipeline_size
    for plan in cases(vision):
        num_rows = plan.order.shape[1]
        done: set[tuple[str, int, int, int]] = set()  # what, replica, stage, slot or chunk

        def needs(
            what: str, replica: int, stage: int, number: int, plan: BubblePlan = plan
        ) -> list[tuple[str, int, int, int]]:
            first = replica // vision.exchange_replicas * vision.exchange_replicas
            group = range(first, first + vision.exchange_replicas)
            if what == "forward" and stage > 0:
                return [("forward", replica, stage - 1, number)]
            if what == "forward":
                everywhere = product(group, range(num_stages), plan.chunks_of(number))
                return [("encode", other, place, chunk) for other, place, chunk in everywhere]
            if what == "backward" and stage < num_stages - 1:
                return [("backward", replica, stage + 1, number)]
            if what == "backprop":
                return [("backward", other, 0, int(plan.slot_of_chunk[number])) for other in group]
            return []

        queues = {
            (replica, stage): list(operations(plan, stage, num_stages, num_rows))
            for replica in range(layout.data_size)
            for stage in range(num_stages)
        }
        moved = True
        while moved:
            moved = False
            for (replica, stage), queue in queues.items():
                while queue and all(need in done for need in needs(queue[0][0], replica, stage, queue[0][1])):
                    if queue[0] == ("encode", 0) and not all(
                        other[0] == ("encode", 0) for other in waiting_for(queues)
                    ):
                        break  # all ranks gather parameters in it
                    what, number = queue.pop(0)
                    done.add((what, replica, stage, number))
                    moved = True
        assert not any(queues.values()), {key: queue[0] for key, queue in queues.items() if queue}


def waiting_for(queues: dict[tuple[int, int], list[tuple[str, int]]]) -> list[list[tuple[str, int]]]:
    """Queues of the ranks that have not run the first chunk yet."""
    return [queue for queue in queues.values() if ("encode", 0) in queue]


def operations(plan: BubblePlan, stage: int, num_stages: int, num_rows: int) -> Iterator[tuple[str, int]]:
    """What a stage does, in order: 1F1B as the paper of PipeDream-Flush has it, with the plan's work in its pauses."""
    encoded = int(plan.chunks_ahead[stage])
    yield from (("encode", chunk) for chunk in range(encoded))
    warmup, run_back = num_stages - 1 - stage, 0
    for slot in range(num_rows + warmup):
        if slot < num_rows:
            yield "forward", slot
        back = slot - warmup
        if back >= 0:
            yield from (("encode", chunk) for chunk in range(encoded, plan.num_chunks))
            encoded = plan.num_chunks
            end = int(plan.chunks_back[stage, back])
            assert end < plan.num_chunks or end == 0, (
                "the last chunk runs backward on all ranks, when all else is over"
            )
            yield from (("backprop", chunk) for chunk in range(run_back, end))
            run_back = max(run_back, end)
            yield "backward", back
    yield from (("backprop", chunk) for chunk in range(run_back, plan.num_chunks))


@pytest.mark.parametrize("vision", LAYOUTS)
def test_the_last_stage_has_encoded_everything_before_its_pipeline_begins(vision: VisionLayout) -> None:
    for plan in cases(vision):
        assert plan.chunks_ahead[-1] == plan.num_chunks
        needed = np.searchsorted(plan.slot_of_chunk, vision.language.pipeline_size)
        assert (plan.chunks_ahead >= max(1, needed)).all()


def test_late_stages_take_early_rows_and_early_stages_late_ones() -> None:
    # 8 rows of 32 tiles, 64 tiles a rank; a pass takes as long as 50 tiles, as with the 78B.
    vision = VisionLayout(Layout(1, 4, 1))
    plan = equal_rows(vision, num_rows=8, tiles=32, pass_tiles=50)
    slot = slots(plan)
    shares = np.array([np.bincount(slot[plan.tiles_of(unit)], minlength=8) for unit in range(4)])
    assert shares.tolist() == [
        [8, 0, 0, 0, 32, 16, 0, 8],
        [8, 0, 0, 0, 0, 16, 32, 8],
        [8, 32, 16, 0, 0, 0, 0, 8],
        [8, 0, 16, 32, 0, 0, 0, 8],
    ]
    chunks = [plan.chunks_of(slot) for slot in range(8)]
    assert [(slot.start, slot.stop) for slot in chunks] == [(slot, slot + 1) for slot in range(8)]
    # Stage 1 waits one pass: time for the 8 tiles of slot 0 and the 16 of slot 5, not for the 32 of slot 6.
    assert plan.chunks_ahead.tolist() == [4, 6, 8, 8]
    # A pause of the cool-down lasts as long as 25 tiles take backward. Stage 0 has 8 + 32, 16 and nothing in its three, as far
    # as gradients have left the pipeline; stage 1 has 8 and 16 in its two; stage 2 has 8 + 32 in its one.
    assert plan.chunks_back.tolist() == [
        [0, 0, 0, 0, 0, 5, 6, 7],
        [0, 0, 0, 0, 0, 0, 5, 6],
        [0, 0, 0, 0, 0, 0, 0, 2],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]


def test_what_does_not_fit_into_a_pause_is_encoded_ahead() -> None:
    # 64 tiles a rank. Stage 0 has slots 0 (8 tiles), 4 (32), 5 (16) and 7 (8), and waits 3 x 2 passes for its first gradient.
    vision = VisionLayout(Layout(1, 4, 1))
    for pass_tiles, ahead in ((10.0, 4), (7.0, 4), (6.0, 5), (3.0, 5), (2.0, 6), (0.5, 8)):
        plan = equal_rows(vision, num_rows=8, tiles=32, pass_tiles=pass_tiles)
        assert plan.chunks_ahead[0] == ahead, f"a pass as long as {pass_tiles} tiles"
    assert plan.chunks_back.max() <= plan.chunks_of(0).stop, "8 tiles at most, where half of them are too many"


@pytest.mark.parametrize(
    ("vision", "num_rows", "can"),
    [
        (VisionLayout(Layout(1, 4, 1)), 5, True),
        (VisionLayout(Layout(1, 4, 1)), 4, False),
        (VisionLayout(Layout(4, 1, 1)), 8, False),
        (VisionLayout(Layout(1, 2, 1, virtual_size=2)), 8, False),
        (VisionLayout(Layout(1, 2, 1), first_stage_only=True), 8, False),
        (VisionLayout(Layout(1, 2, 1), tensor_size=2), 8, False),
        (VisionLayout(Layout(2, 2, 1), tensor_size=2), 8, True),
        (VisionLayout(Layout(1, 2, 2), tensor_size=2, exchange_replicas=2), 8, True),
    ],
)
def test_what_has_pauses_to_fill(vision: VisionLayout, num_rows: int, can: bool) -> None:
    assert can_fill_bubbles(vision, num_rows) == can


def test_plans_are_the_same_every_time() -> None:
    for one, other in zip(cases(LAYOUTS[4]), cases(LAYOUTS[4]), strict=True):
        for name in ("encoder", "chunk", "order", "slot_of_chunk", "chunks_ahead", "chunks_back"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
