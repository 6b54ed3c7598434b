"""Look at the nodes of a job before a run starts on them, and name those to leave out. `launch/slurm/train.sbatch` runs it.

    srun --ntasks-per-node=1 python -m tools.preflight node REPORTS --run-folder RUN --gpus 8    # every node about itself
    srun                     python -m tools.preflight bandwidth REPORTS                          # all ranks together
    python -m tools.preflight judge REPORTS --hosts n1,n2 --started SECONDS                       # bad nodes, a line each

A node reports GPUs (number, kind, uncorrected memory errors), room and write access in the run's folder, its clock, and versions. A node is
bad if it does not report, has fewer GPUs than asked for or memory errors, cannot write, or if its kind of GPU, versions or bandwidth differ
from what most nodes have. Reasons go to stderr, names to stdout; exit code 0 = all are good, 1 = some are not, 2 = the user can mend it.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from internvl_megatron.errors import DataError, UserError
from internvl_megatron.ranks import RankInfo, joined, rank_from_environment

FEWEST_FREE_BYTES = 50e9
"""In the run's folder: a checkpoint of a large model is larger, but this is already too little for any."""
CLOCK_SLACK_SECONDS = 5.0
SLOW_SHARE = 0.7
"""Of the median bandwidth; a node below is slow."""
MESSAGE_BYTES = 256 * 2**20
"""Of a measured all-reduce: large enough that latency does not matter."""
PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn", "numpy")
GPU_QUERY = "name,memory.total,ecc.errors.uncorrected.volatile.total,driver_version"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the three commands."""
    parser = argparse.ArgumentParser(description="Look at the nodes of a job before a run starts.")
    commands = parser.add_subparsers(required=True, dest="command")
    node = commands.add_parser("node", help="write this node's report")
    node.add_argument("--run-folder", type=Path, required=True)
    node.add_argument("--gpus", type=int, help="so many are expected; left out: none are looked for")
    bandwidth = commands.add_parser("bandwidth", help="time all-reduces inside nodes and between neighbours")
    bandwidth.add_argument("--megabytes", type=int, default=MESSAGE_BYTES // 2**20)
    judge = commands.add_parser("judge", help="name the bad nodes")
    judge.add_argument("--hosts", required=True, help="names of all nodes, as SLURM has them, with commas")
    judge.add_argument("--started", type=float, help="when the reports were asked for, in seconds since 1970")
    judge.add_argument("--inside-gbs", type=float, help="bandwidth expected inside a node, in GB/s")
    judge.add_argument("--between-gbs", type=float, help="bandwidth expected between two nodes, in GB/s")
    for command in (node, bandwidth, judge):
        command.add_argument("reports", type=Path, help="folder that all nodes share")
    options = parser.parse_args(arguments)
    try:
        if options.command == "node":
            _write(options.reports / f"{host_name()}.json", node_report(options.run_folder, options.gpus))
            return 0
        if options.command == "bandwidth":
            info = rank_from_environment()
            if info is None:
                raise DataError("bandwidth is measured by several ranks: start it with srun")
            measure(info, options.reports, options.megabytes * 2**20)
            return 0
        expected = {"inside": options.inside_gbs, "between": options.between_gbs}
        bad = judged(options.reports, options.hosts.split(","), options.started, expected)
    except UserError as error:
        print(f"preflight: {error}", file=sys.stderr)
        return 2
    for name, reasons in bad.items():
        print(f"preflight: {name}: {'; '.join(reasons)}", file=sys.stderr)
        print(name)
    return 1 if bad else 0


def host_name() -> str:
    """This node as SLURM calls it, or as it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def node_report(run_folder: Path, num_gpus: int | None) -> dict[str, Any]:
    """What a node says about itself; `problems` are those it can tell alone."""
    gpus, problems = _gpus() if num_gpus is not None else ([], [])
    if num_gpus is not None and len(gpus) != num_gpus:
        problems.append(f"{len(gpus)} GPUs, {num_gpus} expected")
    problems += [
        f"GPU {index}: {gpu['errors']} uncorrected memory errors" for index, gpu in enumerate(gpus) if gpu["errors"]
    ]
    free_bytes = 0
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        probe = run_folder / f".preflight-{host_name()}"
        probe.write_text("written")
        probe.unlink()
        free_bytes = shutil.disk_usage(run_folder).free
        if free_bytes < FEWEST_FREE_BYTES:
            problems.append(
                f"{run_folder} has {free_bytes / 1e9:.1f} GB left, less than {FEWEST_FREE_BYTES / 1e9:.0f}"
            )
    except OSError as error:
        problems.append(f"{run_folder} cannot be written ({error.strerror})")
    return {
        "time": time.time(),
        "problems": problems,
        "gpu": sorted({f"{gpu['name']}, {gpu['memory']}" for gpu in gpus}),
        "versions": _versions() | ({"driver": gpus[0]["driver"]} if gpus else {}),
        "free_bytes": free_bytes,
    }


