"""The orders that the times of a step are computed with are those in which a real step runs."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from internvl_megatron.parallel.bubble_plan import BubblePlan
from internvl_megatron.ranks import RankInfo
from internvl_megatron.scaling.bubble_time import operations_of_stage
from internvl_megatron.scaling.interleaved_time import passes_of_rank
from internvl_megatron.scaling.pipeline_time import passes_of_stage
from tests.support.layouts import LAYOUTS, Ranks, Scenario
from tests.support.training import replica_rows

pytestmark = pytest.mark.parallel


@dataclass
class _Traced:
    """What a rank ran in a step."""

    operations: list[tuple[str, int]]
    """(kind, number), in this order: passes of the language model by their place among those of their kind, of the encoder
    by their chunk."""
    plan: BubblePlan | None
    """None where the phases are apart."""
    chunks: list[int]
    """Chunk of the rank's model, of every forward pass; numbered as they come."""


def _trace(info: RankInfo, ranks: Ranks, scenario: Scenario) -> _Traced:
    """Run one step."""
    import torch
    from megatron.core.pipeline_parallel import schedules

    from internvl_megatron.device import open_device
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.ranks import joined
    from internvl_megatron.train import windows
    from internvl_megatron.train.window_encoder import ChunkPasses
    from tests.support.training import make_step

    torch.set_num_threads(1)
    device = open_device("cpu")
    config = scenario.config(ranks)
    traced = _Traced([], None, [])
    count: Counter[str] = Counter()
    models: list[Any] = []

    def traced_pass(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            traced.operations.append((kind, count[kind]))
            count[kind] += 1
            if kind == "forward":
                model = args[2]
                if model not in models:
                    models.append(model)
                traced.chunks.append(models.index(model))
            return function(*args, **kwargs)

        return run

    def traced_chunk(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(passes: ChunkPasses, chunk: int, *args: Any, **kwargs: Any) -> Any:
            traced.operations.append((kind, chunk))
            return function(passes, chunk, *args, **kwargs)

        return run

    def kept(make_plan: Callable[..., BubblePlan]) -> Callable[..., BubblePlan]:
        def make(*args: Any) -> BubblePlan:
            traced.plan = make_plan(*args)
            return traced.plan

        return make

    # The schedule looks both up in its module each time, and so does whoever plans.
    schedules.forward_step = traced_pass("forward", schedules.forward_step)
    schedules.backward_step = traced_pass("backward", schedules.backward_step)
    ChunkPasses.forward = traced_chunk("encode", ChunkPasses.forward)
    ChunkPasses.backward = traced_chunk("backprop", ChunkPasses.backward)
    windows.plan_bubbles = kept(windows.plan_bubbles)
    with joined(info, device, 60):
        groups = make_groups(ranks.layout, device, 60, ranks.vision_layout)
        step, _ = make_step(config, None, groups, device)
        rows: Any = replica_rows(scenario, config, 0, ranks.layout, info.rank)
        step.run(rows, 0)
    return traced


@pytest.mark.parametrize(("layout", "num_rows"), [("PP4", 6), ("PP4", 2), ("PP2", 3), ("TP2xPP2 first stage", 4)])
def test_stages_run_their_passes_in_this_order(
    run_ranks: Callable[..., list[Any]], layout: str, num_rows: int
) -> None:
    ranks = LAYOUTS[layout]
    scenario = Scenario(changes={"num_steps": 1, "rows_per_step": num_rows})
    for rank, traced in enumerate(run_ranks(_trace, ranks.num_ranks, ranks, scenario)):
        expected = passes_of_stage(ranks.layout.stage(rank), ranks.pipeline_size, num_rows)
        passes = [operation for operation in traced.operations if operation[0] in ("forward", "backward")]
        assert passes == expected, f"rank {rank}"


@pytest.mark.parametrize("num_rows", [2, 6])
def test_ranks_run_the_passes_of_their_chunks_in_this_order(
    run_ranks: Callable[..., list[Any]], num_rows: int
) -> None:
    """Which chunk runs backward no function is told; it is the order of the kinds that is compared there."""
    ranks = LAYOUTS["PP2xVPP2"]
    scenario = Scenario(changes={"num_steps": 1, "rows_per_step": num_rows})
    for rank, traced in enumerate(run_ranks(_trace, ranks.num_ranks, ranks, scenario)):
        expected = passes_of_rank(rank, 2, 2, num_rows)
        passes = [kind for kind, _ in traced.operations if kind in ("forward", "backward")]
        assert passes == [work.kind for work in expected], f"rank {rank}"
        assert traced.chunks == [work.chunk for work in expected if work.kind == "forward"], f"rank {rank}"


@pytest.mark.parametrize("layout", ["PP4", "PP2xDP2"])
def test_stages_fill_their_pauses_in_this_order(run_ranks: Callable[..., list[Any]], layout: str) -> None:
    ranks = LAYOUTS[layout]
    num_rows = 8
    scenario = Scenario(changes={"num_steps": 1, "rows_per_step": num_rows * ranks.layout.data_size})
    units = ranks.vision_layout.unit_of_rank
    filled = Counter[str]()
    for rank, traced in enumerate(run_ranks(_trace, ranks.num_ranks, ranks, scenario)):
        plan, unit = traced.plan, units[rank]
        assert plan is not None
        assert unit is not None
        assert plan.order.shape == (ranks.layout.data_size, num_rows)
        expected = [
            operation
            for operation in operations_of_stage(plan, ranks.layout.stage(rank))
            if operation.kind in ("forward", "backward") or plan.runs(unit, operation.number)
        ]
        assert traced.operations == expected, f"rank {rank}"
        kinds = [kind for kind, _ in traced.operations]
        filled["encode"] += kinds[kinds.index("forward") :].count("encode")
        last_pass = len(kinds) - 1 - kinds[::-1].index("backward")
        filled["backprop"] += kinds[:last_pass].count("backprop")
    assert filled["encode"] > 0, "no chunk is encoded after a stage's first pass"
    assert filled["backprop"] > 0, "no chunk runs backward before a stage's last pass"
