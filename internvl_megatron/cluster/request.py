"""A run on a number of nodes: checked as a whole before anything is submitted, and described for people."""

import re
import tomllib
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from internvl_megatron.cluster.node_order import Near
from internvl_megatron.config.overrides import apply_overrides
from internvl_megatron.config.plan import RunPlan, plan
from internvl_megatron.config.recipe_settings import STAGES
from internvl_megatron.config.recipes import find_recipe
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.errors import ConfigError
from internvl_megatron.parallel.layout import Layout
from internvl_megatron.recipe_report import layout_and_memory
from internvl_megatron.scaling.drawn_rows import drawn_workload
from internvl_megatron.scaling.gpus import GpuKind, find_gpu
from internvl_megatron.scaling.memory import USED_SHARE, rank_bytes
from internvl_megatron.scaling.planner import judge

Preflight = Literal["on", "bandwidth", "off"]
TABLES = ("any", *STAGES)
"""Of a settings file: for every recipe, or for those of a stage."""
PREDICTED_IMAGE_SHARE = 0.5
LONGEST_NOTICE_SECONDS = 24 * 3600
_DAYS = re.compile(r"(\d+)-(\d+)(?::(\d+))?(?::(\d+))?")
_CLOCK = re.compile(r"(?:(?:(\d+):)?(\d+):(\d+)|(\d+))")


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """What is asked of the cluster."""

    nodes: int
    gpus_per_node: int
    """Ranks of each node, one a GPU; of a run on CPUs, one a process."""
    min_nodes: int | None = None
    """The job may also run on fewer nodes, down to these, as far as its layout fits; None = on `nodes` only."""
    time: str | None = None
    """Time limit as sbatch takes it; None = the partition's."""
    notice_seconds: int = 300
    """So long before the time limit the run is told to save and stop."""
    partition: str | None = None
    account: str | None = None
    container: str | None = None
    """`pyxis:IMAGE` or `apptainer:IMAGE`; None = the Python that launches."""
    container_mounts: str | None = None
    python: str | None = None
    """Interpreter of the job; None = the one that launches, or `python3` in a container."""
    preflight: Preflight = "on"
    """Look at the nodes before the run starts; `bandwidth`: and time their network."""
    node_order: Near | None = None
    """What is near in the network (`node_order.py`); None = nodes in SLURM's order."""
    gpu: str | None = None
    """Kind of the GPUs (`scaling/gpus.py`), for which a step is predicted; None = no prediction."""
    memory_gb: float = 80.0
    """Memory of a GPU."""
    sbatch_options: tuple[str, ...] = field(default=())
    """Handed on to sbatch as they are."""

    @property
    def num_ranks(self) -> int:
        """Ranks on all nodes."""
        return self.nodes * self.gpus_per_node


def requested_config(recipe: str, num_ranks: int, settings: Path | None, overrides: list[str]) -> RunConfig:
    """The configuration of a recipe on so many ranks, with a settings file's values and then the command line's.

    Raises:
        ConfigError: there is no such recipe, file or setting.
    """
    from_file = [] if settings is None else settings_of(settings, recipe, num_ranks)
    return apply_overrides(find_recipe(recipe, num_ranks), [*from_file, *overrides])


