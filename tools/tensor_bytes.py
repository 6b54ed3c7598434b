"""Bytes of the tensors that are alive, counted exactly: not what the allocator or the operating system holds."""

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode


class TensorBytes:
    """Bytes of the memory of all tensors that were noted and are alive, now and at most.

    Memory is counted once, however many tensors view it. Tensors on torch's meta device count as what they would take.
    """

    def __init__(self, ignored: Iterable[torch.Tensor] = ()) -> None:
        """`ignored` is not counted; it stays alive as long as this."""
        self.peak = 0
        self._live = 0
        self._ignored = [tensor.untyped_storage() for tensor in ignored]
        self._sizes = {memory._cdata: 0 for memory in self._ignored}
        self._lock = threading.RLock()  # memory may be freed by another thread, and while it is being counted

    def in_this_thread(self) -> TorchDispatchMode:
        """Note every tensor that an operation of this thread takes or gives in the block.

        What an operation allocates and frees inside itself is not seen.
        """
        return Noting(self)

    @contextmanager
    def resizes(self) -> Iterator[None]:
        """See memory grow and shrink in place in the block: FSDP2 frees what it has gathered in this way."""
        resize = torch.UntypedStorage.resize_

        def resize_and_note(memory: torch.UntypedStorage, size: int) -> Any:
            result = resize(memory, size)
            self._resized(memory)
            return result

        with patch.object(torch.UntypedStorage, "resize_", resize_and_note):
            yield

    def note(self, memory: torch.UntypedStorage) -> None:
        """Count this memory from here on, as long as it is alive."""
        key = memory._cdata
        with self._lock:
            if key in self._sizes:
                return
            self._sizes[key] = memory.nbytes()
            self._add(self._sizes[key])
        weakref.finalize(memory, self._forget, key)

    def _resized(self, memory: torch.UntypedStorage) -> None:
        key = memory._cdata
        with self._lock:
            if key in self._sizes and self._sizes[key] != memory.nbytes():
                self._add(memory.nbytes() - self._sizes[key])
                self._sizes[key] = memory.nbytes()

    def _add(self, size: int) -> None:
        self._live += size
        self.peak = max(self.peak, self._live)

    def _forget(self, key: int) -> None:
        with self._lock:
            self._live -= self._sizes.pop(key)


def plain_tensors(*values: Any) -> Iterator[torch.Tensor]:
    """Tensors with memory of their own, in sequences too; those made of others have none."""
    for value in values:
        if type(value) in (torch.Tensor, torch.nn.Parameter):
            yield value
        elif isinstance(value, list | tuple):
            yield from plain_tensors(*value)


def is_of_others(types: Any) -> bool:
    """Whether an operation is of tensors that are made of others: what it does with those comes by itself."""
    return any(issubclass(kind, DTensor) for kind in types)


class Noting(TorchDispatchMode):
    """Notes what operations take and give."""

    def __init__(self, live: TensorBytes) -> None:
        super().__init__()
        self._live = live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation."""
        if is_of_others(types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        for tensor in plain_tensors(args, *(kwargs or {}).values(), result):
            self._live.note(tensor.untyped_storage())
        return result
