"""The only place where CPU and GPU differ: device, communication backend, kernels, memory and speed figures.

A `Device` is opened once per process and passed to whatever needs it; nothing else in the package names a device or a
communication backend. On a machine without a GPU, `open_device` installs the adapter in `cpu_shim` so that Megatron
Core, which addresses its accelerator by name in many places, runs on the CPU.
"""

import importlib.util
import os
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from internvl_megatron.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from internvl_megatron.config.schema import ParallelConfig, RunConfig

AttentionKernel = Literal["transformer_engine", "flash_attn", "torch_varlen", "sdpa"]
LayerKernel = Literal["transformer_engine", "torch"]
TileKernel = Literal["cudnn", "sdpa"]
DeviceName = Literal["auto", "cpu", "cuda"]
"""What a user can ask for."""

GPU_PACKAGES = ("transformer_engine", "apex", "flash_attn")
"""Optional packages whose kernels run on GPUs only."""

# What each kernel for packed attention needs, the best one first.
ATTENTION_PACKAGES: dict[AttentionKernel, str] = {
    "transformer_engine": "transformer_engine",
    "flash_attn": "flash_attn",
    "torch_varlen": "torch.nn.attention.varlen",
    "sdpa": "torch",
}

HARDWARE_QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
"""Environment variable of the driver: queues between a process and its GPU, read when the process first asks for one. Unset: 8."""

# Dense bf16 tensor-core peak in FLOP/s by a part of the device name (vendor data sheets, without sparsity).
PEAK_BF16_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12}


type Mark = Any
"""A moment: the host's clock (float) on a CPU, an event in the stream (torch.cuda.Event) on a GPU."""


@dataclass(frozen=True)
class Kernels:
    """What computes the layers of a run: what it asks for, as far as this process can do it."""

    language: LayerKernel
    vision: LayerKernel
    attention: AttentionKernel
    """Packed attention of the language model."""
    vision_attention: TileKernel
    """Attention inside a tile."""
    fp8: Literal["transformer_engine", "emulated"]
    """What computes in FP8 where a part of the model does."""
    fuse_swiglu: bool
    """Gate and activation of the language model's MLP are one kernel."""
    fuse_rotary: bool
    """Rotary embedding is Transformer Engine's kernel."""


