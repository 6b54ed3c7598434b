"""Activations kept in host memory between a forward pass and its backward pass."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from internvl_megatron.device import Device

SMALLEST_BYTES = 1 << 16
"""Smaller tensors stay where they are: a copy would cost more than the memory is worth."""

Unpack = Callable[[], Tensor]


def keep_on_host(device: Device, wanted: bool) -> AbstractContextManager[object]:
    """What autograd saves in the block goes to host memory, and comes back when backward asks for it.

    Parameters stay: they are on the device anyway. Copies are queued like everything else on the device, so the host waits for
    none of them. torch's own `save_on_cpu` copies parameters too, and makes the host wait.
    """
    if not wanted:
        return nullcontext()

    def pack(tensor: Tensor) -> Unpack:
        base = tensor if tensor._base is None else tensor._base
        if isinstance(base, torch.nn.Parameter) or tensor.nbytes < SMALLEST_BYTES:
            return lambda: tensor
        kept = device.copy_to_host(tensor)
        return lambda: device.put(kept)

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda unpack: unpack())
