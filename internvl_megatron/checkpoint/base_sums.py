"""Checksums of a model's frozen parameters over all ranks, the same under every layout (`adapter_base`)."""

import json
from collections import Counter

import torch
from torch.distributed.tensor import DTensor

from internvl_megatron.checkpoint.adapter_base import bit_sum
from internvl_megatron.model.build import Model, is_split
from internvl_megatron.model.vision_shards import local_shard
from internvl_megatron.parallel.groups import Groups
from internvl_megatron.parallel.host import exchange_bytes
from internvl_megatron.parallel.vision_mesh import COPIES


def frozen_sums(model: Model, groups: Groups, dtype: torch.dtype) -> dict[str, int]:
    """Sums of the bits of all parameters that are not trained, by name; collective over all ranks.

    Args:
        model: this rank's modules.
        groups: process groups.
        dtype: number format whose bits are summed.
    """
    own = {
        name: bit_sum(local_shard(parameter.detach()), dtype)
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and _counts(name, parameter, model, groups)
    }
    payload = json.dumps(own).encode()
    total: Counter[str] = Counter()
    for received in exchange_bytes([payload] * groups.layout.world_size, groups.host_world):
        total.update(json.loads(received))
    return dict(total)


def _counts(name: str, parameter: torch.nn.Parameter, model: Model, groups: Groups) -> bool:
    """Whether this rank's values are counted: each value of a parameter at one of the ranks that have it."""
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        return mesh.ndim == 1 or mesh.get_local_rank(COPIES) == 0
    side = groups.vision if name.startswith("vision.") else groups.language
    return side.dp_cp.rank() == 0 and (is_split(parameter) or model.tensor_group(name).rank() == 0)
