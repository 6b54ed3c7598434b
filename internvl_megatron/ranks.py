"""Who this process is in the world, and joining it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from internvl_megatron.device import Device
from internvl_megatron.errors import ConfigError


@dataclass(frozen=True)
class RankInfo:
    """Place of one process among all processes of a run."""

    rank: int
    world_size: int
    local_rank: int
    """Place among the processes of the same machine; chooses the GPU."""
    local_world_size: int
    """Processes of this run on the same machine; they share its cores."""
    init_method: str
    """How the processes find each other, as torch.distributed takes it."""


def rank_from_environment() -> RankInfo | None:
    """The place torchrun or srun gave this process; None when it was started by itself.

    Raises:
        ConfigError: some of the variables are set and others are missing or not numbers.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif "SLURM_PROCID" in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ and "MASTER_ADDR" in os.environ:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
    else:
        return None
    rank, world_size, local_rank, local_world_size = (_number(name) for name in names)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigError(f"environment: {names[0]} is set but {name} is not; set both, or start without torchrun")
    address = f"tcp://{os.environ['MASTER_ADDR']}:{_number('MASTER_PORT')}"
    return RankInfo(rank, world_size, local_rank, local_world_size, address)


@contextmanager
def joined(info: RankInfo, device: Device, timeout_seconds: int) -> Iterator[None]:
    """Join the world for the duration of a block.

    Leaving normally waits for nobody; leaving by an exception does not either, because the other ranks may be stuck in a
    collective this rank never entered.
    """
    import torch.distributed as dist

    dist.init_process_group(
        device.backend,
        init_method=info.init_method,
        rank=info.rank,
        world_size=info.world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    yield
    dist.destroy_process_group()


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    try:
        return int(value.partition("(")[0])  # SLURM writes "8(x4)" for 8 tasks on each of 4 nodes
    except ValueError:
        raise ConfigError(f"environment: {name}={value!r} is not a number; torchrun and srun set it") from None
