"""Weights in FP8 are rounded once a pass over a batch, however many windows it has: Megatron Core is told of one first micro-batch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from internvl_megatron.ranks import RankInfo
from tests.support.layouts import LAYOUTS, SGD, Ranks, Scenario
from tests.support.training import replica_rows

pytestmark = pytest.mark.parallel

SCENARIOS = {
    "one window": Scenario(changes={"optimizer": SGD}),
    "windows": Scenario(changes={"optimizer": SGD}, parallel_changes={"vision_window_rows": 1}),
}
WINDOWS_OF_2 = Scenario(changes={"optimizer": SGD}, parallel_changes={"vision_window_rows": 2})
"""The interleaved schedule takes as many rows as stages at a time."""


def signals_by_pass(info: RankInfo, ranks: Ranks, scenarios: dict[str, Scenario]) -> dict[str, list[int]]:
    """How often each of two steps and an evaluation asks a chunk of the language model to round its weights."""
    from unittest.mock import patch

    from megatron.core.distributed import DistributedDataParallel

    from internvl_megatron.device import open_device
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.ranks import joined
    from tests.support.training import make_step

    torch.set_num_threads(1)
    device = open_device("cpu")
    found: dict[str, list[int]] = {}
    with joined(info, device, 60):
        groups = make_groups(ranks.layout, device, 60, ranks.vision_layout)
        for name, scenario in scenarios.items():
            config = scenario.config(ranks)
            step, _ = make_step(config, None, groups, device)
            batch: Any = replica_rows(scenario, config, 0, ranks.layout, info.rank)
            with patch.object(DistributedDataParallel, "set_is_first_microbatch") as signal:
                passes = [partial(step.run, batch, 0), partial(step.evaluate, batch), partial(step.run, batch, 1)]
                found[name] = []
                for run_pass in passes:
                    signal.reset_mock()
                    run_pass()
                    found[name].append(signal.call_count)
    return found


@pytest.mark.parametrize(("layout", "num_chunks"), [("1", 1), ("PP2xVPP2", 2)])
def test_weights_are_rounded_once_whatever_the_windows(
    run_ranks: Callable[..., list[Any]], layout: str, num_chunks: int
) -> None:
    ranks = LAYOUTS[layout]
    scenarios = SCENARIOS if num_chunks == 1 else {"windows": WINDOWS_OF_2}
    for rank, found in enumerate(run_ranks(signals_by_pass, ranks.num_ranks, ranks, scenarios)):
        for name, counts in found.items():
            assert counts == [num_chunks] * 3, (
                f"{name}, rank {rank}: rounded {counts} times by step, evaluation and step"
            )
