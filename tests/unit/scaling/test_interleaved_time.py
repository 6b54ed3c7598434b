"""The interleaved schedule against Megatron Core's own functions, 1F1B, and closed forms."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from internvl_megatron.scaling.interleaved_time import passes_of_rank, timeline
from internvl_megatron.scaling.pipeline_time import one_f_one_b

LAYOUTS = [(2, 2, 2), (2, 2, 8), (4, 2, 4), (4, 5, 8), (3, 4, 12)]


@pytest.mark.parametrize(("num_ranks", "num_chunks", "num_rows"), LAYOUTS)
def test_passes_run_in_megatron_core_s_order(num_ranks: int, num_chunks: int, num_rows: int) -> None:
    """Its table of (row, chunk) and its number of warm-up passes; backward takes the chunks from the end."""
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

    table = get_schedule_table(num_rows, num_chunks, num_ranks)
    for rank in range(num_ranks):
        group = SimpleNamespace(size=lambda: num_ranks, rank=lambda rank=rank: rank)
        told: Any = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=num_chunks)
        total, _, warmup, left = get_pp_rank_microbatches(num_rows, num_chunks, num_ranks, p2p_communicator=told)
        kinds = ["forward"] * warmup + ["forward", "backward"] * left + ["backward"] * warmup
        order = passes_of_rank(rank, num_ranks, num_chunks, num_rows)
        assert len(order) == 2 * total
        assert [work.kind for work in order] == kinds
        forward = [(work.row, work.chunk) for work in order if work.kind == "forward"]
        backward = [(work.row, num_chunks - 1 - work.chunk) for work in order if work.kind == "backward"]
        assert forward == backward == table


@pytest.mark.parametrize(("num_ranks", "num_chunks", "num_rows"), [*LAYOUTS, (4, 1, 6)])
def test_equal_passes_take_rows_and_a_pause_divided_by_the_chunks(
    num_ranks: int, num_chunks: int, num_rows: int
) -> None:
    """`language_time.pipeline_seconds` counts on it."""
    shape = (num_ranks * num_chunks, num_rows)
    whole = timeline(np.full(shape, 1.0), np.full(shape, 2.0), num_ranks)
    assert whole.makespan == pytest.approx(3.0 * (num_rows * num_chunks + num_ranks - 1))
    assert whole.bubble_share == pytest.approx((num_ranks - 1) / (num_rows * num_chunks + num_ranks - 1))


def test_one_chunk_is_1f1b() -> None:
    rng = np.random.default_rng(0)
    forward, backward = rng.random((4, 9)), rng.random((4, 9))
    reference, found = one_f_one_b(forward, backward), timeline(forward, backward, 4)
    assert found.makespan == pytest.approx(float(reference.makespan))
    for rank, spans in enumerate(found.ranks):
        for (kind, row, _), start, end in spans:
            assert start == pytest.approx(getattr(reference, f"{kind}_start")[rank, row])
            assert end == pytest.approx(getattr(reference, f"{kind}_end")[rank, row])


@pytest.mark.parametrize(("num_ranks", "num_chunks", "num_rows"), [(4, 1, 12), (4, 2, 12), (4, 5, 12)])
def test_rows_under_way_are_those_of_the_memory_model(num_ranks: int, num_chunks: int, num_rows: int) -> None:
    """`memory` counts P - s rows on rank s, and (P - 1) / V more with chunks."""
    shape = (num_ranks * num_chunks, num_rows)
    held = timeline(np.full(shape, 1.0), np.full(shape, 2.0), num_ranks).most_rows_under_way
    counted = num_ranks + ((num_ranks - 1) / num_chunks if num_chunks > 1 else 0)
    assert held[0] == pytest.approx(counted)
    assert held == sorted(held, reverse=True)


def test_no_pass_begins_before_its_input_is_there() -> None:
    rng = np.random.default_rng(1)
    forward, backward = rng.random((6, 8)), rng.random((6, 8))
    spans = {
        (span.work.kind, span.work.chunk * 2 + rank, span.work.row): span
        for rank, all_spans in enumerate(timeline(forward, backward, 2).ranks)
        for span in all_spans
    }
    for (kind, stage, row), span in spans.items():
        before = spans.get((kind, stage - 1 if kind == "forward" else stage + 1, row))
        assert before is None or span.start >= before.end
        if kind == "backward":
            assert span.start >= spans["forward", stage, row].end
