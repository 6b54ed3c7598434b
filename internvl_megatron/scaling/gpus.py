"""GPU kinds a step is predicted for, and the links between them: one table, from the makers' data sheets.

Peaks are dense; bandwidths are in one direction. Machines have eight GPUs, each with a network card of its own ("rail").
"""

from dataclasses import dataclass

from internvl_megatron.errors import ConfigError

GPUS_PER_MACHINE = 8


@dataclass(frozen=True)
class StepFactors:
    """What kernels of a kind take in a real step over what they take alone, by part of the step."""

    language: float
    vision: float
    update: float


@dataclass(frozen=True)
class GpuKind:
    """One kind of GPU in the machine it is sold in."""

    name: str
    memory_bytes: float
    bf16_flops: float
    """FLOP/s of dense matrix products."""
    fp8_flops: float | None
    """None where it has no FP8."""
    memory_bandwidth: float
    """Bytes/s of its own memory."""
    machine_bandwidth: float
    """Bytes/s to the other GPUs of the machine (NVLink), one direction."""
    network_bandwidth: float
    """Bytes/s to other machines, one direction."""
    source: str
    collective_latency_seconds: float = 13e-6
    """Of a collective inside a machine: smallest all-reduce on eight H100 (dgxc-benchmarking, nccl/README.md)."""
    message_latency_seconds: float = 15e-6
    """Of one message between two ranks: assumed."""
    sum_bandwidth: float | None = None
    """Bytes/s of a message that are added up where ranks sum; None: as fast as they come."""
    layer_host_seconds: float = 0.0
    """Of a layer's forward pass on one row, and half of that of its backward pass: what it takes however narrow it is. 0: it is hidden."""
    factors: StepFactors | None = None
    """Where steps were measured on this kind; None = those of `predicted_step`, which were measured on an H200."""


GPUS = {
    kind.name: kind
    for kind in (
        GpuKind(
            "a100-80g", 80e9, 312e12, None, 2.039e12, 300e9, 25e9,
            "NVIDIA A100 data sheet (SXM, 80 GB); DGX A100: eight 200 Gb/s HDR cards",
        ),
        GpuKind(
            "h100-80g", 80e9, 989e12, 1979e12, 3.35e12, 450e9, 50e9,
            "NVIDIA H100 data sheet (SXM); DGX H100: eight 400 Gb/s NDR cards",
        ),
        GpuKind(
            "h200-141g", 141e9, 989e12, 1979e12, 4.8e12, 450e9, 50e9,
            "NVIDIA H200 data sheet (SXM); DGX H200: eight 400 Gb/s NDR cards",
        ),
        GpuKind(
            "b200-180g", 180e9, 2250e12, 4500e12, 8e12, 900e9, 50e9,
            "NVIDIA DGX B200 data sheet: 36 PFLOP/s dense FP8, 64 TB/s, 1.4 TB over eight GPUs; eight 400 Gb/s cards",
        ),
    )
}  # fmt: skip
"""By name."""


def find_gpu(name: str) -> GpuKind:
    """A kind by its name.

    Raises:
        ConfigError: there is none; names all.
    """
    if name not in GPUS:
        raise ConfigError(f"there is no GPU kind {name!r}; known are {', '.join(GPUS)}")
    return GPUS[name]
