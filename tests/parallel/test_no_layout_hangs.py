"""No layout hangs or loses count: random steps under every kind of layout, held against an oracle in plain Python.

Images may be in any rows and come from any ranks, rows may hold nothing but padding, and steps have 0 to 96 tiles. The
oracle knows what a rank must have done from the rows alone: it numbers ranks, cuts rows and counts messages by itself, and
recognizes every tile by a checksum of its pixels wherever the vision tower sees it. A collective that not all ranks enter
fails after a minute.
"""

import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from internvl_megatron.config.schema import DataConfig, ModelConfig, RunConfig
from internvl_megatron.ranks import RankInfo
from tests.support.layouts import ADAMW, LAYOUTS, Ranks, run_config
from tests.support.models import small_model
from tests.support.rows import MemoryRows, StepData
from tests.support.scattered_rows import scattered_step

pytestmark = pytest.mark.parallel

FEW_STEPS, MANY_STEPS = 20, 200
MOST_TILES, CHUNK_TILES = 96, 3
TIMEOUT_SECONDS = 60
FP32_BYTES = 4


@dataclass(frozen=True)
class Case:
    """Random steps under a layout."""

    ranks: Ranks
    parallel_changes: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    rows_per_step: int = 4

    def config(self) -> RunConfig:
        model = small_model(
            num_layers=2 * max(self.ranks.virtual_size, self.ranks.pipeline_size // 2, 1), hidden_size=32, head_size=8
        )
        model = replace(model, vision=replace(model.vision, num_layers=1, drop_path_rate=0.2))
        return run_config(
            model,
            data=DataConfig(tokens_per_row=128, tiles_per_row=32),
            parallel=self.ranks.config(**{"vision_chunk_tiles": CHUNK_TILES, **self.parallel_changes}),
            rows_per_step=self.rows_per_step,
            optimizer=ADAMW,  # whose parameters are gathered in the first forward pass of the next step
        )

    def data(self, config: RunConfig, step: int) -> StepData:
        seed = 1000 * self.seed + step
        return scattered_step(config.model, config.rows_per_step, seed, config.data.tokens_per_row, MOST_TILES)

    def image_owners(self, data: StepData, step: int) -> list[list[int]]:
        """Which rank of its replica decodes an image: any, or always the same few."""
        rng = np.random.default_rng([self.seed, step])
        layout = self.ranks.layout
        size = layout.stage_size * layout.pipeline_size
        some = rng.permutation(size)[: rng.integers(1, size + 1)]
        return [rng.choice(some, len(row.images)).tolist() for row in data.rows]


CASES = {
    "TP2xPP2": Case(LAYOUTS["TP2xPP2"]),
    "DP2 sharded": Case(LAYOUTS["DP2"], {"vision_sharding": "sharded"}, 11),
    "TP2+SPxPP2 in windows": Case(LAYOUTS["TP2+SPxPP2"], {"vision_window_rows": 3, "vision_recompute": "full"}, 1),
    "PP2xDP2 apart": Case(LAYOUTS["PP2xDP2 apart"], {}, 2),
    "PP2xVPP2xDP2 short rows": Case(LAYOUTS["PP2xVPP2xDP2"], {"pad_rows": False}, 4),
    "PP2xDP2 first stage short rows": Case(
        Ranks(4, pipeline_size=2, vision_placement="first_stage"), {"pad_rows": False, "vision_window_rows": 1}, 6
    ),
}
LONG = {"TP2+SPxPP2 in windows", "PP2xVPP2xDP2 short rows"}
MORE_CASES = {
    "PP4": Case(LAYOUTS["PP4"], {"vision_recompute": "full"}, 7, rows_per_step=6),
    "CP2xDP2 nothing ahead": Case(LAYOUTS["CP2xDP2"], {"prepare_ahead": False, "vision_window_rows": 1}, 3),
    "TP2xPP2 first stage": Case(LAYOUTS["TP2xPP2 first stage"], {}, 5),
    "TP2xPP2 phases apart": Case(LAYOUTS["TP2xPP2"], {"vision_in_bubbles": False}),
    "PP2xDP2 together": Case(LAYOUTS["PP2xDP2"], {}, 8, rows_per_step=6),
    "PP2xDP2 apart, more rows": Case(LAYOUTS["PP2xDP2 apart"], {}, 9, rows_per_step=8),
    "TP2xPP2 units of 2": Case(Ranks(4, tensor_size=2, pipeline_size=2, vision_tensor_size=2), {}, 10),
    "PP2xDP2 sharded": Case(LAYOUTS["PP2xDP2"], {"vision_sharding": "sharded", "vision_shard_ranks": 2}, 12),
}
"""Tried at length only, as those of `LONG`."""


@dataclass(frozen=True)
class Seen:
    """One step as one rank saw it."""

    loss: float
    updated: bool
    sent_bytes: int
    most_tiles: int
    held: list[int]
    """Checksums of the tiles this rank decoded."""
    calls: list[list[int]]
    """Checksums of the tiles of every call of the vision tower."""


@dataclass(frozen=True)
class Tile:
    """One tile of a step, where it comes from and where its tokens lie."""

    checksum: int
    replica: int
    micro_batch: int
    start: int
    row_tokens: int


def run_steps(info: RankInfo, case: Case, num_steps: int) -> list[Seen]:
    import torch

    from internvl_megatron.device import open_device
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.ranks import joined
    from tests.support.training import make_step

    torch.set_num_threads(1)
    device = open_device("cpu")
    config, layout = case.config(), case.ranks.layout
    replica = layout.replica(info.rank)
    members = layout.replica_ranks(replica)

    def batch(number: int) -> MemoryRows:
        data = case.data(config, number)
        own = range(replica, config.rows_per_step, layout.data_size)
        owners = case.image_owners(data, number)
        place = members.index(info.rank)
        return MemoryRows(data, own, place, len(members), image_owner=[owners[row] for row in own])

    seen: list[Seen] = []
    calls: list[list[int]] = []
    with joined(info, device, TIMEOUT_SECONDS):
        groups = make_groups(layout, device, TIMEOUT_SECONDS, case.ranks.vision_layout)
        step, model = make_step(config, None, groups, device)
        model.vision.register_forward_pre_hook(lambda _module, inputs: calls.append(checksums(inputs[0].numpy())))
        rows: Any = batch(0)
        for number in range(num_steps):
            following: Any = batch(number + 1) if number + 1 < num_steps else None
            result = step.run(rows, number, following)
            held = [checksum for tiles in rows.tiles().tiles.values() for checksum in checksums(tiles)]
            seen.append(
                Seen(result.loss, result.updated, result.sent_bytes, result.most_tiles_per_rank, held, calls.copy())
            )
            calls.clear()
            rows = following
    return seen


def checksums(tiles: np.ndarray) -> list[int]:
    return [zlib.crc32(np.ascontiguousarray(tile)) for tile in tiles]


def black_tile(model: ModelConfig) -> int:
    """Checksum of what a rank without tiles of its own encodes."""
    return checksums(np.zeros((1, 3, model.vision.tile_pixels, model.vision.tile_pixels), np.uint8))[0]


@pytest.mark.parametrize(
    ("name", "num_steps"),
    [
        *((name, FEW_STEPS) for name in CASES if name not in LONG),
        *(pytest.param(name, MANY_STEPS, marks=pytest.mark.slow) for name in CASES | MORE_CASES),
    ],
)
def test_random_steps(run_ranks: Callable[..., list[Any]], name: str, num_steps: int) -> None:
    case = (CASES | MORE_CASES)[name]
    found: list[list[Seen]] = run_ranks(run_steps, case.ranks.num_ranks, case, num_steps)
    oracle = Oracle(case)
    for step in range(num_steps):
        oracle.check(step, [rank[step] for rank in found])


def test_the_random_steps_hold_everything() -> None:
    case = CASES["TP2xPP2"]
    config = case.config()
    steps = [case.data(config, step) for step in range(FEW_STEPS)]
    owners = [case.image_owners(data, step) for step, data in enumerate(steps)]
    numbers_of_tiles = [sum(row.num_tiles for row in data.rows) for data in steps]
    features = {
        "no tile": 0 in numbers_of_tiles,
        "a lone tile": 1 in numbers_of_tiles,
        "many tiles": max(numbers_of_tiles) > 0.8 * MOST_TILES,
        "all of many tiles in one row": any(
            max(r.num_tiles for r in d.rows) > 20 and sum(r.num_tiles > 0 for r in d.rows) == 1 for d in steps
        ),
        "nothing but padding in the last row": any(data.rows[-1].num_samples == 0 for data in steps),
        "a row without targets": any(not row.weights.any() for data in steps for row in data.rows),
        "images from one rank": any(len(images) > 3 and len(set(images)) == 1 for images in map(flat, owners)),
        "images from all ranks": any(set(flat(images)) == {0, 1, 2, 3} for images in owners),
    }
    assert all(features.values()), f"missing: {[name for name, found in features.items() if not found]}"


def flat(owners: list[list[int]]) -> list[int]:
    return [rank for row in owners for rank in row]


class Oracle:
    """What all ranks must have done in a step."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.config = case.config()
        self.ranks = case.ranks
        layout = self.ranks
        self.stage_size = layout.tensor_size * layout.context_size
        self.data_size = layout.num_ranks // (self.stage_size * layout.pipeline_size)
        parallel = self.config.parallel
        self.window_rows = parallel.vision_window_rows or self.config.rows_per_step // self.data_size
        self.by_row = parallel.vision_placement == "first_stage"
        self.in_bubbles = (
            parallel.vision_in_bubbles
            and parallel.vision_placement == "all_ranks"
            and parallel.vision_sharding == "replicated"
            and parallel.pad_rows
            and parallel.vision_window_rows is None
            and layout.virtual_size == 1 < layout.pipeline_size < self.window_rows
        )
        self.unit_size = layout.tensor_size if parallel.vision_placement == "colocated" else layout.vision_tensor_size
        # Without a number the tests' layouts let tiles travel between all replicas.
        apart = parallel.vision_placement != "all_ranks"
        replicas = 1 if apart else parallel.vision_exchange_replicas or self.data_size
        self.groups = [range(first, first + replicas) for first in range(0, self.data_size, replicas)]

    def rank(self, tensor: int, context: int, replica: int, stage: int) -> int:
        """Tensor-parallel ranks are neighbours, then context parallel, data parallel, stages."""
        sizes = self.ranks
        return tensor + sizes.tensor_size * (context + sizes.context_size * (replica + self.data_size * stage))

    def units(self, replicas: range) -> list[tuple[int, ...]]:
        """Ranks that share out the tiles of some replicas, those that encode a tile together in one tuple."""
        ranks = self.ranks
        stages = 1 if self.by_row else ranks.pipeline_size
        members = sorted(
            self.rank(tensor, context, replica, stage)
            for tensor in range(ranks.tensor_size)
            for context in range(ranks.context_size)
            for replica in replicas
            for stage in range(stages)
        )
        size = self.unit_size
        return [tuple(members[first : first + size]) for first in range(0, len(members), size)]

    def check(self, step: int, seen: list[Seen]) -> int:
        """Compare one step, seen by all ranks; returns its number of tiles."""
        data = self.case.data(self.config, step)
        tiles = list(self.tiles(data))
        decoder = {checksum: rank for rank, one in enumerate(seen) for checksum in one.held}
        assert Counter(decoder) == Counter({tile.checksum: decoder[tile.checksum] for tile in tiles}), (
            "test's own tiles"
        )
        has_targets = any(row.weights.any() for row in data.rows)
        for one in seen:
            assert math.isfinite(one.loss)
            assert one.loss == seen[0].loss
            assert (one.loss != 0, one.updated) == (has_targets, has_targets), "no targets, nothing to learn from"
            assert one.sent_bytes == seen[0].sent_bytes
            assert one.most_tiles == seen[0].most_tiles
        encoders = self.check_calls(tiles, decoder, [list(one.calls) for one in seen])
        encoded = Counter(rank for ranks in encoders.values() for rank in ranks)
        assert seen[0].most_tiles == max(encoded.values(), default=0)
        least, most = self.bytes_to_others(tiles, decoder, encoders)
        assert least <= seen[0].sent_bytes <= most, "what has to go to another rank is sent once, and nothing else"
        return len(tiles)

    def tiles(self, data: StepData) -> Iterator[Tile]:
        """Tiles of all replicas: row i belongs to replica i modulo their number."""
        for index, row in enumerate(data.rows):
            length = len(row.token_ids)
            if not self.config.parallel.pad_rows:
                length = max(1, -(-row.num_tokens // self.stage_size)) * self.stage_size
            sums = [c for image in range(len(row.images)) for c in checksums(data.tiles[index, image])]
            for start, checksum in zip(row.tile_starts.tolist(), sums, strict=True):
                yield Tile(checksum, index % self.data_size, index // self.data_size, start, length)

    def check_calls(
        self, tiles: list[Tile], decoder: dict[int, int], calls: list[list[list[int]]]
    ) -> dict[int, tuple[int, ...]]:
        """Compare the calls of the vision tower, window by window; returns which ranks encoded each tile."""
        encoders: dict[int, tuple[int, ...]] = {}
        rows = self.config.rows_per_step // self.data_size
        for first in range(0, rows, self.window_rows):
            window = [tile for tile in tiles if first <= tile.micro_batch < first + self.window_rows]
            shares = [
                (
                    units,
                    [tile for tile in window if tile.replica in replicas and (row is None or tile.micro_batch == row)],
                )
                for replicas in self.groups
                for units in [self.units(replicas)]
                for row in (range(first, min(rows, first + self.window_rows)) if self.by_row else [None])
            ]
            busiest = max(-(-len(share) // len(units)) for units, share in shares)
            for units, share in shares:
                own = {tile.checksum for tile in share}
                for unit in units:
                    for rank in unit:
                        mine = self.take_calls(calls[rank], own, -(-busiest // CHUNK_TILES))
                        for checksum in mine:
                            encoders[checksum] = (*encoders.get(checksum, ()), rank)
                self.check_share(units, share, decoder, encoders)
        assert not any(calls), "nothing else goes through the vision tower"
        return encoders

    def take_calls(self, calls: list[list[int]], share: set[int], num_chunks: int) -> list[int]:
        """One rank's tiles of a share, whose calls come next."""
        if self.in_bubbles:
            return self.take_calls_in_bubbles(calls, num_chunks > 0)
        if self.by_row:  # in one call, if there is any
            return calls.pop(0) if calls and share.intersection(calls[0]) else []
        mine, black = [], black_tile(self.config.model)
        taken = [calls.pop(0) for _ in range(num_chunks)]
        if self.config.parallel.vision_recompute == "full":
            assert [calls.pop(0) for _ in range(num_chunks)] == taken, "all of it again in backward"
        for call in taken:
            mine += [] if call == [black] else call
        chunks = [mine[first : first + CHUNK_TILES] for first in range(0, len(mine), CHUNK_TILES)]
        assert taken == chunks + [[black]] * (num_chunks - len(chunks)), "full chunks, a rest, then black tiles"
        return mine

    def take_calls_in_bubbles(self, calls: list[list[int]], has_images: bool) -> list[int]:
        """One rank's tiles of a step: all its calls. Which rank encodes what may be any; `check_share` sees that it is fair."""
        taken, black = list(calls), black_tile(self.config.model)
        calls.clear()
        if self.config.parallel.vision_recompute == "full":
            assert all(count % 2 == 0 for count in Counter(map(tuple, taken)).values()), "all of it again in backward"
            taken = [call for number, call in enumerate(taken) if call not in taken[:number]]
        assert bool(taken) == has_images, "every rank encodes something: the ends of a step are common to all"
        assert all(len(call) <= CHUNK_TILES for call in taken)
        return [checksum for call in taken if call != [black] for checksum in call]

    def check_share(
        self,
        units: list[tuple[int, ...]],
        share: list[Tile],
        decoder: dict[int, int],
        encoders: dict[int, tuple[int, ...]],
    ) -> None:
        """Each tile is encoded by one unit, all units encode equally many, and no more tiles move than must.

        In the pauses of the pipeline time decides who encodes what, and tiles move for it.
        """
        encoded = [encoders[tile.checksum] for tile in share]
        counts = [encoded.count(unit) for unit in units]
        assert sum(counts) == len(share), "every tile is encoded by one unit, once"
        assert max(counts) - min(counts) <= 1, f"tiles of the units: {counts}"
        holders = [decoder[tile.checksum] for tile in share]
        held = sorted((sum(rank in unit for rank in holders) for unit in units), reverse=True)
        quotas = [len(share) // len(units) + (place < len(share) % len(units)) for place in range(len(units))]
        can_stay = sum(map(min, held, quotas))
        stay = sum(holder in unit for holder, unit in zip(holders, encoded, strict=True))
        assert stay == can_stay or (self.in_bubbles and stay < can_stay), (
            f"{stay} tiles are encoded where they were decoded, {can_stay} could be"
        )

    def bytes_to_others(
        self, tiles: list[Tile], decoder: dict[int, int], encoders: dict[int, tuple[int, ...]]
    ) -> tuple[int, int]:
        """Least and most bytes of tiles, embeddings and gradients; equal unless several ranks have an embedding."""
        vision, width = self.config.model.vision, self.config.model.language.hidden_size
        least = most = 0
        for tile in tiles:
            unit = encoders[tile.checksum]
            pixels = 3 * vision.tile_pixels**2 * sum(rank != decoder[tile.checksum] for rank in unit)
            least, most = least + pixels, most + pixels
            for position in range(tile.start, tile.start + vision.tokens_per_tile):
                whole, shared = self.owners(tile, position)
                receivers = [shared] if self.config.parallel.sequence_parallel else whole
                outside = sum(rank not in unit for rank in receivers)
                gradients = sum(rank != shared for rank in unit)
                least += width * FP32_BYTES * (outside + gradients)
                most += width * FP32_BYTES * ((outside if len(unit) == 1 else len(receivers)) + gradients)
        return least, most

    def owners(self, tile: Tile, position: int) -> tuple[list[int], int]:
        """Ranks whose part of the row has a token in it, and the one of them that sends its gradient."""
        part = tile.row_tokens // self.ranks.context_size
        context, place = divmod(position, part)
        size = self.ranks.tensor_size
        whole = [self.rank(tensor, context, tile.replica, 0) for tensor in range(size)]
        tensor = next(index for index in range(size) if place < part * (index + 1) // size)
        return whole, whole[tensor]
