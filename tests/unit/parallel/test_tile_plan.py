"""Which unit of ranks encodes which tile."""

from itertools import product

import numpy as np
import pytest

from internvl_megatron.parallel.layout import Layout, VisionLayout
from internvl_megatron.parallel.tile_plan import TilePlan, TileTable, plan_rows, plan_tiles


def world(num_ranks: int) -> VisionLayout:
    """Every rank a unit, all in one exchange group, in two stages where that goes."""
    stages = 2 if num_ranks % 2 == 0 else 1
    return VisionLayout(Layout(num_ranks // stages, stages, 1))


LAYOUTS = [
    *map(world, (1, 2, 4, 7, 16)),
    VisionLayout(Layout(2, 2, 4), exchange_replicas=4),
    VisionLayout(Layout(2, 2, 4), exchange_replicas=2),
    VisionLayout(Layout(1, 3, 3), exchange_replicas=1),
    VisionLayout(Layout(2, 2, 4), tensor_size=2, exchange_replicas=2),
    VisionLayout(Layout(1, 4, 2), tensor_size=4, exchange_replicas=1),
    VisionLayout(Layout(4, 2, 2), first_stage_only=True),
    VisionLayout(Layout(2, 2, 2, 2), tensor_size=2, first_stage_only=True),
]
"""Layouts with one and several exchange groups, replicas, ranks in a unit; with an encoder on the first stage only."""


def random_table(rng: np.random.Generator, layout: VisionLayout, num_tiles: int) -> TileTable:
    """Tiles of all replicas, whose ranks decode very different numbers of them."""
    language = layout.language
    replica = np.sort(rng.integers(0, language.data_size, num_tiles))
    place = np.minimum(rng.geometric(0.4, num_tiles) - 1, len(language.replica_ranks(0)) - 1)
    decoder = np.array([language.replica_ranks(r)[p] for r, p in zip(replica, place, strict=True)], dtype=np.int64)
    number, length = np.arange(num_tiles), np.full(num_tiles, 64)
    return TileTable(replica, rng.integers(0, 4, num_tiles), length, 0 * length, length, number, decoder, number)


def cases(layout: VisionLayout) -> list[TilePlan]:
    rng = np.random.default_rng(0)
    counts = (0, 1, 3, 8, *range(2, 150, 7))
    return [plan_tiles(random_table(rng, layout, count), layout, int(rng.integers(1, 5))) for count in counts]


def loads(plan: TilePlan, layout: VisionLayout) -> np.ndarray:
    """Tiles by exchange group and unit."""
    return np.bincount(plan.encoder, minlength=len(layout.units)).reshape(layout.num_groups, -1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tile_is_encoded_once_inside_its_exchange_group(layout: VisionLayout) -> None:
    for plan in cases(layout):
        tiles = np.concatenate([plan.tiles_of(unit) for unit in range(len(layout.units))])
        assert sorted(tiles.tolist()) == list(range(plan.num_tiles))
        for tile, unit in enumerate(plan.encoder.tolist()):
            group = int(plan.table.replica[tile]) // layout.exchange_replicas
            assert all(layout.group_of(rank) == group for rank in layout.units[unit])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loads_of_an_exchange_group_differ_by_one_tile_at_most(layout: VisionLayout) -> None:
    for plan in cases(layout):
        found = loads(plan, layout)
        assert (found.max(axis=1) - found.min(axis=1)).max() <= 1, found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_even_plan_leaves_more_tiles_where_they_were_decoded(layout: VisionLayout) -> None:
    for plan in cases(layout):
        stay = sum(rank in layout.units[unit] for rank, unit in zip(plan.table.decoder, plan.encoder, strict=True))
        most = 0
        for group in range(layout.num_groups):
            units = range(group * layout.units_per_group, (group + 1) * layout.units_per_group)
            held = np.array([np.isin(plan.table.decoder, layout.units[unit]).sum() for unit in units])
            base, surplus = divmod(int(loads(plan, layout)[group].sum()), len(units))
            most += np.minimum(held, base).sum() + min(surplus, int((held > base).sum()))
        assert stay == most


def test_no_even_plan_moves_fewer_tiles_of_any_small_table() -> None:
    layout = world(3)
    for decoders in product(range(3), repeat=5):
        number, zeros = np.arange(5), np.zeros(5, dtype=np.int64)
        table = TileTable(zeros, zeros, zeros + 64, zeros, zeros + 64, number, np.array(decoders), number)
        fewest = min(
            sum(encoder != decoder for encoder, decoder in zip(encoders, decoders, strict=True))
            for encoders in product(range(3), repeat=5)
            if np.ptp(np.bincount(encoders, minlength=3)) <= 1
        )
        assert (plan_tiles(table, layout, 1).encoder != table.decoder).sum() == fewest


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_leave_their_replica_only_if_it_has_no_room(layout: VisionLayout) -> None:
    for plan in cases(layout):
        home = np.array([layout.language.replica(unit[0]) for unit in layout.units])
        away = home[plan.encoder] != plan.table.replica
        if (layout.language.stage_size % layout.tensor_size) or not away.any():
            continue  # units across replicas have no home
        for replica in np.unique(plan.table.replica[away]):
            strangers = plan.table.replica[home[plan.encoder] == replica] != replica
            assert not strangers.any(), f"replica {replica} sends tiles away and takes others in"


@pytest.mark.parametrize(
    ("num_tiles", "chunk_tiles", "num_chunks"), [(0, 4, 0), (1, 4, 1), (16, 4, 1), (17, 4, 2), (9, 1, 3)]
)
def test_the_number_of_chunks_is_that_of_the_busiest_rank(num_tiles: int, chunk_tiles: int, num_chunks: int) -> None:
    plan = plan_tiles(random_table(np.random.default_rng(1), world(4), num_tiles), world(4), chunk_tiles)
    assert plan.num_chunks == num_chunks


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_cut_a_units_tiles_in_order(layout: VisionLayout) -> None:
    for chunk_tiles in (1, 3):
        plan = plan_tiles(random_table(np.random.default_rng(3), layout, 50), layout, chunk_tiles)
        for unit in range(len(layout.units)):
            tiles = plan.tiles_of(unit)
            chunks = [plan.tiles_of(unit, chunk) for chunk in range(plan.num_chunks)]
            assert [len(chunk) for chunk in chunks[: len(tiles) // chunk_tiles]] == [chunk_tiles] * (
                len(tiles) // chunk_tiles
            )
            np.testing.assert_array_equal(np.concatenate(chunks), tiles)


def test_all_exchange_groups_run_as_many_chunks_as_the_busiest() -> None:
    layout = VisionLayout(Layout(1, 1, 2), exchange_replicas=1)
    number, zeros = np.arange(5), np.zeros(5, dtype=np.int64)
    assert (
        plan_tiles(TileTable(zeros, zeros, zeros + 64, zeros, zeros + 64, number, zeros, number), layout, 2).num_chunks
        == 3
    )


def test_a_plan_is_a_function_of_its_table() -> None:
    for layout in LAYOUTS:
        table = random_table(np.random.default_rng(2), layout, 37)
        np.testing.assert_array_equal(plan_tiles(table, layout, 2).encoder, plan_tiles(table, layout, 2).encoder)


def test_rows_are_shared_out_by_themselves() -> None:
    layout = VisionLayout(Layout(4, 2, 2), first_stage_only=True)
    table = random_table(np.random.default_rng(4), layout, 61)
    plan = plan_rows(table, layout)
    for row in range(4):
        found = np.bincount(plan.encoder[table.row == row], minlength=8).reshape(2, 4)
        assert (np.ptp(found, axis=1) <= 1).all(), f"row {row}: {found}"


def test_the_selection_of_rows_keeps_the_order() -> None:
    table = random_table(np.random.default_rng(3), world(4), 20)
    chosen = table.of_rows(range(2, 3))
    assert len(chosen)
    assert (chosen.row == 2).all()
    assert (np.diff(chosen.start) > 0).all()
    np.testing.assert_array_equal(chosen.number, table.number[table.row == 2])
