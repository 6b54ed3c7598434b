"""Who sends which image token to whom: both ends agree, and no token is lost or counted twice."""

from itertools import product
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
    VisionLayout(Layout(2, 1, 2, 2, ring_size=2), exchange_replicas=2),
    VisionLayout(Layout(1, 1, 1, 4, ring_size=2)),
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
            full = [np.full(tiles, value) for value in (replica, row, length, 0, length)]
            parts.append(np.stack([*full, start, decoder, start]))
    last = [[0], [NUM_ROWS], [tokens_per_row], [0], [tokens_per_row], [tokens_per_row - PER_TILE], [0], [999]]
    table = np.concatenate([*parts, last], axis=1)
    table = table[:, np.lexsort((table[5], table[1], table[0]))]
    return plan_tiles(TileTable(*table), vision, 2)


def zigzag(length: int, layout: Layout) -> list[list[int]]:
    """Places in a row of one sample, by context-parallel rank."""
    ring, sharing = layout.ring_size, layout.context_size // layout.ring_size
    places = [list(range(length))]
    if ring > 1:
        chunk = length // (2 * ring)
        chunks = [list(range(first, first + chunk)) for first in range(0, length, chunk)]
        places = [chunks[index] + chunks[2 * ring - 1 - index] for index in range(ring)]
    size = length // layout.context_size
    return [part[size * index : size * (index + 1)] for part in places for index in range(sharing)]


def exchanges(vision: VisionLayout, sequence_parallel: bool) -> list[Exchange]:
    """One end for every rank; no message is sent."""
    device = Device(kind="cpu", index=0, attention="sdpa")
    layout = vision.language
    groups = [
        cast(Any, SimpleNamespace(layout=layout, vision_layout=vision, rank=rank)) for rank in range(layout.world_size)
    ]
    settings = {"tile_pixels": 2, "tokens_per_tile": PER_TILE, "sequence_parallel": sequence_parallel}
    return [Exchange(group, device, **settings) for group in groups]


@pytest.mark.parametrize("for_gradients", [False, True], ids=["embeddings", "gradients"])
@pytest.mark.parametrize(("vision", "sequence_parallel", "tokens_per_row"), CASES)
def test_both_ends_of_every_route_agree(
    vision: VisionLayout, sequence_parallel: bool, tokens_per_row: int, for_gradients: bool
) -> None:
    plan = random_plan(vision, tokens_per_row)
    ends = exchanges(vision, sequence_parallel)
    for chunk in range(plan.num_chunks):
        incoming = [by_rank(other.of_owner(plan, chunk, owner, for_gradients)) for owner, other in enumerate(ends)]
        for encoder, one in enumerate(ends):
            outgoing = by_rank(one.of_encoder(plan, chunk, encoder, for_gradients))
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
        one.of_owner(plan, chunk, rank, for_gradients=True).tokens
        for rank, one in enumerate(exchanges(vision, sequence_parallel))
        for chunk in range(plan.num_chunks)
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
        for chunk, for_gradients in product(range(plan.num_chunks), (False, True)):
            ends = one.of_owner, one.of_encoder
            assert not any(end(plan, chunk, rank, for_gradients).counts[outside].any() for end in ends)


@pytest.mark.parametrize(("vision", "sequence_parallel", "tokens_per_row"), CASES)
def test_first_stage_ranks_own_what_lies_in_their_slice(
    vision: VisionLayout, sequence_parallel: bool, tokens_per_row: int
) -> None:
    layout = vision.language
    plan = random_plan(vision, tokens_per_row)
    for rank, one in enumerate(exchanges(vision, sequence_parallel)):
        owned = one.owned(plan)
        by_chunk = [one.owned(plan, chunk).tokens for chunk in range(plan.num_chunks)]
        np.testing.assert_array_equal(np.sort(np.concatenate(by_chunk)), owned.tokens)
        wanted = []
        for tile in range(plan.num_tiles):
            if layout.stage(rank) != 0 or plan.table.replica[tile] != layout.replica(rank):
                continue
            # One sample is the whole row.
            part = zigzag(int(plan.table.row_tokens[tile]), layout)[layout.context_index(rank)]
            if sequence_parallel:
                share = len(part) // layout.tensor_size
                part = part[layout.tensor_index(rank) * share :][:share]
            wanted += [
                (tile * PER_TILE + place, int(plan.table.row[tile]), part.index(position))
                for place, position in enumerate(range(plan.table.start[tile], plan.table.start[tile] + PER_TILE))
                if position in part
            ]
        assert list(zip(owned.tokens.tolist(), owned.row.tolist(), owned.position.tolist(), strict=True)) == wanted
