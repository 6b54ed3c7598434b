"""Which rank encodes which tile."""

import numpy as np
import pytest

from internvl_megatron.parallel.tile_plan import TilePlan, TileTable, plan_tiles


def random_table(rng: np.random.Generator, num_ranks: int, num_tiles: int) -> TileTable:
    """Tiles of two replicas; ranks decode very different numbers of them."""
    decoder = np.minimum(rng.geometric(0.4, num_tiles) - 1, num_ranks - 1)
    replica = np.sort(rng.integers(0, 2, num_tiles))
    return TileTable(replica, rng.integers(0, 4, num_tiles), np.arange(num_tiles), decoder, np.arange(num_tiles))


def cases() -> list[TilePlan]:
    rng = np.random.default_rng(0)
    sizes = [
        (1, 0),
        (4, 0),
        (4, 1),
        (4, 3),
        (8, 8),
        (1, 9),
        *((int(rng.integers(1, 17)), n) for n in range(2, 150, 7)),
    ]
    return [plan_tiles(random_table(rng, ranks, tiles), ranks, int(rng.integers(1, 5))) for ranks, tiles in sizes]


def test_every_tile_is_encoded_once() -> None:
    for plan in cases():
        tiles = np.concatenate([plan.tiles_of(rank) for rank in range(64)])
        assert sorted(tiles.tolist()) == list(range(plan.num_tiles))


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 7, 16])
def test_loads_differ_by_one_tile_at_most(num_ranks: int) -> None:
    rng = np.random.default_rng(num_ranks)
    for num_tiles in range(60):
        plan = plan_tiles(random_table(rng, num_ranks, num_tiles), num_ranks, 2)
        loads = np.bincount(plan.encoder, minlength=num_ranks)
        assert loads.max() - loads.min() <= 1, f"{num_tiles} tiles: {loads}"
        assert len(loads) == num_ranks, "no rank outside the group encodes anything"


@pytest.mark.parametrize("num_ranks", [2, 4, 7])
def test_no_even_plan_leaves_more_tiles_where_they_were_decoded(num_ranks: int) -> None:
    rng = np.random.default_rng(num_ranks)
    for num_tiles in range(60):
        table = random_table(rng, num_ranks, num_tiles)
        held = np.bincount(table.decoder, minlength=num_ranks)
        base, surplus = divmod(num_tiles, num_ranks)
        most = np.minimum(held, base).sum() + min(surplus, int((held > base).sum()))
        assert (plan_tiles(table, num_ranks, 2).encoder == table.decoder).sum() == most


@pytest.mark.parametrize(
    ("num_tiles", "chunk_tiles", "num_chunks"), [(0, 4, 0), (1, 4, 1), (16, 4, 1), (17, 4, 2), (9, 1, 3)]
)
def test_the_number_of_chunks_is_that_of_the_busiest_rank(num_tiles: int, chunk_tiles: int, num_chunks: int) -> None:
    plan = plan_tiles(random_table(np.random.default_rng(1), 4, num_tiles), 4, chunk_tiles)
    assert plan.num_chunks == num_chunks


def test_a_plan_is_a_function_of_its_table() -> None:
    table = random_table(np.random.default_rng(2), 4, 37)
    np.testing.assert_array_equal(plan_tiles(table, 4, 2).encoder, plan_tiles(table, 4, 2).encoder)


def test_select_keeps_the_order() -> None:
    table = random_table(np.random.default_rng(3), 4, 20)
    chosen = table.select(table.row == 2)
    assert (chosen.row == 2).all()
    assert (np.diff(chosen.start) > 0).all()
    np.testing.assert_array_equal(chosen.number, table.number[table.row == 2])
