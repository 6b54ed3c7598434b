"""What is installed, what is active, and what each optional part changes."""

import importlib.metadata
import importlib.util
import os
import platform
import sys
from dataclasses import dataclass

from internvl_megatron.device import describe_machine

REQUIRED = (
    "torch", "megatron-core", "transformers", "safetensors", "sentencepiece", "numpy", "pillow",
    "tensorboard", "tqdm", "zarr", "psutil", "triton",
)  # fmt: skip


@dataclass(frozen=True)
class OptionalPart:
    """A package the trainer uses when it is there."""

    package: str
    module: str
    with_it: str
    without_it: str


OPTIONAL = (
    OptionalPart(
        "transformer-engine",
        "transformer_engine",
        "Megatron Core uses its fused Adam and fused gradient norm",
        "Megatron Core uses torch's AdamW and a gradient norm per tensor: slower steps, same numbers",
    ),
    OptionalPart(
        "flash-attn",
        "flash_attn",
        "packed attention on GPUs in bf16 runs as one flash_attn_varlen call per layer",
        "packed attention on GPUs in bf16 uses torch's own variable-length kernel",
    ),
    OptionalPart(
        "wandb",
        "wandb",
        "runs with wandb_project=NAME show in Weights & Biases as well",
        "runs show in TensorBoard",
    ),
    OptionalPart(
        "nvidia-resiliency-ext",
        "nvidia_resiliency_ext",
        "found, not used yet",
        "nothing is missing",
    ),
)


def report() -> str:
    """The whole report as text. Imports torch; starts nothing on a GPU but a query."""
    return "\n".join([*_versions(), "", *_device(), "", *_optional(), *_warnings()])


def _versions() -> list[str]:
    lines = [f"python                {platform.python_version()}  ({sys.executable})"]
    for package in REQUIRED:
        lines.append(f"{package:21s} {_version(package) or 'MISSING: pip install it, or run make setup'}")
    return lines


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> list[str]:
    return [f"{what:21s} {value}" for what, value in describe_machine()]


def _optional() -> list[str]:
    lines = ["optional parts"]
    for part in OPTIONAL:
        found = importlib.util.find_spec(part.module) is not None
        version = f"{_version(part.package) or 'active'}: {part.with_it}" if found else f"absent: {part.without_it}"
        lines.append(f"  {part.package:21s} {version}")
    return lines


def _warnings() -> list[str]:
    warnings = []
    if _version("apex") is not None and importlib.util.find_spec("amp_C") is None:
        warnings.append(
            "the installed package 'apex' is not NVIDIA Apex but a web toolkit of that name on PyPI: pip uninstall apex"
        )
    if _traps_amx() and "ONEDNN_MAX_CPU_ISA" not in os.environ:
        warnings.append(
            "this CPU claims AMX; inside some virtual machines bf16 then dies with SIGILL. If it does, set "
            "ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 before Python starts (make does)"
        )
    return ["", *(f"warning: {warning}" for warning in warnings)] if warnings else []


def _traps_amx() -> bool:
    """Whether the CPU claims AMX while running under a hypervisor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123 - a kernel interface, not a path of ours
            text = file.read()
    except OSError:
        return False
    return "amx_tile" in text and "hypervisor" in text
