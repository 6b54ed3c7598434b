"""Bytes of the tensors that are alive, counted exactly: not what the allocator or the operating system holds."""

import threading
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorBytes:
    """Bytes of the memory of all tensors that were noted and are alive, now and at most.

    Memory is counted once, however many tensors view it.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._live = 0
        self._known: set[int] = set()
        self._lock = threading.RLock()  # memory may be freed by another thread, and while it is being counted

    def in_this_thread(self) -> TorchDispatchMode:
        """Note every tensor that an operation of this thread takes or gives in the block.

        What an operation allocates and frees inside itself is not seen.
        """
        return _Noting(self)

    def note(self, memory: torch.UntypedStorage) -> None:
        key, size = memory._cdata, memory.nbytes()
        with self._lock:
            if key in self._known:
                return
            self._known.add(key)
            self._live += size
            self.peak = max(self.peak, self._live)
        weakref.finalize(memory, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        with self._lock:
            self._known.discard(key)
            self._live -= size


class _Noting(TorchDispatchMode):
    def __init__(self, account: TensorBytes) -> None:
        super().__init__()
        self.account = account

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            # Tensors made of others have no memory of their own; they are noted one by one.
            if type(value) in (torch.Tensor, torch.nn.Parameter):
                self.account.note(value.untyped_storage())
        return result
