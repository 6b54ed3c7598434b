"""What a step's memory grows by with its number of micro-batches M, to the byte.

Peak bytes of tensors on a rank = uint8 pixels of the tiles it encodes in a window
                                + the embeddings of the image tokens it owns in a window, once
                                + 8 bytes a micro-batch for its loss, and for what each of its samples adds, where the loss is computed
                                + what does not depend on M.

Where encoding fills the pauses of the pipeline (`vision_in_bubbles`) a rank that has encoded for others may keep the embeddings
until the pipeline of those who own their tokens has come to the row: at most those of its tiles, for every owner. And tiles change their rank for it: those
on their way lie in a message before there are embeddings.

That is with `vision_recompute=full`, at which nothing else of the encoder stays between its forward and backward pass.
In the last term are parameters, gradients, optimizer state, the activations of as many micro-batches as the pipeline
has under way (with M = 2 it may have fewer than with more), and what travels at a time: embeddings and gradients of one
chunk of every rank. With `prepare_ahead` the pixels of the next window lie beside those of this one.

Not counted: what the loader holds (the step's decoded tiles and rows, host memory), and host integers of the plan. Tiles
that change their rank lie in a message too until they have arrived, before there are embeddings: here the ranks decode as
many tiles as they encode, as the loader sees to, and none has to.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from internvl_megatron.config.schema import DataConfig, RunConfig
from internvl_megatron.ranks import RankInfo
from tests.support.layouts import LAYOUTS, Ranks, run_config
from tests.support.models import small_model
from tests.support.rows import MemoryRows, Picture, Sample, StepData, packed_row

pytestmark = pytest.mark.parallel

FEW_ROWS, SOME_ROWS, MANY_ROWS = 2, 8, 32
"""Micro-batches of a replica in a step."""
NUM_REPEATS = 3
"""The smallest of so many peaks counts: the backend's thread may let go of a message a moment after it is through."""
TILES_PER_ROW = 8
ROW: list[Sample] = [[5, Picture(TILES_PER_ROW // 2, 64), 3, Picture(TILES_PER_ROW // 2, 256), 6]]
FP32_BYTES, FP64_BYTES = 4, 8
SMALL_BYTES = 1024
"""Numbers and indices of a micro-batch more that is under way."""


@dataclass(frozen=True)
class Case:
    """A layout whose memory is measured."""

    ranks: Ranks
    parallel_changes: dict[str, Any] = field(default_factory=dict)

    def config(self) -> RunConfig:
        apart = {"vision_recompute": "full", "prepare_ahead": False, "vision_in_bubbles": False}
        changes = {**apart, **self.parallel_changes}
        return run_config(
            small_model(num_layers=4 if self.ranks.virtual_size > 1 else 2),
            parallel=self.ranks.config(**changes),
            data=DataConfig(tokens_per_row=64, tiles_per_row=TILES_PER_ROW),
        )


BUBBLE_CASES = {
    "PP2": Case(LAYOUTS["PP2"], {"vision_in_bubbles": True}),
    "TP2xPP2": Case(LAYOUTS["TP2xPP2"], {"vision_in_bubbles": True}),
}
CASES = {
    "PP2 in windows": Case(LAYOUTS["PP2"], {"vision_window_rows": 2}),
    "PP2": Case(LAYOUTS["PP2"]),
    "1": Case(LAYOUTS["1"]),
    "TP2": Case(LAYOUTS["TP2"]),
    "TP2+SP": Case(LAYOUTS["TP2+SP"]),
    "DP2 ahead": Case(LAYOUTS["DP2"], {"prepare_ahead": True}),
    "PP2 ahead": Case(LAYOUTS["PP2"], {"prepare_ahead": True}),
    "PP2xVPP2": Case(LAYOUTS["PP2xVPP2"]),
    "TP2xPP2 in windows": Case(LAYOUTS["TP2xPP2"], {"vision_window_rows": 2}),
    "TP2+SPxPP2": Case(LAYOUTS["TP2+SPxPP2"]),
    "TP2+SPxCP2": Case(LAYOUTS["TP2+SPxCP2"]),
    "CP2xDP2": Case(LAYOUTS["CP2xDP2"]),
    "PP2xDP2 apart": Case(LAYOUTS["PP2xDP2 apart"]),
}


def measure(info: RankInfo, case: Case) -> dict[int, int]:
    """Peak bytes of one rank by number of micro-batches."""
    import torch

    from internvl_megatron.device import open_device
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.ranks import joined
    from tests.support.training import make_step
    from tools.tensor_bytes import TensorBytes

    torch.set_num_threads(1)
    device = open_device("cpu")
    config, layout = case.config(), case.ranks.layout
    replica = layout.replica(info.rank)
    members = layout.replica_ranks(replica)

    def batch(num_rows: int) -> Any:
        rows = num_rows * layout.data_size
        own = range(replica, rows, layout.data_size)
        return MemoryRows(equal_rows(config, rows), own, members.index(info.rank), len(members))

    peaks = {}
    with joined(info, device, 60):
        groups = make_groups(layout, device, 60, case.ranks.vision_layout)
        step, _ = make_step(config, None, groups, device)
        step.run(batch(FEW_ROWS), 0)  # allocates what stays
        windows: Any = step.windows
        make_window, prepare = windows._make, windows.prepare_after
        for num_rows in (FEW_ROWS, SOME_ROWS, MANY_ROWS) * NUM_REPEATS:
            account = TensorBytes()

            def make_counted(*args: Any, account: TensorBytes = account) -> Any:
                with account.in_this_thread():
                    return make_window(*args)

            def prepare_at_once(*args: Any) -> None:
                prepare(*args)
                windows.wait()  # so that it is there at the peak, however fast the thread

            windows._make, windows.prepare_after = make_counted, prepare_at_once
            with account.in_this_thread():
                step.run(batch(num_rows), 0, batch(num_rows))
            peaks[num_rows] = min(peaks.get(num_rows, account.peak), account.peak)
    return peaks


def equal_rows(config: RunConfig, num_rows: int) -> StepData:
    """The same row over and over, each with pixels of its own."""
    vision, vocab_size = config.model.vision, config.model.language.vocab_size
    row = packed_row(np.random.default_rng(0), ROW, config.data.tokens_per_row, vision.tokens_per_tile, vocab_size)
    tiles = {
        (index, image): np.full((reference.num_tiles, 3, vision.tile_pixels, vision.tile_pixels), index, np.uint8)
        for index in range(num_rows)
        for image, reference in enumerate(row.images)
    }
    return StepData([row] * num_rows, tiles)


def bytes_per_row(case: Case, rank: int) -> int:
    """What one more micro-batch of every replica costs a rank."""
    config, ranks, layout = case.config(), case.ranks, case.ranks.layout
    model, parallel = config.model, config.parallel
    is_first, is_last = layout.stage(rank) == 0, layout.stage(rank) == layout.pipeline_size - 1
    loss = FP64_BYTES * (1 + len(ROW)) if is_last else 0
    if parallel.vision_window_rows is not None:
        return loss
    tiles = TILES_PER_ROW / (ranks.num_ranks / layout.data_size)
    assert tiles.is_integer(), "all ranks encode equally many"
    windows = 2 if parallel.prepare_ahead else 1
    pixels = windows * int(tiles) * 3 * model.vision.tile_pixels**2
    row = equal_rows(config, 1).rows[0]
    part = len(row.token_ids) // layout.context_size
    first = part * layout.context_index(rank)
    end = first + part
    if parallel.sequence_parallel:
        part //= layout.tensor_size
        first += part * layout.tensor_index(rank)
        end = first + part
    places = np.concatenate([np.arange(model.vision.tokens_per_tile) + start for start in row.tile_starts])
    owned = int(((places >= first) & (places < end)).sum()) if is_first else 0
    return pixels + owned * model.language.hidden_size * FP32_BYTES + loss


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_memory_grows_by_tiles_and_owned_embeddings(run_ranks: Callable[..., list[Any]], name: str) -> None:
    case = CASES[name]
    found: list[dict[int, int]] = run_ranks(measure, case.ranks.num_ranks, case)
    for rank, peaks in enumerate(found):
        wanted = bytes_per_row(case, rank)
        assert peaks[MANY_ROWS] - peaks[SOME_ROWS] == (MANY_ROWS - SOME_ROWS) * wanted, f"rank {rank}"
        more_under_way = peaks[SOME_ROWS] - peaks[FEW_ROWS] - (SOME_ROWS - FEW_ROWS) * wanted
        if case.ranks.virtual_size > 1:
            assert more_under_way > 0, f"rank {rank}: two rows do not fill an interleaved pipeline"
        else:
            assert 0 <= more_under_way < SMALL_BYTES, f"rank {rank}"


@pytest.mark.parametrize("name", ["PP2", pytest.param("TP2xPP2", marks=pytest.mark.slow)])
def test_memory_with_encoding_in_bubbles(run_ranks: Callable[..., list[Any]], name: str) -> None:
    case = BUBBLE_CASES[name]
    model, layout = case.config().model, case.ranks.layout
    tiles = TILES_PER_ROW / (case.ranks.num_ranks / layout.data_size)
    owners = 1 if case.config().parallel.sequence_parallel else layout.tensor_size
    encoded = owners * int(tiles) * model.vision.tokens_per_tile * model.language.hidden_size * FP32_BYTES
    found: list[dict[int, int]] = run_ranks(measure, case.ranks.num_ranks, case)
    for rank, peaks in enumerate(found):
        wanted = bytes_per_row(case, rank)
        grown = (peaks[MANY_ROWS] - peaks[SOME_ROWS]) / (MANY_ROWS - SOME_ROWS)
        assert grown <= wanted + encoded, f"rank {rank}"
