"""Operations of a step at which the host would wait for a GPU, found on a CPU.

There all memory is the same, so a tensor counts as the device's if it came through `Device.put` or `fill`, is a parameter or a gradient,
was made with a `device=`, or was computed from such a one. The host waits where it needs a value of one of these (a number,
the size of a result), and where it copies ordinary memory to the device.
"""

import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from internvl_megatron.device import Device

READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "repeat_interleave"}
READS |= {"_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"}
COPIES_TO_HOST = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__}
MAKES_OF_VALUES = {"tensor", "as_tensor", "asarray"}


class HostWaits:
    """Where the host would have waited, as (phase, operation and line of code)."""

    def __init__(self, phase: Callable[[], str]) -> None:
        """`phase` gives the name of the phase that is running."""
        self.found: list[tuple[str, str]] = []
        self._phase = phase
        self._on_device: set[int] = set()
        self._lock = threading.RLock()  # memory may be freed by another thread, and while it is being noted

    @contextmanager
    def in_this_thread(self) -> Iterator[None]:
        """Look at what this thread does in the block; `Device.put` and `Device.fill` give tensors of the device."""
        put, here = Device.put, torch.device("cpu")

        def put_and_note(device: Device, array: Any) -> torch.Tensor:
            copy = put(device, array).clone()  # on a CPU it would be the host's own memory
            self.note(copy)
            return copy

        def fill(device: Device, memory: torch.Tensor, arrays: Any) -> None:
            if arrays:
                memory.copy_(put_and_note(device, np.stack(arrays)))

        current_device = patch.object(torch.cuda, "current_device", lambda: here)  # an object, not the word
        with patch.multiple(Device, put=put_and_note, fill=fill), current_device, _Functions(self), _Operations(self):
            yield

    def note(self, tensor: torch.Tensor) -> None:
        """This tensor is the device's."""
        memory = tensor.untyped_storage()
        with self._lock:
            if memory._cdata in self._on_device:
                return
            self._on_device.add(memory._cdata)
        weakref.finalize(memory, self._forget, memory._cdata)

    def is_on_device(self, value: object) -> bool:
        return type(value) in (torch.Tensor, torch.nn.Parameter) and value.untyped_storage()._cdata in self._on_device  # pyright: ignore[reportAttributeAccessIssue]

    def wait(self, what: str) -> None:
        """The host waits here."""
        place = self._line()
        # On a CPU messages come from memory of gloo's own, when they are waited for.
        in_message = "/torch/distributed/" in place.filename or ".wait()" in (place.line or "")
        if not in_message:
            self.found.append((self._phase(), f"{what} at {place.filename}:{place.lineno}"))

    @staticmethod
    def _line() -> traceback.FrameSummary:
        """The line of code that called torch."""
        own = (
            __file__,
            "/torch/_",
            "/torch/utils/",
            "/torch/overrides",
            "/torch/autograd/",
            "/torch/optim/",
            "/torch/nn/",
        )
        return [frame for frame in traceback.extract_stack() if not any(part in frame.filename for part in own)][-1]

    def _forget(self, key: int) -> None:
        with self._lock:
            self._on_device.discard(key)


class _Functions(TorchFunctionMode):
    """What Python asks of torch: on a CPU, copies between host and device do nothing and are seen nowhere else."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in COPIES_TO_HOST and self.waits.is_on_device(args[0]):
            self.waits.wait(func.__name__)
        if func.__name__ in MAKES_OF_VALUES and (self._goes_to_device(kwargs) or self._reads(args[0])):
            self.waits.wait(func.__name__)
        result = func(*args, **kwargs)
        if self._goes_to_device(kwargs) and isinstance(result, torch.Tensor):
            self.waits.note(result)
        return result

    def _reads(self, values: object) -> bool:
        """Whether a list holds tensors of the device, each of which is read by itself."""
        return not isinstance(values, torch.Tensor) and any(map(self.waits.is_on_device, tree_leaves(values)))

    @staticmethod
    def _goes_to_device(kwargs: dict[str, Any]) -> bool:
        """In words the host is meant: the device is named by an object."""
        return kwargs.get("device") is not None and kwargs["device"] != "cpu"


class _Operations(TorchDispatchMode):
    """What torch computes, in backward passes too."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, waits = kwargs or {}, self.waits
        concerned = any(map(waits.is_on_device, tree_leaves((args, kwargs))))
        name = func.overloadpacket.__name__
        if concerned and (name in READS or self._is_counted_first(name, args) or self._comes_from_host(name, args)):
            waits.wait(name)
        result = func(*args, **kwargs)
        if concerned:
            for value in tree_leaves(result):
                if type(value) is torch.Tensor:
                    waits.note(value)
        return result

    @staticmethod
    def _is_counted_first(name: str, args: Any) -> bool:
        """An index of booleans: how many are true must be known; not where one number is written, which needs no count."""
        if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
            return False
        writes_number = name != "index" and args[2].numel() == 1
        is_mask = [index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]]
        return any(is_mask) and not writes_number

    def _comes_from_host(self, name: str, args: Any) -> bool:
        """Values or indices in ordinary memory; single numbers travel with the operation."""
        if name in ("index", "index_put", "index_put_"):
            sources = args[1]
        elif name == "copy_":
            sources = [args[1]] if self.waits.is_on_device(args[0]) and not (len(args) > 2 and args[2]) else []
        else:
            return False
        return any(source is not None and source.dim() and not self.waits.is_on_device(source) for source in sources)