def settings_of(path: Path, recipe: str, num_ranks: int) -> list[str]:
    """Overrides that a settings file has for a recipe on a number of GPUs: tables `[any.64]` and, after it, `[sft.64]`.

    Raises:
        ConfigError: the file cannot be read, or has no table for this number; names those it has.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML ({error})") from error
    wrong = [name for name, tables in content.items() if name not in TABLES or not _is_table_of_tables(tables)]
    if wrong:
        raise ConfigError(f"{path}: {wrong[0]!r}: expected tables [STAGE.GPUS], with a stage of {', '.join(TABLES)}")
    found = [content.get(stage, {}).get(str(num_ranks)) for stage in ("any", recipe.rpartition("_")[2])]
    if found == [None, None]:
        known = ", ".join(map(str, sorted({int(name) for tables in content.values() for name in tables})))
        raise ConfigError(
            f"{path}: has nothing for {num_ranks} GPUs, only for {known}; add [any.{num_ranks}], or leave --settings out"
        )
    return [f"{name}={_text(value)}" for table in found if table is not None for name, value in _flat(table, "")]


def _is_table_of_tables(value: Any) -> bool:
    return isinstance(value, dict) and all(
        name.isdecimal() and isinstance(table, dict) for name, table in value.items()
    )


def _flat(table: dict[str, Any], path: str) -> list[tuple[str, Any]]:
    found = []
    for name, value in table.items():
        found += _flat(value, f"{path}{name}.") if isinstance(value, dict) else [(f"{path}{name}", value)]
    return found


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def check(config: RunConfig, request: JobRequest) -> tuple[RunPlan, list[int]]:
    """The plan on all nodes, and the numbers of nodes that the job may run on, largest first.

    Raises:
        ConfigError: something would fail on the cluster; one line per problem.
    """
    problems = _request_problems(request)
    if problems:
        raise ConfigError("\n".join(problems))
    made = plan(config, request.num_ranks)
    problems = _placement_problems(made.layout, request)
    total = rank_bytes(config, made).total
    if config.device != "cpu" and total > USED_SHARE * request.memory_gb * 1e9:
        problems.append(
            f"the fullest GPU is estimated to need {total / 1e9:.0f} GB of {request.memory_gb:g} GB (--memory-gb): more GPUs, a "
            "larger parallel.tensor_size or parallel.pipeline_size, or parallel.language_recompute=full"
        )
    if problems:
        raise ConfigError("\n".join(problems))
    counts = [request.nodes]
    for nodes in range(request.nodes - 1, (request.min_nodes or request.nodes) - 1, -1):
        try:
            smaller = plan(config, nodes * request.gpus_per_node)
        except ConfigError:
            continue
        if config.device == "cpu" or rank_bytes(config, smaller).total <= USED_SHARE * request.memory_gb * 1e9:
            counts.append(nodes)
    return made, counts


def _request_problems(request: JobRequest) -> list[str]:
    problems = [
        f"--{name.replace('_', '-')} {value}: at least 1"
        for name in ("nodes", "gpus_per_node", "min_nodes")
        if (value := getattr(request, name)) is not None and value < 1
    ]
    if request.min_nodes is not None and request.min_nodes > request.nodes:
        problems.append(f"--min-nodes {request.min_nodes} is more than --nodes {request.nodes}")
    if not 1 <= request.notice_seconds <= LONGEST_NOTICE_SECONDS:
        problems.append(f"--notice-seconds {request.notice_seconds}: from 1 to {LONGEST_NOTICE_SECONDS}")
    if request.time is not None:
        seconds = time_seconds(request.time)
        if seconds is None:
            problems.append(f"--time {request.time}: write it as MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS")
        elif seconds <= request.notice_seconds:
            problems.append(
                f"--time {request.time} is over before the run is told to save, --notice-seconds {request.notice_seconds} "
                "ahead of it: give it more time, or less notice"
            )
    if request.container is not None and not re.fullmatch(r"(pyxis|apptainer):\S+", request.container):
        problems.append(f"--container {request.container}: write pyxis:IMAGE or apptainer:IMAGE")
    if request.container_mounts is not None and request.container is None:
        problems.append("--container-mounts needs --container")
    problems += [
        f"--sbatch {option}: write it as one long option, --sbatch=--NAME or --sbatch=--NAME=VALUE"
        for option in request.sbatch_options
        if not re.fullmatch(r"--[a-z][a-z-]*(=[^\n]+)?", option)
    ]
    return problems


def time_seconds(text: str) -> int | None:
    """Seconds of a time limit as sbatch takes it: 90 or 90:00 (minutes), 1:30:00, 2-12 (days and hours), 2-12:30:00; else None."""
    if (found := _DAYS.fullmatch(text)) is not None:
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if (found := _CLOCK.fullmatch(text)) is not None:
        hours, minutes, seconds, only_minutes = (int(part or 0) for part in found.groups())
        return (hours * 60 + minutes + only_minutes) * 60 + seconds
    return None


def _placement_problems(layout: Layout, request: JobRequest) -> list[str]:
    """Tensor-parallel ranks talk in every layer: not over the network."""
    tensor, gpus = layout.tensor_size, request.gpus_per_node
    if gpus % tensor and request.num_ranks > gpus:
        return [
            f"parallel.tensor_size={tensor} does not go into the {gpus} GPUs of a node (--gpus-per-node): tensor-parallel ranks "
            "would talk over the network in every layer"
        ]
    return []


def describe(config: RunConfig, made: RunPlan, request: JobRequest, counts: list[int]) -> str:
    """The plan as text: what is trained, memory, and which nodes have which part."""
    tokens = config.num_steps * config.rows_per_step * config.data.tokens_per_row
    lines = [
        f"{config.name}: {config.num_steps} steps of {config.rows_per_step} rows x {config.data.tokens_per_row} tokens "
        f"= {tokens / 1e9:.3g} B tokens at most; writes {config.folder}",
        *layout_and_memory(config, request.num_ranks),
        *layout_picture(made.layout, request.gpus_per_node),
    ]
    if request.gpu is not None:
        lines.append(predicted_step(config, request.num_ranks, find_gpu(request.gpu)))
    if request.min_nodes is not None:
        lines.append(f"may run on {', '.join(map(str, counts))} nodes")
    return "\n".join(lines)


def predicted_step(config: RunConfig, num_ranks: int, gpu: GpuKind) -> str:
    """How long a step will take, in a line. Raises ConfigError if the GPUs cannot do what is asked of them."""
    if config.loss.kind == "mpo":
        return "steps on pairs, with their passes of the reference, are not predicted"
    workload = drawn_workload(config.data.tokens_per_row, config.data.tiles_per_row, PREDICTED_IMAGE_SHARE)
    _, time = judge(config, num_ranks, workload, gpu)
    tokens = config.rows_per_step * workload.tokens_per_row / time.total / num_ranks
    return (
        f"predicted step on {gpu.name}: {time.total:.1f} s, {tokens:.0f} tokens/s and GPU, if {PREDICTED_IMAGE_SHARE:.0%} of the tokens are of "
        "images (docs/scaling.md says how far off it may be)"
    )


def layout_picture(layout: Layout, gpus_per_node: int) -> list[str]:
    """A line for each run of nodes that hold the same pipeline stages: ranks, stages, and the replicas there."""
    nodes = []
    for first in range(0, layout.world_size, gpus_per_node):
        ranks = range(first, min(first + gpus_per_node, layout.world_size))
        nodes.append((sorted({layout.stage(rank) for rank in ranks}), ranks))
    lines, number = [], 0
    for stages, group in groupby(nodes, key=lambda node: node[0]):
        members = [ranks for _, ranks in group]
        replicas = {layout.replica(rank) for ranks in members for rank in ranks}
        first, last = members[0][0], members[-1][-1]
        lines.append(
            f"  nodes {_span(number, number + len(members) - 1):9s} ranks {_span(first, last):11s} "
            f"stage {_span(stages[0], stages[-1]):5s} replicas {_span(min(replicas), max(replicas))}"
        )
        number += len(members)
    per_node = max(1, gpus_per_node // layout.stage_size)
    return [*lines, f"  a node holds {per_node} x ({layout.tensor_size} tensor x {layout.context_size} context) ranks"]


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
