"""Who sends which image token to whom: both ends agree, and no token is lost or counted twice."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from internvl_megatron.device import Device
from internvl_megatron.parallel.exchange import Exchange, Route
from internvl_megatron.parallel.layout import Layout, VisionLayout
from internvl_megatron.parallel.tile_plan import TilePlan, TileTable, plan_tiles

PER_TILE, NUM_ROWS = 4, 3
LAYOUTS = [
    Layout(1, 1, 1), Layout(2, 1, 1), Layout(1, 2, 2), Layout(2, 2, 2), Layout(4, 1, 2),
    Layout(1, 1, 1, 2), Layout(2, 1, 2, 2), Layout(1, 2, 2, 4), Layout(4, 2, 1, 2),
]  # fmt: skip
VISION_LAYOUTS = [VisionLayout(layout, exchange_replicas=layout.data_size) for layout in LAYOUTS] + [
    VisionLayout(Layout(1, 2, 2), exchange_replicas=1),
    VisionLayout(Layout(2, 2, 4), exchange_replicas=2),
    VisionLayout(Layout(2, 2, 2), tensor_size=2, exchange_replicas=2),
    VisionLayout(Layout(1, 2, 2), tensor_size=4, exchange_replicas=2),
    VisionLayout(Layout(1, 2, 2), tensor_size=2, exchange_replicas=1),
    VisionLayout(Layout(2, 2, 2), first_stage_only=True),
    VisionLayout(Layout(2, 2, 2, 2), tensor_size=2, first_stage_only=True),
]
CASES = [
    (vision, sequence_parallel, tokens_per_row)
    for vision in VISION_LAYOUTS
    for sequence_parallel, tokens_per_row in ((False, 64), (True, 64), (False, 63))
    if vision.language.tensor_size > 1 or not sequence_parallel
    if tokens_per_row % vision.language.context_size == 0
]


def random_plan(vision: VisionLayout, tokens_per_row: int) -> TilePlan:
    """Tiles anywhere, also at the very end of a row; rows of different lengths."""
    rng = np.random.default_rng(0)
    layout = vision.language
    parts = []
    for replica in range(layout.data_size):
        for row in range(NUM_ROWS):
            tiles = rng.integers(0, 5)
            length = tokens_per_row - row * layout.stage_size
            start = np.sort(rng.choice(np.arange(length - PER_TILE, -1, -PER_TILE), tiles, replace=False))
            decoder = rng.choice(layout.replica_ranks(replica), tiles)
            columns = [np.full(tiles, replica), np.full(tiles, row), np.full(tiles, length), start, decoder, start]
            parts.append(np.stack(columns))
    last = [[0], [NUM_ROWS], [tokens_per_row], [tokens_per_row - PER_TILE], [0], [999]]
    table = np.concatenate([*parts, last], axis=1)
    table = table[:, np.lexsort((table[3], table[1], table[0]))]
    return plan_tiles(TileTable(*table), vision, 2)


def exchanges(vision: VisionLayout, sequence_parallel: bool) -> list[Exchange]:
    """One end for every rank; no message is sent."""
    device = Device(kind="cpu", index=0, attention="sdpa")
    layout = vision.language
    groups = [
        cast(Any, SimpleNamespace(layout=layout, vision_layout=vision, rank=rank)) for rank in range(layout.world_size)
    ]
    return [Exchange(group, device, tokens_per_tile=PER_TILE, sequence_parallel=sequence_parallel) for group in groups]


@pytest.mark.parametrize("for_gradients", [False, True], ids=["embeddings", "gradients"])
@pytest.mark.parametrize(("vision", "sequence_parallel", "tokens_per_row"), CASES)
def test_both_ends_of_every_route_agree(
    vision: VisionLayout, sequence_parallel: bool, tokens_per_row: int, for_gradients: bool
) -> None:
    plan = random_plan(vision, tokens_per_row)
    ends = exchanges(vision, sequence_parallel)
    incoming = [by_rank(other._of_owner(plan, owner, for_gradients)) for owner, other in enumerate(ends)]
    for encoder, one in enumerate(ends):
        outgoing = by_rank(one._of_encoder(plan, encoder, for_gradients))
        for owner in range(vision.language.world_size):
            np.testing.assert_array_equal(outgoing[owner], incoming[owner][encoder])


def by_rank(route: Route) -> list[np.ndarray]:
    """Tokens by the other side's rank."""
    return np.split(route.tokens, np.cumsum(route.counts)[:-1])


@pytest.mark.parametrize(("vision", "sequence_parallel", "tokens_per_row"), CASES)
def test_every_tokens_gradient_comes_back_once(
    vision: VisionLayout, sequence_parallel: bool, tokens_per_row: int
) -> None:
    plan = random_plan(vision, tokens_per_row)
    returned = [
        one._of_owner(plan, rank, for_gradients=True).tokens
        for rank, one in enumerate(exchanges(vision, sequence_parallel))
    ]
    # Once to every rank of the unit.
    wanted = np.repeat(np.arange(plan.num_tiles * PER_TILE), vision.tensor_size)
    np.testing.assert_array_equal(np.sort(np.concatenate(returned)), wanted)


@pytest.mark.parametrize(("vision", "sequence_parallel", "tokens_per_row"), CASES)
def test_messages_stay_inside_the_exchange_group(
    vision: VisionLayout, sequence_parallel: bool, tokens_per_row: int
) -> None:
    plan = random_plan(vision, tokens_per_row)
    for rank, one in enumerate(exchanges(vision, sequence_parallel)):
        outside = np.setdiff1d(np.arange(vision.language.world_size), vision.members(vision.group_of(rank)))
        for for_gradients in (False, True):
            for route in (one._of_owner(plan, rank, for_gradients), one._of_encoder(plan, rank, for_gradients)):
                assert not route.counts[outside].any()


@pytest.mark.parametrize(("vision", "sequence_parallel", "tokens_per_row"), CASES)
def test_first_stage_ranks_own_what_lies_in_their_slice(
    vision: VisionLayout, sequence_parallel: bool, tokens_per_row: int
) -> None:
    layout = vision.language
    plan = random_plan(vision, tokens_per_row)
    for rank, one in enumerate(exchanges(vision, sequence_parallel)):
        owned = one.owned(plan)
        wanted = []
        for tile in range(plan.num_tiles):
            part = int(plan.table.row_tokens[tile]) // layout.context_size
            share = part // layout.tensor_size if sequence_parallel else part
            first = layout.context_index(rank) * part + (layout.tensor_index(rank) * share if sequence_parallel else 0)
            wanted += [
                (tile * PER_TILE + place, int(plan.table.row[tile]), int(plan.table.start[tile]) + place - first)
                for place in range(PER_TILE)
                if layout.stage(rank) == 0 and plan.table.replica[tile] == layout.replica(rank)
                if first <= plan.table.start[tile] + place < first + share
            ]
        assert list(zip(owned.tokens.tolist(), owned.row.tolist(), owned.position.tolist(), strict=True)) == wanted