def judged(
    reports: Path, hosts: list[str], started: float | None, expected: dict[str, float | None]
) -> dict[str, list[str]]:
    """Bad nodes with the reasons.

    Raises:
        DataError: no node reported at all: then it is not the nodes.
    """
    found = {name: _read(reports / f"{name}.json") for name in hosts}
    known = {name: report for name, report in found.items() if report is not None}
    if not known:
        raise DataError(f"{reports}: no node has reported; is that folder on a disk that all nodes share?")
    bad: dict[str, list[str]] = {name: [] for name in hosts}
    for name, report in found.items():
        if report is None:
            bad[name].append("did not report")
            continue
        bad[name] += report["problems"]
        if started is not None and not -CLOCK_SLACK_SECONDS <= report["time"] - started <= (
            time.time() - started + CLOCK_SLACK_SECONDS
        ):
            bad[name].append(f"its clock is off by about {report['time'] - started:+.0f} s")
    for field in ("gpu", "versions"):
        _unlike_most({name: report[field] for name, report in known.items()}, field, bad)
    speeds = {name: _read(reports / f"{name}.bandwidth.json") for name in hosts}
    for kind, least in expected.items():
        _slow({name: speed[kind] for name, speed in speeds.items() if speed and speed.get(kind)}, kind, least, bad)
    return {name: reasons for name, reasons in bad.items() if reasons}


def _unlike_most(values: dict[str, Any], what: str, bad: dict[str, list[str]]) -> None:
    texts = {name: json.dumps(value, sort_keys=True) for name, value in values.items()}
    usual, count = Counter(texts.values()).most_common(1)[0]
    if count * 2 <= len(texts) and len(texts) > 1:
        print(f"preflight: {what}: no value is had by most nodes: {dict(Counter(texts.values()))}", file=sys.stderr)
    for name, text in texts.items():
        if text != usual:
            bad[name].append(f"{what} {text}, unlike most nodes' {usual}")


def _slow(speeds: dict[str, float], kind: str, least: float | None, bad: dict[str, list[str]]) -> None:
    usual = median(speeds.values()) if speeds else 0.0
    for name, speed in speeds.items():
        if least is not None and speed < least:
            bad[name].append(f"all-reduce {kind} {speed:.1f} GB/s, {least:g} expected")
        elif speed < SLOW_SHARE * usual:
            bad[name].append(f"all-reduce {kind} {speed:.1f} GB/s, the median is {usual:.1f}")


def measure(info: RankInfo, reports: Path, message_bytes: int) -> None:
    """Bandwidth of all-reduces, by all ranks: inside every node at once, then with the next node and with the one before.

    The speed between nodes is a node's better one of the two, so that a slow neighbour does not count against it.
    """
    import torch
    import torch.distributed as dist

    from internvl_megatron.device import open_device

    device, per_node = open_device("auto", info.local_rank), info.local_world_size
    num_nodes, node = info.world_size // per_node, info.rank // per_node
    with joined(info, device, timeout_seconds=300):
        data = torch.zeros(message_bytes // 4, device=device.torch_device)

        def speed(groups: list[list[int]]) -> float | None:
            """GB/s of this rank's group, in the convention of NCCL's tests (bus bandwidth); None if it is in none."""
            mine = None
            for ranks in groups:
                group = dist.new_group(ranks)  # every rank takes part in making every group
                if isinstance(group, dist.ProcessGroup) and info.rank in ranks:
                    mine = group
            members = next((len(ranks) for ranks in groups if info.rank in ranks), 1)
            seconds = []
            for _ in range(4):  # the first one connects
                dist.barrier()
                start = time.perf_counter()
                if mine is not None:
                    dist.all_reduce(data, group=mine)
                device.synchronize()
                seconds.append(time.perf_counter() - start)
            if mine is None or members == 1:
                return None
            return 2 * (members - 1) / members * message_bytes / min(seconds[1:]) / 1e9

        nodes = [list(range(first, first + per_node)) for first in range(0, info.world_size, per_node)]
        inside = speed(nodes)
        pairs = [[nodes[one] + nodes[one + 1] for one in range(start, num_nodes - 1, 2)] for start in (0, 1)]
        between = [found for groups in pairs if groups and (found := speed(groups)) is not None]
        if info.local_rank == 0:
            _write(
                reports / f"{host_name()}.bandwidth.json",
                {"inside": inside, "between": max(between, default=None), "node": node},
            )


def _gpus() -> tuple[list[dict[str, Any]], list[str]]:
    command = ["nvidia-smi", f"--query-gpu={GPU_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        return [], [f"nvidia-smi: {error}"]
    if done.returncode:
        return [], [f"nvidia-smi: {(done.stderr or done.stdout).strip()}"]
    gpus = []
    for line in done.stdout.splitlines():
        name, memory, errors, driver = (part.strip() for part in line.split(","))
        gpus.append(
            {"name": name, "memory": memory, "errors": int(errors) if errors.isdecimal() else 0, "driver": driver}
        )
    return gpus, []


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); remove it") from error


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(f"{path.name}.writing")
    writing.write_text(json.dumps(content, indent=1))
    writing.replace(path)


if __name__ == "__main__":
    sys.exit(main())
