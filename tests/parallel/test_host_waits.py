"""Nothing inside a step makes the host wait for the device; at its end come the gradient norm and the loss, each once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from internvl_megatron.config.schema import KernelConfig
from internvl_megatron.ranks import RankInfo
from tests.support.layouts import ADAMW, LAYOUTS, SGD, Ranks, Scenario
from tests.support.training import replica_rows

pytestmark = pytest.mark.parallel

CHUNKS = {"kernels": KernelConfig(loss_chunk_tokens=5), "num_steps": 3}
SCENARIOS = {
    "sgd": Scenario(drop_path_rate=0.5, changes={"optimizer": SGD, **CHUNKS}),
    "adamw": Scenario(changes={"optimizer": ADAMW, **CHUNKS}),
    "recomputed": Scenario(
        changes={"optimizer": SGD, **CHUNKS},
        parallel_changes={"vision_recompute": "full", "language_recompute": "full", "vision_window_rows": 2},
    ),
}


def waits_of_steps(info: RankInfo, ranks: Ranks, scenarios: dict[str, Scenario]) -> dict[str, list[tuple[str, str]]]:
    """What the second step of each scenario waits for; the first makes what stays."""
    from internvl_megatron.device import open_device
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.ranks import joined
    from tests.support.host_waits import HostWaits
    from tests.support.training import make_step

    torch.set_num_threads(1)
    device = open_device("cpu")
    found = {}
    with joined(info, device, 60):
        groups = make_groups(ranks.layout, device, 60, ranks.vision_layout)
        for name, scenario in scenarios.items():
            config = scenario.config(ranks)
            step, model = make_step(config, None, groups, device)
            batches: list[Any] = [replica_rows(scenario, config, index, ranks.layout, info.rank) for index in range(3)]
            step.run(batches[0], 0)
            waits = HostWaits(lambda clock=step.clock: clock._open[-1][0] if clock._open else "end")
            parameters: Any = dict(model.named_parameters())
            for parameter in parameters.values():
                waits.note(parameter)
                waits.note(parameter.main_grad)
            windows: Any = step.windows

            def make_watched(*args: Any, waits: HostWaits = waits, make: Any = windows._make) -> Any:
                with waits.in_this_thread():
                    return make(*args)

            windows._make = make_watched
            with waits.in_this_thread():
                step.run(batches[1], 1, batches[2])
            found[name] = waits.found
    return found


@pytest.mark.parametrize("layout", ["1", "TP2+SPxPP2"])
def test_the_host_waits_for_norm_and_loss_alone(run_ranks: Callable[..., list[Any]], layout: str) -> None:
    ranks = LAYOUTS[layout]
    for rank, by_scenario in enumerate(run_ranks(waits_of_steps, ranks.num_ranks, ranks, SCENARIOS)):
        for name, found in by_scenario.items():
            inside = [wait for wait in found if wait[0] not in ("update", "end")]
            assert not inside, f"{name}, rank {rank}: {inside}"
            phases = [phase for phase, _ in found]
            assert phases.count("update") == 1, f"{name}, rank {rank}: the norm of all gradients, not {found}"
            has_loss = rank in (0, 1) if ranks.pipeline_size == 1 else rank == 2
            assert phases.count("end") == has_loss, f"{name}, rank {rank}: {found}"


def test_what_makes_the_host_wait_is_seen() -> None:
    from tests.support.host_waits import HostWaits

    waits = HostWaits(lambda: "here")
    host, device = torch.arange(3.0), torch.arange(3.0)
    waits.note(device)
    calls: dict[str, Callable[[], object]] = {
        "tolist": lambda: (device * 2).tolist(),
        "item": lambda: device.sum().item(),
        "bool": lambda: bool(device.any()),
        "cpu": lambda: device[1:].cpu(),
        "numpy": lambda: device.numpy(),
        "nonzero": lambda: device.nonzero(),
        "mask": lambda: device[device > 1],
        "unique": lambda: device.unique(),
        "host index": lambda: device[torch.tensor([0, 1])],
        "host copy": lambda: device.copy_(host),
        "made there": lambda: torch.tensor([1.0], device=torch.device("cpu")),
        "made of values there": lambda: torch.tensor([device[0], device[1]]),
    }
    silent: dict[str, Callable[[], object]] = {
        "host values": lambda: (host.tolist(), host[host > 1].sum().item(), host.numpy()),
        "device index": lambda: device[(device * 0).long()],
        "masked number": lambda: device.masked_fill(device > 1, 0.0),
        "kept on the host": lambda: torch.empty(3, device="cpu").copy_(device),
        "filled": lambda: torch.full((3,), 1.0, device=torch.device("cpu")),
    }
    for name, call in (calls | silent).items():
        waits.found.clear()
        with waits.in_this_thread():
            call()
        assert bool(waits.found) == (name in calls), f"{name}: {waits.found}"