@dataclass(frozen=True)
class Device:
    """One process's accelerator (or CPU) and what it can do."""

    kind: Literal["cpu", "cuda"]
    index: int
    attention: AttentionKernel
    """The best installed kernel for packed (variable-length, causal) attention."""
    is_hopper: bool = False
    """A GPU of that generation or a later one."""

    def kernels(self, config: "RunConfig") -> Kernels:
        """Choose what computes the layers of a run.

        Raises:
            ConfigError: it asks for what is not installed, or for what does not go together here.
        """
        kernels, fp8 = config.kernels, config.fp8
        problems = []
        can = self.kind == "cuda" and is_installed("transformer_engine")
        # In fp32 Transformer Engine multiplies in TF32, with 10 bits of mantissa: nobody's default.
        layers = kernels.layers
        if layers == "auto":
            layers = "transformer_engine" if can and config.dtype == "bf16" else "torch"
        elif layers == "transformer_engine" and not can:
            problems.append(_not_here("kernels.layers", "transformer_engine", self))
        attention = self.attention if kernels.attention == "auto" else kernels.attention
        if attention != "sdpa" and not (self.kind == "cuda" and is_installed(ATTENTION_PACKAGES[attention])):
            problems.append(_not_here("kernels.attention", attention, self))
        if kernels.vision_attention == "cudnn" and self.kind == "cpu":
            problems.append(_not_here("kernels.vision_attention", "cudnn", self))
        if config.optimizer.moments == "bf16" and not can:
            problems.append(_not_here("optimizer.moments", "bf16", self))
        if kernels.fuse_rotary == "on" and not can:
            problems.append(_not_here("kernels.fuse_rotary", "on", self))
        # A shard is made on the meta device, where Transformer Engine does not mark what is split.
        vision = "torch" if config.parallel.vision_sharding == "sharded" else layers
        backend = fp8.backend
        if backend == "auto":
            backend = "transformer_engine" if self.kind == "cuda" else "emulated"
        if backend == "transformer_engine":
            parts = {
                "language": (fp8.language, layers),
                "vision": (fp8.vision, vision),
                "projector": (fp8.projector, vision),
            }
            problems += [
                f"fp8.{part}={recipe}: needs Transformer Engine's layers, and kernels.layers={kernels.layers}, "
                f"dtype={config.dtype} and parallel.vision_sharding={config.parallel.vision_sharding} give torch's "
                f"here{'' if can else f' ({NOT_INSTALLED})'}; or set fp8.backend=emulated"
                for part, (recipe, kernel) in parts.items()
                if recipe != "none" and kernel == "torch"
            ]
        if self.kind == "cuda":
            problems += _not_repeatable(config, attention)
        if problems:
            raise ConfigError("\n".join(f"config: {problem}" for problem in problems))
        fuses = self.kind == "cuda" if kernels.fuse_swiglu == "auto" else kernels.fuse_swiglu == "on"
        rotary = can if kernels.fuse_rotary == "auto" else kernels.fuse_rotary == "on"
        tiles = kernels.vision_attention
        if tiles == "auto":
            tiles = "cudnn" if self.is_hopper and config.dtype == "bf16" else "sdpa"
        return Kernels(layers, vision, attention, tiles, backend, fuses, rotary)

    @property
    def backend(self) -> str:
        """Communication backend of `torch.distributed` for tensors on this device."""
        return "nccl" if self.kind == "cuda" else "gloo"

    @property
    def host_backend(self) -> str:
        """Communication backend for small messages between host memories."""
        return "gloo"

    @property
    def torch_device(self) -> "torch.device":
        """The `torch.device` tensors of this process live on."""
        import torch

        return torch.device("cuda", self.index) if self.kind == "cuda" else torch.device("cpu")

    @property
    def preferred_dtype(self) -> Literal["fp32", "bf16"]:
        """Number format to compute in where nothing else is asked for; bf16 is slower than fp32 on CPUs."""
        return "bf16" if self.kind == "cuda" else "fp32"

    def put(self, array: "np.ndarray | torch.Tensor") -> "torch.Tensor":
        """Copy a host array to the device without waiting for the copy."""
        import torch

        tensor = torch.as_tensor(array)
        if self.kind == "cpu":
            return tensor
        return tensor.pin_memory().to(self.torch_device, non_blocking=True)

    def copy_to_host(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """A copy in host memory, complete when the device has come so far; `put` brings it back in the right order."""
        import torch

        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=self.kind == "cuda")
        return copy.copy_(tensor, non_blocking=True)

    def copy_all_to_host(self, tensors: "Sequence[torch.Tensor]") -> "list[torch.Tensor]":
        """Copies in host memory that are kept for long, complete when this returns; without `copy_to_host`'s rounding up of each."""
        return copy_to_host(tensors, [None] * len(tensors))

    def fill(self, memory: "torch.Tensor", arrays: "Sequence[np.ndarray]") -> None:
        """Copy host arrays to the device, one after the other into [n, ...], without waiting for the copies."""
        import numpy as np
        import torch

        if not arrays:
            return
        is_host = self.kind == "cpu"
        staged = memory if is_host else torch.empty(memory.shape, dtype=memory.dtype, pin_memory=True)
        np.stack(arrays, out=staged.numpy())
        if not is_host:
            memory.copy_(staged, non_blocking=True)

    def use_here(self, tensor: "torch.Tensor") -> None:
        """Say that what is given to the device from here on uses a tensor of the side stream: its memory must wait for it."""
        if self.kind == "cuda":
            import torch

            tensor.record_stream(torch.cuda.current_stream(self.index))

    def use_in_this_thread(self) -> None:
        """Make this the calling thread's device. A new thread's is the machine's first GPU, whichever its process uses: a stream
        entered or memory got there would make a context on that GPU, some hundred MB of it, for every rank of the machine."""
        if self.kind == "cuda":
            import torch

            torch.cuda.set_device(self.index)

    def side_stream(self) -> "AbstractContextManager[object]":
        """What is given to the device in the block does not wait for what it was given before, nor the other way round."""
        if self.kind == "cpu":
            return nullcontext()
        import torch

        return torch.cuda.stream(_side_stream(self.index))

    def synchronize(self) -> None:
        """Wait until the device has finished what was given to it."""
        if self.kind == "cuda":
            import torch

            torch.cuda.synchronize()

    def mark(self) -> Mark:
        """This moment in what the device has been given to do; taking it makes nobody wait."""
        if self.kind == "cpu":
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds_since(self, first: Mark, later: Mark) -> float:
        """A moment as seconds: of the clock that all processes share on a CPU, after the first moment on a GPU."""
        if self.kind == "cpu":
            return later
        later.synchronize()
        return first.elapsed_time(later) / 1000

    def peak_memory_bytes(self) -> int:
        """Highest memory use so far: allocated device memory on a GPU, resident memory of the process on a CPU."""
        if self.kind == "cuda":
            import torch

            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def hardware_queues(self, parallel: "ParallelConfig") -> str | None:
        """The queues that this process has and its run wants, for the log; None on a CPU."""
        if self.kind == "cpu":
            return None
        wanted = wanted_hardware_queues(parallel) or "unset"
        found = os.environ.get(HARDWARE_QUEUES, "unset")
        return f"{HARDWARE_QUEUES} is {found}" + ("" if found == wanted else f"; this run wants it {wanted}")

    def name(self) -> str:
        """Name of the device, for logs and benchmark records."""
        import torch

        return torch.cuda.get_device_name(self.index) if self.kind == "cuda" else "cpu"

    def peak_flops(self, dtype: "torch.dtype") -> float:
        """FLOP/s that count as 100 % in MFU figures.

        On a known GPU the vendor's dense bf16 peak; elsewhere the rate of a square matrix product in `dtype`, measured
        now, so that the figure says how near the step comes to what plain matrix products reach on this machine.
        """
        name = self.name()
        for part, flops in PEAK_BF16_FLOPS.items():
            if part in name:
                return flops
        return _measured_matmul_flops(self, dtype)


