"""Who sends which image token to whom: both ends agree, and no token is lost or counted twice."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from internvl_megatron.device import Device
from internvl_megatron.parallel.exchange import Exchange, Route
from internvl_megatron.parallel.layout import Layout
from internvl_megatron.parallel.tile_plan import TilePlan, TileTable, plan_tiles

PER_TILE, NUM_ROWS = 4, 3
LAYOUTS = [
    Layout(1, 1, 1), Layout(2, 1, 1), Layout(1, 2, 2), Layout(2, 2, 2), Layout(4, 1, 2),
    Layout(1, 1, 1, 2), Layout(2, 1, 2, 2), Layout(1, 2, 2, 4), Layout(4, 2, 1, 2),
]  # fmt: skip
CASES = [
    (layout, sequence_parallel, tokens_per_row)
    for layout in LAYOUTS
    for sequence_parallel, tokens_per_row in ((False, 64), (True, 64), (False, 63))
    if layout.tensor_size > 1 or not sequence_parallel
    if tokens_per_row % layout.context_size == 0
]


def random_plan(layout: Layout, tokens_per_row: int) -> TilePlan:
    """Tiles anywhere, also at the very end of a row."""
    rng = np.random.default_rng(0)
    parts = []
    for replica in range(layout.data_size):
        for row in range(NUM_ROWS):
            tiles = rng.integers(0, 5)
            start = np.sort(rng.choice(np.arange(tokens_per_row - PER_TILE, -1, -PER_TILE), tiles, replace=False))
            decoder = rng.choice(layout.replica_ranks(replica), tiles)
            parts.append(np.stack([np.full(tiles, replica), np.full(tiles, row), start, decoder, start]))
    last = [[0], [NUM_ROWS], [tokens_per_row - PER_TILE], [0], [999]]
    table = np.concatenate([*parts, last], axis=1)
    table = table[:, np.lexsort((table[2], table[1], table[0]))]
    return plan_tiles(TileTable(*table), layout.world_size, 2)


def exchanges(layout: Layout, sequence_parallel: bool, tokens_per_row: int) -> list[Exchange]:
    """One end for every rank; no message is sent."""
    device = Device(kind="cpu", index=0, attention="sdpa")
    groups = [cast(Any, SimpleNamespace(layout=layout, rank=rank)) for rank in range(layout.world_size)]
    return [
        Exchange(
            group, device, tokens_per_tile=PER_TILE, tokens_per_row=tokens_per_row, sequence_parallel=sequence_parallel
        )
        for group in groups
    ]


@pytest.mark.parametrize("for_gradients", [False, True], ids=["embeddings", "gradients"])
@pytest.mark.parametrize(("layout", "sequence_parallel", "tokens_per_row"), CASES)
def test_both_ends_of_every_route_agree(
    layout: Layout, sequence_parallel: bool, tokens_per_row: int, for_gradients: bool
) -> None:
    plan = random_plan(layout, tokens_per_row)
    ends = exchanges(layout, sequence_parallel, tokens_per_row)
    incoming = [by_rank(other._of_owner(plan, owner, for_gradients)) for owner, other in enumerate(ends)]
    for encoder, one in enumerate(ends):
        outgoing = by_rank(one._of_encoder(plan, encoder, for_gradients))
        for owner in range(layout.world_size):
            np.testing.assert_array_equal(outgoing[owner], incoming[owner][encoder])


def by_rank(route: Route) -> list[np.ndarray]:
    """Tokens by the other side's rank."""
    return np.split(route.tokens, np.cumsum(route.counts)[:-1])


@pytest.mark.parametrize(("layout", "sequence_parallel", "tokens_per_row"), CASES)
def test_every_tokens_gradient_comes_back_once(layout: Layout, sequence_parallel: bool, tokens_per_row: int) -> None:
    plan = random_plan(layout, tokens_per_row)
    returned = [
        one._of_owner(plan, rank, for_gradients=True).tokens
        for rank, one in enumerate(exchanges(layout, sequence_parallel, tokens_per_row))
    ]
    assert sorted(np.concatenate(returned).tolist()) == list(range(plan.num_tiles * PER_TILE))


@pytest.mark.parametrize(("layout", "sequence_parallel", "tokens_per_row"), CASES)
def test_first_stage_ranks_own_what_lies_in_their_slice(
    layout: Layout, sequence_parallel: bool, tokens_per_row: int
) -> None:
    plan = random_plan(layout, tokens_per_row)
    for rank, one in enumerate(exchanges(layout, sequence_parallel, tokens_per_row)):
        owned = one.owned(plan)
        part = tokens_per_row // layout.context_size
        share = part // layout.tensor_size if sequence_parallel else part
        first = layout.context_index(rank) * part + (layout.tensor_index(rank) * share if sequence_parallel else 0)
        wanted = [
            (tile * PER_TILE + place, int(plan.table.row[tile]), int(plan.table.start[tile]) + place - first)
            for tile in range(plan.num_tiles)
            for place in range(PER_TILE)
            if layout.stage(rank) == 0 and plan.table.replica[tile] == layout.replica(rank)
            if first <= plan.table.start[tile] + place < first + share
        ]
        assert list(zip(owned.tokens.tolist(), owned.row.tolist(), owned.position.tolist(), strict=True)) == wanted
