"""Lets Megatron Core run on a machine without a GPU.

Megatron Core 0.19 names its accelerator in many places: `torch.cuda.current_device()`, `device="cuda"`, `tensor.cuda()`,
a test for the type string "torch.cuda.FloatTensor". `install` answers those calls with the CPU. It changes torch for the
whole process and is therefore called by `open_device` in trainer processes only, never on import.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "as_tensor", "empty_strided")


class _NoStream:
    """Stands in for a CUDA stream or event: everything on a CPU is already in order."""

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        self.cuda_stream = 0
        self.device = torch.device("cpu")

    def _nothing(self, *_args: object, **_kwargs: object) -> None:
        return None

    synchronize = wait = wait_stream = wait_event = record = record_event = record_stream = _nothing

    def query(self) -> bool:
        return True

    def elapsed_time(self, _end: object) -> float:
        return 0.0


def install() -> None:
    """Answer torch.cuda calls with the CPU, in this process, once."""
    if torch.cuda.is_initialized():
        raise RuntimeError("the CPU adapter must be installed before CUDA is used in this process")
    if getattr(torch, "_internvl_cpu_shim", False):
        return
    setattr(torch, "_internvl_cpu_shim", True)
    cuda: dict[str, Any] = {
        "is_available": lambda: False,  # there may be a GPU that this process was told not to use
        "device_count": lambda: 0,
        "current_device": lambda: "cpu",
        "synchronize": lambda *_a, **_k: None,
        "empty_cache": lambda: None,
        "Stream": _NoStream,
        "Event": _NoStream,
        "current_stream": lambda *_a, **_k: _NoStream(),
        "default_stream": lambda *_a, **_k: _NoStream(),
        "stream": lambda *_a, **_k: contextlib.nullcontext(),
        "get_rng_state": lambda *_a, **_k: torch.get_rng_state(),
        "set_rng_state": lambda state, *_a, **_k: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "get_device_capability": lambda *_a, **_k: (0, 0),
    }
    for name, replacement in cuda.items():
        setattr(torch.cuda, name, replacement)
        if hasattr(torch.cuda.random, name):
            setattr(torch.cuda.random, name, replacement)
    _device_constructors()  # `with torch.device(..)` knows factories by identity: let it note them before they are replaced
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    plain_type = torch.Tensor.type
    setattr(torch.Tensor, "cuda", lambda self, *_a, **_k: self)
    setattr(torch.nn.Module, "cuda", lambda self, *_a, **_k: self)
    setattr(torch.Tensor, "type", functools.partialmethod(_type_as_if_on_gpu, plain_type=plain_type))


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = torch.device("cpu")
        return factory(*args, **kwargs)

    return create


def _type_as_if_on_gpu(self: torch.Tensor, *args: Any, plain_type: Callable[..., Any], **kwargs: Any) -> Any:
    answer = plain_type(self, *args, **kwargs)
    # The distributed optimizer and the gradient clipping compare with "torch.cuda.FloatTensor".
    # Under a `TorchFunctionMode` this is asked twice, the second time by itself.
    is_new = isinstance(answer, str) and not answer.startswith("torch.cuda.")
    return answer.replace("torch.", "torch.cuda.", 1) if is_new else answer
