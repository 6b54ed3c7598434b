"""What a record of measurements says of the machine, the software and the code they were made with."""

import datetime
import importlib.util
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "flash-attn",
    "transformers",
    "triton",
    "nvidia-cudnn-cu13",
)
REPOSITORY = Path(__file__).resolve().parent.parent


def machine_record() -> dict[str, Any]:
    """GPU, driver, versions, date and commit. Starts nothing on a GPU: a helper program of the driver is asked."""
    gpu = query_gpu()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "gpu": gpu["name"] if gpu else None,
        "gpu_memory_bytes": gpu["memory_bytes"] if gpu else None,
        "driver": gpu["driver"] if gpu else None,
        "cuda_runtime": _cuda_runtime(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        "versions": {package: package_version(package) for package in PACKAGES},
    }


def query_gpu() -> dict[str, Any] | None:
    """Name, driver and memory of the first GPU; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    fields = "--query-gpu=name,driver_version,memory.total"
    asked = subprocess.run(
        ["nvidia-smi", fields, "--format=csv,noheader,nounits"], capture_output=True, text=True, check=False
    )
    return parse_gpu(asked.stdout) if asked.returncode == 0 else None


def parse_gpu(answer: str) -> dict[str, Any] | None:
    """The first line of what the driver's program says."""
    parts = [part.strip() for part in answer.partition("\n")[0].split(",")]
    if len(parts) != 3 or not parts[2].isdigit():
        return None
    return {"name": parts[0], "driver": parts[1], "memory_bytes": int(parts[2]) * 2**20}


def package_version(package: str) -> str | None:
    """Of an installed package; None without it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def is_installed(module: str) -> bool:
    """Whether a module can be imported, without doing so."""
    return importlib.util.find_spec(module) is not None


def _cuda_runtime() -> str | None:
    """Of the installed torch: its version says so after the plus sign."""
    build = (package_version("torch") or "").partition("+")[2]
    return build or None


def _commit() -> str | None:
    """Of the checkout, with a mark if files differ from it; None outside of one."""
    if shutil.which("git") is None:
        return None
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() or None