def copy_to_host(tensors: "Sequence[torch.Tensor]", targets: "Sequence[torch.Tensor | None]") -> "list[torch.Tensor]":
    """Copies in host memory, complete when this returns; into the n-th target where it fits the n-th tensor."""
    import torch

    copies = [
        target if target is not None and (target.shape, target.dtype) == (tensor.shape, tensor.dtype) else None
        for tensor, target in zip(tensors, targets, strict=True)
    ]
    missing = [number for number, target in enumerate(copies) if target is None]
    for number, memory in zip(missing, _host_memory([tensors[number] for number in missing]), strict=True):
        copies[number] = memory
    found = [target for target in copies if target is not None]
    for tensor, target in zip(tensors, found, strict=True):
        target.copy_(tensor, non_blocking=True)
    if any(tensor.is_cuda for tensor in tensors):
        torch.cuda.current_stream().synchronize()
    return found


HOST_BLOCK_BYTES = 1 << 30
HOST_ALIGNMENT_BYTES = 512


def _host_memory(tensors: "Sequence[torch.Tensor]") -> "list[torch.Tensor]":
    """Memory for a host copy of each; what is on a GPU gets page-locked memory, in blocks that many share."""
    import torch

    memory = [None if tensor.is_cuda else torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in tensors]
    locked = iter(_in_blocks([tensor for tensor in tensors if tensor.is_cuda], HOST_BLOCK_BYTES, pin_memory=True))
    return [next(locked) if own is None else own for own in memory]


