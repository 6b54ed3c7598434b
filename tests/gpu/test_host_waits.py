"""On a GPU: what `tests/parallel/test_host_waits.py` counts on a CPU raises an error here."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from internvl_megatron.launcher import launch
from internvl_megatron.ranks import RankInfo
from tests.support.layouts import ADAMW, LAYOUTS, Scenario
from tests.support.training import replica_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
]

SCENARIO = Scenario(
    drop_path_rate=0.5, changes={"optimizer": ADAMW, "dtype": "bf16", "device": "cuda", "num_steps": 3}
)


def step_that_must_not_wait(info: RankInfo) -> float:
    """Loss of a second step, in which a wait of the host before the update is an error; the first makes what stays."""
    from internvl_megatron.device import open_device
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.ranks import joined
    from tests.support.training import make_step

    device, ranks = open_device("cuda"), LAYOUTS["1"]
    config = SCENARIO.config(ranks)
    with joined(info, device, 60):
        groups = make_groups(ranks.layout, device, 60, ranks.vision_layout)
        step, _ = make_step(config, None, groups, device)
        batches: list[Any] = [replica_rows(SCENARIO, config, index, ranks.layout, info.rank) for index in range(3)]
        step.run(batches[0], 0)
        phase = step.clock.phase

        @contextmanager
        def strict_phase(name: str) -> Iterator[None]:
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("default" if name == "update" else "error")
            try:
                with phase(name):
                    yield
            finally:
                torch.cuda.set_sync_debug_mode(before)

        step.clock.phase = strict_phase
        return step.run(batches[1], 1, batches[2]).loss


def test_the_host_does_not_wait_inside_a_step() -> None:
    (loss,) = launch(step_that_must_not_wait, 1, device="cuda")
    assert 0 < loss < 20
