"""The order of passes that pipeline times are computed with is the one Megatron Core's schedule runs."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from internvl_megatron.ranks import RankInfo
from internvl_megatron.scaling.pipeline_time import passes_of_stage
from tests.support.layouts import LAYOUTS, Ranks, Scenario
from tests.support.training import replica_rows

pytestmark = pytest.mark.parallel


def _passes(info: RankInfo, ranks: Ranks, scenario: Scenario) -> list[tuple[str, int]]:
    """(kind, row) of every pass of a real step, in the order this rank ran them."""
    import torch
    from megatron.core.pipeline_parallel import schedules

    from internvl_megatron.device import open_device
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.ranks import joined
    from tests.support.training import make_step

    torch.set_num_threads(1)
    device = open_device("cpu")
    config = scenario.config(ranks)
    order: list[tuple[str, int]] = []
    count: Counter[str] = Counter()

    def traced(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            order.append((kind, count[kind]))
            count[kind] += 1
            return function(*args, **kwargs)

        return run

    # The schedule looks both up in its module each time.
    schedules.forward_step = traced("forward", schedules.forward_step)
    schedules.backward_step = traced("backward", schedules.backward_step)
    with joined(info, device, 60):
        groups = make_groups(ranks.layout, device, 60, ranks.vision_layout)
        step, _ = make_step(config, None, groups, device)
        rows: Any = replica_rows(scenario, config, 0, ranks.layout, info.rank)
        step.run(rows, 0)
    return order


@pytest.mark.parametrize(("layout", "num_rows"), [("PP4", 6), ("PP4", 2), ("PP2", 3), ("TP2xPP2 first stage", 4)])
def test_stages_run_their_passes_in_this_order(
    run_ranks: Callable[..., list[Any]], layout: str, num_rows: int
) -> None:
    ranks = LAYOUTS[layout]
    scenario = Scenario(changes={"num_steps": 1, "rows_per_step": num_rows})
    for rank, order in enumerate(run_ranks(_passes, ranks.num_ranks, ranks, scenario)):
        expected = passes_of_stage(ranks.layout.stage(rank), ranks.pipeline_size, num_rows)
        assert order == expected, f"rank {rank}"