def _in_blocks(tensors: "Sequence[torch.Tensor]", block_bytes: int, pin_memory: bool) -> "list[torch.Tensor]":
    """Host memory of these shapes, in order out of common blocks; a block is freed with the last tensor in it.

    torch rounds page-locked memory up to a power of two (`CachingHostAllocator`): tensor by tensor that is 1.85 times the bytes of
    an 8B, in blocks 1.17 times. What one tensor leaves of its block others get, and the last ones get smaller blocks.
    """
    import torch

    sizes = [-(-tensor.nbytes // HOST_ALIGNMENT_BYTES) * HOST_ALIGNMENT_BYTES for tensor in tensors]
    blocks: list[torch.Tensor] = []
    used: list[int] = []
    memory, left = [], sum(sizes)
    for tensor, size in zip(tensors, sizes, strict=True):
        number = next((n for n, block in enumerate(blocks) if len(block) - used[n] >= size), len(blocks))
        if number == len(blocks):
            own_bytes = 1 << (max(size, 1) - 1).bit_length()
            wanted_bytes = 1 << (max(min(left, block_bytes), 1).bit_length() - 1)
            capacity = max(own_bytes, wanted_bytes)
            blocks.append(torch.empty(capacity, dtype=torch.uint8, device="cpu", pin_memory=pin_memory))
            used.append(0)
        own = blocks[number][used[number] : used[number] + tensor.nbytes]
        memory.append(own.view(tensor.dtype).view(tensor.shape))
        used[number] += size
        left -= size
    return memory


@cache
def _side_stream(index: int) -> "torch.cuda.Stream":
    import torch

    return torch.cuda.Stream(index)


def open_device(preference: DeviceName = "auto", local_rank: int = 0) -> Device:
    """Choose and prepare this process's device.

    Raises:
        ConfigError: a GPU was asked for and there is none, or fewer than local ranks.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if preference == "cpu" or (preference == "auto" and count == 0):
        from internvl_megatron import cpu_shim

        hide_gpu_packages()
        cpu_shim.install()
        return Device(kind="cpu", index=0, attention="sdpa")
    if count == 1 and "SLURM_STEP_GPUS" in os.environ:
        local_rank = 0  # --gpus-per-task=1 shows every task one GPU
    if local_rank >= count:
        raise ConfigError(
            f"device: local rank {local_rank} needs GPU number {local_rank}, but this machine shows {count}. "
            "Start fewer local ranks (--nproc), or set device=cpu."
        )
    torch.cuda.set_device(local_rank)
    is_hopper = torch.cuda.get_device_capability(local_rank) >= (9, 0)
    return Device(kind="cuda", index=local_rank, attention=packed_attention_kernel(), is_hopper=is_hopper)


def wanted_hardware_queues(parallel: "ParallelConfig") -> str | None:
    """What a run wants `HARDWARE_QUEUES` to be; None = unset.

    With one queue a GPU (before Blackwell) begins kernels in the order in which it was given them, so that messages of tensor and
    context parallelism begin before the product they overlap with. FSDP2 gathers and reduces in streams of its own, which one
    queue would make wait for each other's kernels. Megatron's own arguments ask for the one and refuse the other.
    """
    if parallel.vision_sharding == "sharded":
        return None
    return "1" if parallel.tensor_size > 1 or parallel.context_size > 1 else None


def choose_hardware_queues(config: "RunConfig") -> None:
    """Set `HARDWARE_QUEUES` for this process and those it starts, unless somebody has; call before anything asks for a GPU."""
    wanted = wanted_hardware_queues(config.parallel)
    if wanted is not None and uses_gpu(config.device):
        os.environ.setdefault(HARDWARE_QUEUES, wanted)


def uses_gpu(preference: DeviceName) -> bool:
    """Whether processes of this machine will use a GPU. Asks the file system, not the driver: a process that has asked
    the driver can no longer fork processes that use a GPU."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    return preference != "cpu" and not hidden and Path("/dev/nvidiactl").exists()


def hide_gpu_packages() -> None:
    """Make packages with GPU-only kernels unimportable in this process; call before Megatron Core is imported.

    Megatron Core takes Transformer Engine's and Apex's optimizers wherever they are installed, on a CPU too.
    """
    for name in GPU_PACKAGES:
        if sys.modules.get(name) is not None:
            raise ConfigError(
                f"device=cpu, but {name}, whose kernels need a GPU, is imported already: start with --nproc instead of "
                "torchrun, or hide the GPUs (CUDA_VISIBLE_DEVICES=)"
            )
        sys.modules[name] = None  # pyright: ignore[reportArgumentType] - Python's way to forbid an import


def describe_machine() -> list[tuple[str, str]]:
    """(what, value) lines about this machine's devices, for `doctor`; starts nothing on them."""
    import torch

    cores = f"{os.cpu_count()} cores"
    if not torch.cuda.is_available():
        cpu = Device(kind="cpu", index=0, attention="sdpa")
        return [
            ("device", f"cpu, {cores}, backend {cpu.backend}: every parallel path runs, slowly"),
            ("packed attention", "one scaled_dot_product_attention per segment"),
        ]
    names = sorted({torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())})
    gpu = Device(kind="cuda", index=0, attention=packed_attention_kernel())
    return [
        ("device", f"{torch.cuda.device_count()} x {', '.join(names)}, {cores}, backend {gpu.backend}"),
        ("CUDA runtime", str(torch.version.cuda)),
        ("packed attention", f"{gpu.attention} in bf16, one scaled_dot_product_attention per segment in fp32"),
    ]


def packed_attention_kernel() -> AttentionKernel:
    """The best installed kernel for packed attention on a GPU."""
    return next(kernel for kernel, package in ATTENTION_PACKAGES.items() if is_installed(package))


def is_installed(package: str) -> bool:
    """Whether a package can be imported here; imports nothing of it."""
    return importlib.util.find_spec(package) is not None


def add_product(total: "torch.Tensor", left: "torch.Tensor", right: "torch.Tensor") -> None:
    """Add left [m, k] @ right [k, n] to total [m, n], whose dtype may be wider than theirs; k may be small."""
    import torch

    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, out=total)
    else:
        # There is no such product on a CPU: by rows, so that what lies beside is a quarter of `left`.
        num_rows = max(1, left.numel() // (4 * right.shape[1]))
        for first in range(0, len(total), num_rows):
            rows = slice(first, first + num_rows)
            total[rows] += left[rows] @ right


def likes_whole_widths(weight: "torch.Tensor") -> bool:
    """Whether a product with all rows of a weight is faster than with an odd number of them: on a GPU, where rows of results that are
    not 16 bytes apart keep cuBLAS from its tensor core kernels."""
    return weight.is_cuda


@cache
def ring_stream() -> "torch.cuda.Stream":
    """The stream on which ring attention works on every other block of keys, one for all layers."""
    import torch

    return torch.cuda.Stream()


NOT_INSTALLED = "install it: pip install 'internvl_megatron[gpu]'"
REPEATABLE_ALGORITHMS = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"
"""Environment variable of Transformer Engine; 0 = the same bits every time."""


def _not_repeatable(config: "RunConfig", attention: AttentionKernel) -> list[str]:
    """Why a step computed twice would differ on machines that are well: gradients of queries are added up as they come. In fp32
    attention is torch's."""
    every = config.bad_steps.recheck_every_steps
    if every is None or config.dtype != "bf16":
        return []
    asked = f"bad_steps.recheck_every_steps={every}: the backward pass of attention (kernels.attention={attention})"
    if attention == "transformer_engine" and os.environ.get(REPEATABLE_ALGORITHMS, "1") != "0":
        return [
            f"{asked} need not give the same bits twice, which would end a healthy run: set {REPEATABLE_ALGORITHMS}=0 in the "
            "environment, which costs some speed, or bad_steps.recheck_every_steps=null"
        ]
    if attention == "flash_attn":
        return [
            f"{asked} does not give the same bits twice, which would end a healthy run: set kernels.attention="
            f"transformer_engine and {REPEATABLE_ALGORITHMS}=0 in the environment, or bad_steps.recheck_every_steps=null"
        ]
    return []


def _not_here(setting: str, package: str, device: Device) -> str:
    """Why a kernel cannot be had, and the way out."""
    if device.kind == "cpu":
        return f"{setting}={package}: its kernels need a GPU; leave it out on a CPU"
    return f"{setting}={package}: not installed; leave it out, or {NOT_INSTALLED}"


def _measured_matmul_flops(device: Device, dtype: "torch.dtype", seconds: float = 0.2) -> float:
    import torch

    size = 8192 if device.kind == "cuda" else 768  # large enough to fill the device, small enough to take no time

    matrix = torch.ones(size, size, dtype=dtype, device=device.torch_device)
    torch.mm(matrix, matrix)
    device.synchronize()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        torch.mm(matrix, matrix)
        device.synchronize()
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - start)
