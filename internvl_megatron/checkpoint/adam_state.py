"""Transformer Engine's AdamW around a checkpoint: its state is read and filled where it is, without copies on the device.

Megatron Core asks an optimizer for its `state_dict` and gives it back, for the settings of its groups; the tensors go their own way,
parameter by parameter. But `FusedAdam` (Transformer Engine 2.20, `fused_adam.py`) makes fp32 copies of all bf16 moments whenever it is
asked, 8 bytes a parameter, and a second set of all its state when it is given one: a run that just fits could train, but neither save
nor resume.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor


@contextmanager
def read_in_place(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[None]:
    """In the block those of the optimizers that are Transformer Engine's copy nothing on the device; others are as always."""
    fused = [optimizer for optimizer in optimizers if hasattr(optimizer, "get_unscaled_state")]
    methods = {
        "state_dict": torch.optim.Optimizer.state_dict,  # refers to the state
        "load_state_dict": _load_groups,
        "get_unscaled_state": _unscaled_on_host,
    }
    for optimizer in fused:
        vars(optimizer).update({name: MethodType(method, optimizer) for name, method in methods.items()})
    try:
        yield
    finally:
        for optimizer in fused:
            for name in methods:
                del vars(optimizer)[name]


def _load_groups(self: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Take over the settings of the groups. The state that comes with them is the optimizer's own, which is filled in place."""
    kept = self.state
    assert kept or not state_dict["state"], f"state of {len(state_dict['state'])} parameters, and no place for it yet"
    torch.optim.Optimizer.load_state_dict(self, {**state_dict, "state": {}})
    self.state = kept


def _unscaled_on_host(self: Any, param: Tensor, state_name: str, skip_unscale: bool = False) -> Tensor:
    """A moment in bf16 as fp32, as `FusedAdam` gives it, but in host memory: it is on its way to a file, or to be replaced by one."""
    state = self.state[param][state_name]
    if state.dtype == torch.bfloat16 and not skip_unscale:
        return state.detach().cpu().float()
    return type(self).get_unscaled_state(self, param, state_name, skip_unscale)
