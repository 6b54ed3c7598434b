"""Who this process is in the world, and joining it."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from internvl_megatron.device import Device
from internvl_megatron.errors import ConfigError

PORTS = range(20000, 30000)
"""Where ranks of a SLURM job meet unless MASTER_PORT says; below the ports that Linux gives to clients by itself."""
DEFAULT_PORT = 29500
"""The same under mpirun: torch's usual one."""


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


def rank_from_environment(environment: Mapping[str, str] = os.environ) -> RankInfo | None:
    """The place that torchrun, mpirun or srun gave this process; None when it was started by itself.

    mpirun may start its processes through srun, and torchrun may be started by either, so the innermost is asked first. Under
    srun and mpirun, MASTER_ADDR and MASTER_PORT say where ranks meet; without them they meet on the first host of the job.

    Raises:
        ConfigError: some of the variables are set and others are missing or not numbers.
    """
    variables = _Variables(environment)
    if "RANK" in environment and "WORLD_SIZE" in environment:  # torchrun
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in environment:
                raise ConfigError(f"environment: RANK is set but {name} is not; set both, or start without torchrun")
    elif "OMPI_COMM_WORLD_RANK" in environment:  # Open MPI
        names = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    elif "PMI_RANK" in environment and "MPI_LOCALRANKID" in environment:  # MPICH, Intel MPI
        names = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    elif "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:  # srun; a batch script has no step
        rank, world_size = variables.number("SLURM_PROCID"), variables.number("SLURM_STEP_NUM_TASKS")
        if world_size == 1 and "MASTER_ADDR" not in environment:
            return None  # a shell, or a launcher of local ranks
        tasks = tasks_per_node(variables.text("SLURM_STEP_TASKS_PER_NODE"))
        node = variables.number("SLURM_NODEID")
        if node >= len(tasks) or sum(tasks) != world_size:
            raise ConfigError(
                f"environment: SLURM_STEP_TASKS_PER_NODE={environment['SLURM_STEP_TASKS_PER_NODE']!r} does not describe "
                f"{world_size} tasks (SLURM_STEP_NUM_TASKS) with a node {node} (SLURM_NODEID); srun sets them"
            )
        return RankInfo(
            rank, world_size, variables.number("SLURM_LOCALID"), tasks[node], _meeting_place(variables, tasks[0])
        )
    else:
        return None
    rank, world_size, local_rank, local_world_size = (variables.number(name) for name in names)
    if not (0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size):
        values = ", ".join(f"{name}={environment[name]}" for name in names)
        raise ConfigError(f"environment: {values} do not fit together; torchrun and mpirun set them")
    return RankInfo(
        rank, world_size, local_rank, local_world_size, _meeting_place(variables, local_world_size, world_size)
    )


def tasks_per_node(text: str) -> list[int]:
    """Tasks on every node of a SLURM step, from its short form: "8(x2),4" is 8, 8, 4.

    Raises:
        ConfigError: it is not of that form.
    """
    tasks = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError(
                f"environment: {text!r} does not say how many tasks nodes have, as in 8(x2),4; srun sets it"
            )
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks


def first_host(text: str) -> str:
    """The first host of SLURM's short form of a list: "n[08-10,12],login1" is n08.

    Raises:
        ConfigError: it has none.
    """
    match = re.match(r"([^\[\],]+)(?:\[(\w+)[^\]]*\]([^\[\],]*))?", text)
    if match is None:
        raise ConfigError(
            f"environment: the list of hosts {text!r} has no first one; set MASTER_ADDR to rank 0's host"
        )
    return "".join(part or "" for part in match.groups())


def _meeting_place(variables: "_Variables", local_world_size: int, world_size: int | None = None) -> str:
    """Where ranks meet, as torch.distributed takes it: given, or the first host and a port that follows from the job."""
    given = variables.environment
    hosts = given.get("SLURM_STEP_NODELIST") or given.get("SLURM_JOB_NODELIST")
    if "MASTER_ADDR" in given:
        address = given["MASTER_ADDR"]
    elif world_size == local_world_size:
        address = "127.0.0.1"
    elif hosts:
        address = first_host(hosts)
    else:
        raise ConfigError(
            "environment: mpirun has started ranks on several hosts; say on which rank 0 is, and give all ranks "
            "the same (mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=PORT, or -genv NAME VALUE)"
        )
    if "MASTER_PORT" in given:
        port = variables.number("MASTER_PORT")
    elif "SLURM_JOB_ID" in given:  # jobs that share a host differ
        port = PORTS.start + variables.number("SLURM_JOB_ID") % len(PORTS)
    else:
        port = DEFAULT_PORT
    return f"tcp://{address}:{port}"


@contextmanager
def joined(info: RankInfo, device: Device, timeout_seconds: int) -> Iterator[None]:
    """Join the world for the duration of a block.

    Leaving normally waits for nobody; leaving by an exception does not either, because the other ranks may be stuck in a
    collective this rank never entered.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    timeout = timedelta(seconds=timeout_seconds)
    store, rank, world_size = next(rendezvous(info.init_method, info.rank, info.world_size, timeout=timeout))
    store = PrefixStore(_attempt(os.environ), store)
    dist.init_process_group(device.backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    yield
    dist.destroy_process_group()


def _attempt(environment: Mapping[str, str]) -> str:
    """Where ranks write in their store, new for each restart: torchrun's agent keeps one store over them all.

    Ranks of an earlier attempt leave their addresses there, which those of the next would call.
    """
    return f"attempt_{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"


@dataclass(frozen=True)
class _Variables:
    """Environment variables, read with errors that name them."""

    environment: Mapping[str, str]

    def text(self, name: str) -> str:
        if name not in self.environment:
            raise ConfigError(
                f"environment: {name} is not set, but others of its kind are; torchrun, srun and mpirun set it"
            )
        return self.environment[name]

    def number(self, name: str) -> int:
        value = self.text(name)
        if not re.fullmatch(r"\d+", value):
            raise ConfigError(f"environment: {name}={value!r} is not a number; torchrun, srun and mpirun set it")
        return int(value)
