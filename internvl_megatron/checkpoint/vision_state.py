"""The vision side in a checkpoint: the same names and whole shapes, whether this rank holds all of it or shards.

So a run that was saved in one way goes on in the other, on any number of ranks. Layers have names of their own here: were they
stacked in one tensor, as the language model's are, torch would compare the shards of all layers with each other.
"""

from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from internvl_megatron.checkpoint.module_state import Part, load_parameters, parameters_only
from internvl_megatron.model.build import Model
from internvl_megatron.model.vision_shards import local_shard, own_rows
from internvl_megatron.parallel.groups import Groups
from internvl_megatron.parallel.vision_mesh import COPIES
from internvl_megatron.train.sharded_optimizer import ShardedOptimizer


def model_state(model: Model, groups: Groups, part: Part = "whole") -> dict[str, Any]:
    """This rank's part of the vision side's weights, by layout-free name, to be saved or loaded into."""
    metadata = {"dp_cp_group": groups.vision.dp_cp, "non_homogeneous_layers": True}
    state = parameters_only(model.vision.sharded_state_dict(prefix="vision.", metadata=metadata), part)
    if model.vision_mesh is None:
        return state
    dtype = model.vision.config.params_dtype
    parts = {
        name: _own_part(value, model.vision_mesh, dtype) if isinstance(value, ShardedTensor) else value
        for name, value in state.items()
    }
    return {name: value for name, value in parts.items() if value is not None}


def apply_model_state(model: Model, loaded: dict[str, Any], part: Part = "whole") -> None:
    """Take over loaded weights."""
    if model.vision_mesh is None:
        load_parameters(model.vision, {name.removeprefix("vision."): value for name, value in loaded.items()}, part)
        return
    for name, parameter in model.named_parameters():
        if name in loaded:
            local_shard(parameter.detach()).copy_(loaded[name])


def optimizer_state(optimizer: ShardedOptimizer, weights: dict[str, Any], is_loading: bool) -> dict[str, Any]:
    """This rank's part of the optimizer's state, under the names Megatron Core's distributed optimizer gives it.

    Args:
        optimizer: its running means are loaded in place.
        weights: `model_state`.
        is_loading: leave the weights alone: they come from two places, and `apply_optimizer_state` says which counts.
    """
    parameters = {}
    for name, shard in optimizer.shards.items():
        own = shard.own.detach()
        tensors = {"param": torch.empty_like(own) if is_loading else own, **optimizer.state_of(name)}
        parameters[name] = {
            key: replace(weights[name], key=f"optimizer.state.{key}.{name}", data=tensor, dtype=tensor.dtype)
            for key, tensor in tensors.items()
        }
    return {
        "optimizer": {"param_groups": [{"step": float(optimizer.num_updates)}]},
        "param_state": parameters,
        "param_state_sharding_type": "fully_reshardable",
    }


def apply_optimizer_state(optimizer: ShardedOptimizer, loaded: dict[str, Any]) -> None:
    """Take over the fp32 weights, after the rounded ones, and the step count."""
    for name, shard in optimizer.shards.items():
        shard.own.copy_(loaded["param_state"][name]["param"])
    optimizer.set_num_updates(int(num_updates(loaded)))


def num_updates(loaded: dict[str, Any]) -> float:
    """Adam's step count in an optimizer's loaded state, the same for all parameters."""
    (step,) = {group["step"] for group in loaded["optimizer"]["param_groups"]}
    return step


def _own_part(whole: ShardedTensor, mesh: DeviceMesh, dtype: torch.dtype) -> ShardedTensor | None:
    """This rank's rows of a parameter in place of the whole; None if it has none of them."""
    parameter = whole.data
    assert isinstance(parameter, DTensor), f"{whole.key} is not sharded"
    rows, own = own_rows(parameter), local_shard(parameter.detach()).to(dtype)
    if own.numel() == 0:
        return None
    return ShardedTensor(
        key=whole.key,
        data=own,
        dtype=dtype,
        local_shape=tuple(own.shape),
        global_shape=tuple(parameter.shape),
        global_offset=(rows.start, *[0] * (own.dim() - 1)),
        axis_fragmentations=None,  # the last ranks may have fewer rows
        replica_id=mesh.get_local_rank(COPIES) if mesh.ndim > 1 else 0,
    )
