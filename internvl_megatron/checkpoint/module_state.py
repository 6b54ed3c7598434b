"""Of a module's state, what a checkpoint holds: its parameters, whatever its layers are made of.

The modules of Megatron Core and Transformer Engine have an "extra state" as well: nothing in Megatron Core's, and in Transformer
Engine's the state of FP8 with delayed scaling, as a pickle, which is not read here (`metadata_guard`). It names the module that
made it, so that a checkpoint with it fits no other kind of layers.
"""

from collections.abc import Mapping
from typing import Any

import torch

_EXTRA = "_extra_state"


def parameters_only(state: Mapping[str, Any]) -> dict[str, Any]:
    """A sharded state without extra states. Those a checkpoint has nevertheless are not asked for when it is loaded."""
    return {name: entry for name, entry in state.items() if not name.endswith(_EXTRA)}


def load_parameters(module: torch.nn.Module, values: Mapping[str, Any]) -> None:
    """Fill a module from a state without extra states; every parameter must be there, and nothing else."""
    missing, unexpected = module.load_state_dict(values, strict=False)
    missing = [name for name in missing if not name.endswith(_EXTRA)]
    assert not missing and not unexpected, (
        f"parameters without values: {missing}, values without parameters: {unexpected}"
    )
