"""Of a module's state, what a checkpoint holds: its parameters, whatever its layers are made of.

The modules of Megatron Core and Transformer Engine have an "extra state" as well: nothing in Megatron Core's, and in Transformer
Engine's the state of FP8 with delayed scaling, as a pickle, which is not read here (`metadata_guard`). It names the module that
made it, so that a checkpoint with it fits no other kind of layers.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch

from internvl_megatron.model.adapter import is_adapter

_EXTRA = "_extra_state"

Part = Literal["whole", "base", "trained"]
"""Which of a model's parameters: all; all but adapters; or those that are trained."""


def parameters_only(state: Mapping[str, Any], part: Part = "whole") -> dict[str, Any]:
    """A sharded state without extra states. Those a checkpoint has nevertheless are not asked for when it is loaded.

    Args:
        state: as Megatron Core makes it, with the parameters themselves as its entries' data.
        part: of the parameters.
    """
    return {
        name: entry
        for name, entry in state.items()
        if not name.endswith(_EXTRA)
        and not (part == "base" and is_adapter(name))
        and not (part == "trained" and not entry.data.requires_grad)
    }


def load_parameters(module: torch.nn.Module, values: Mapping[str, Any], part: Part = "whole") -> None:
    """Fill parameters of a module from a state without extra states.

    Args:
        module: to be filled.
        values: of every parameter that is asked for, and of nothing else.
        part: which were asked for (`parameters_only`).
    """
    missing, unexpected = module.load_state_dict(values, strict=False)
    missing = [name for name in missing if part == "whole" and not name.endswith(_EXTRA)]
    assert not missing and not unexpected, (
        f"parameters without values: {missing}, values without parameters: {unexpected}"
    )
