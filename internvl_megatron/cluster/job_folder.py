"""A job's folder: everything that says what ran, and the script that runs it.

RUN/jobs/0001/   job.sbatch, launch/ (as it was), config.json, commit.txt, changes.patch, environment.txt,
                 jobs (ids), ends (how every attempt ended), progress, logs/JOB-ATTEMPT/train-RANK.log, slurm-JOB.log
"""

import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from internvl_megatron.cluster.request import JobRequest
from internvl_megatron.config.overrides import CONFIG_FILE, to_json
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.errors import ConfigError

JOBS = "jobs"
"""Folder of a run that holds its jobs' folders."""
SCRIPT = "job.sbatch"
IDS_FILE = "jobs"
CHECKOUT = Path(__file__).resolve().parents[2]
RECORDED = re.compile(
    r"(?!SLURM_JWT)(CUDA|FI|GLOO|HF_HUB|MASTER|MKL|NCCL|NVTE|OMP|ONEDNN|PYTHON|PYTORCH|SLURM|TORCH|UCX)_\w+|PYTHON\w*"
)
"""Environment variables that are written down: what the numerics and the network depend on, and nothing that is secret."""


def newest_job(run_folder: Path) -> Path:
    """Folder of a run's newest job.

    Raises:
        ConfigError: it has none.
    """
    jobs = _numbered(run_folder / JOBS)
    if not jobs:
        raise ConfigError(
            f"{run_folder}: no job was launched there ({run_folder / JOBS} has none); give the run's folder"
        )
    return jobs[-1]


def job_ids(job: Path) -> list[str]:
    """SLURM's ids of a job, oldest first: it goes on as a new one where it cannot be requeued."""
    path = job / IDS_FILE
    return path.read_text().split() if path.is_file() else []


def record_id(job: Path, job_id: str) -> None:
    """Add SLURM's id of a job that was submitted."""
    with (job / IDS_FILE).open("a") as file:
        file.write(f"{job_id}\n")


def write_job(config: RunConfig, request: JobRequest, counts: list[int]) -> Path:
    """Make the folder of a new job; it appears when it is whole.

    Raises:
        ConfigError: it cannot be written, or this installation has no launch scripts.
    """
    scripts = CHECKOUT / "launch"
    if not (scripts / "slurm" / "train.sbatch").is_file():
        raise ConfigError(f"{scripts}: not there; jobs run from a checkout of the sources: clone it and `make setup`")
    root = (Path(config.folder) / JOBS).resolve()
    try:
        root.mkdir(parents=True, exist_ok=True)
        known = _numbered(root)
        target = root / f"{int(known[-1].name) + 1 if known else 1:04d}"
        writing = target.with_name(f"{target.name}.writing")
        shutil.rmtree(writing, ignore_errors=True)
        shutil.copytree(scripts, writing / "launch", ignore=shutil.ignore_patterns("__pycache__"))
        (writing / CONFIG_FILE).write_text(f"{to_json(config)}\n")
        (writing / "environment.txt").write_text(_environment())
        commit, changes = _sources()
        (writing / "commit.txt").write_text(commit)
        (writing / "changes.patch").write_text(changes)
        (writing / SCRIPT).write_text(script(config, request, counts, target))
        writing.rename(target)
    except OSError as error:
        raise ConfigError(
            f"{root}: the job's folder cannot be written ({error}); choose another (folder=PATH)"
        ) from error
    return target


def script(config: RunConfig, request: JobRequest, counts: list[int], job: Path) -> str:
    """The batch script: options for sbatch, variables, and `launch/slurm/train.sbatch` as it was when it was launched."""
    nodes = f"{counts[-1]}-{request.nodes}" if len(counts) > 1 else str(request.nodes)
    options = {
        "job-name": config.name,
        "output": job / "slurm-%j.log",
        "open-mode": "append",  # a job that is requeued goes on with its log
        "nodes": nodes,
        "ntasks-per-node": request.gpus_per_node,
        "time": request.time,
        "partition": request.partition,
        "account": request.account,
        "signal": f"B:USR1@{request.notice_seconds}",
        "requeue": "",
    }
    if config.device != "cpu":
        # Whole nodes: data are decoded on all their cores, and a neighbour would slow every rank down.
        options |= {"gpus-per-node": request.gpus_per_node, "exclusive": "", "mem": 0}
    variables = {
        "LAUNCH_FOLDER": job / "launch",
        "JOB_FOLDER": job,
        "RUN_FOLDER": Path(config.folder).resolve(),
        "NODE_COUNTS": " ".join(map(str, counts)),
        "PYTHON": request.python or ("python3" if request.container else sys.executable),
        "CONTAINER": request.container,
        "CONTAINER_MOUNTS": request.container_mounts,
        "EXPECTED_GPUS": None if config.device == "cpu" else request.gpus_per_node,
        "NODE_ORDER": request.node_order,
        "PREFLIGHT": request.preflight,
    }
    lines = [
        f"#SBATCH --{name}" + (f"={value}" if value != "" else "")
        for name, value in options.items()
        if value is not None
    ]
    exports = [f"export {name}={shlex.quote(str(value))}" for name, value in variables.items() if value is not None]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            "# Written by `internvl-megatron launch`. Submitted again (sbatch, and this file) it continues the run.",
            *lines,
            *(f"#SBATCH {option}" for option in request.sbatch_options),
            "set -euo pipefail",
            f"cd {shlex.quote(str(Path.cwd()))}",
            *exports,
            f"export PYTHONPATH={shlex.quote(str(CHECKOUT))}${{PYTHONPATH:+:$PYTHONPATH}}",
            'exec bash "$LAUNCH_FOLDER/slurm/train.sbatch" "$JOB_FOLDER/config.json"',
            "",
        ]
    )


def _numbered(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("[0-9]*") if re.fullmatch(r"\d{4,}", path.name))


def _environment() -> str:
    packages = sorted(
        {f"{found.metadata['Name']}=={found.version}" for found in importlib.metadata.distributions()}, key=str.lower
    )
    variables = sorted(f"{name}={value}" for name, value in os.environ.items() if RECORDED.fullmatch(name))
    return "\n".join([f"{platform.node()}: Python {platform.python_version()}", "", *variables, "", *packages, ""])


def _sources() -> tuple[str, str]:
    """The commit of the checkout with what git says is changed, and the changes themselves."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return "not a git checkout\n", ""
    return f"{commit}{_git('status', '--short') or ''}", _git("diff", "--binary", "HEAD") or ""


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(CHECKOUT), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
