"""The real training step on one rank, timed: what `benchmark gpu` measures, and what the Hugging Face baseline is held against.

The same rows are trained on again and again, from memory: reading and decoding are not timed, everything else of a step is,
the plan of the next step and its tiles on their way while this one computes included.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from internvl_megatron.config.schema import RunConfig
from internvl_megatron.data.rows import Row
from internvl_megatron.device import Device
from internvl_megatron.ranks import RankInfo
from tools.image_text_rows import RandomPixels

if TYPE_CHECKING:
    from internvl_megatron.model.build import Model

TIMEOUT_SECONDS = 600


def train_rank(
    info: RankInfo, config: RunConfig, rows: Sequence[Row], num_warmup: int, num_steps: int
) -> dict[str, Any]:
    """Body of the rank: seconds of every measured step, of its phases (medians), losses, peak memory."""
    from internvl_megatron.config.plan import plan
    from internvl_megatron.device import open_device
    from internvl_megatron.logs import configure_logging
    from internvl_megatron.model.build import build_model, torch_dtype
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.ranks import joined
    from internvl_megatron.train.phases import total_seconds
    from internvl_megatron.train.step import Step

    configure_logging(info.rank)
    use_own_cores()
    device = open_device(config.device, info.local_rank)
    with joined(info, device, TIMEOUT_SECONDS):
        groups = make_groups(plan(config, info.world_size).layout, device, TIMEOUT_SECONDS)
        model = build_model(config, groups, device, initialize=False)
        fill_on_device(model)
        step = Step(config, model, groups, device)
        batch: Any = RandomPixels(list(rows), config.model, 0, 1)
        losses, phases = [], []

        def run(number: int) -> None:
            result = step.run(batch, number, following=batch)
            losses.append(result.loss)
            phases.append(total_seconds(result.spans))

        seconds = timed(run, num_warmup, num_steps, device)
        measured = phases[num_warmup:]
        return {
            **device_facts(device),
            "attention": device.kernels(config).attention,
            "seconds": seconds,
            "phase_seconds": {
                name: statistics.median(phase.get(name, 0.0) for phase in measured) for name in measured[0]
            },
            "losses": losses,
            "peak_flops_per_second": device.peak_flops(torch_dtype(config.dtype)),
        }


def use_own_cores() -> None:
    """As many threads as this process has cores, as the trainer does: torch takes all of the machine's."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))


def timed(run: Callable[[int], None], num_warmup: int, num_steps: int, device: Device) -> list[float]:
    """Seconds of `run(number)` by step, the device idle before and after; the first ones are not among them."""
    seconds = []
    for number in range(num_warmup + num_steps):
        if number == num_warmup:
            forget_peak_memory(device)
        device.synchronize()
        start = time.perf_counter()
        run(number)
        device.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[num_warmup:]


def forget_peak_memory(device: Device) -> None:
    """Count the peak from here; a CPU's cannot be set back."""
    if device.kind == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()


def device_facts(device: Device) -> dict[str, Any]:
    """What every record says of the device it was made on."""
    return {"device": device.name(), "peak_memory_bytes": device.peak_memory_bytes()}


def fill_on_device(model: "Model") -> None:
    """Random weights where they are: filling billions by name on the host, as training does, would take minutes."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02)
            elif "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
            else:
                parameter.fill_(0.1 if name.endswith(("ls1", "ls2")) else 0.0)
