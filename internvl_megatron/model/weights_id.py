"""A number that says which weights a model has, the same under every layout."""

import hashlib

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from internvl_megatron.model.build import Model, is_split
from internvl_megatron.model.vision_shards import local_shard
from internvl_megatron.parallel.groups import Groups
from internvl_megatron.parallel.vision_mesh import COPIES

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
_VALUES_AT_A_TIME = 2**24


def weights_id(model: Model, groups: Groups) -> str:
    """16 hex digits over the names, bits and dtype of all parameters, which must be up to date; collective over all ranks.

    Sums of bits modulo 2^64, so it does not matter how parameters are split; values that change places inside one parameter
    are not seen, and that is not what it is for.
    """
    total = 0
    for name, parameter in model.named_parameters():
        if _counts(name, parameter, model, groups):
            factor = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") | 1
            total += factor * _sum_of_bits(local_shard(parameter.detach()))
    own = torch.from_numpy(np.array([total % 2**64], dtype=np.uint64).view(np.int64))
    dist.all_reduce(own, group=groups.host_world)  # wraps around as sums modulo 2^64 do
    return f"{int(own) % 2**64:016x}"


def _sum_of_bits(values: Tensor) -> int:
    """Of numbers that stand for the values' bits; 0 stands for 0, with which split heads are padded."""
    total = 0
    for part in values.contiguous().flatten().split(_VALUES_AT_A_TIME):
        bits = part.view(_BITS[values.dtype]).to(torch.int64)
        total += int((bits * (bits + 0x9E3779B1)).sum())
    return total


def _counts(name: str, parameter: torch.nn.Parameter, model: Model, groups: Groups) -> bool:
    """Whether this rank is the one whose copy of a part is taken."""
    layout, rank = groups.layout, groups.rank
    if name.startswith("vision.") and model.vision_mesh is not None:
        mesh = model.vision_mesh
        return mesh.ndim == 1 or mesh.get_local_rank(COPIES) == 0
    place = model.tensor_group(name).rank()
    if place > 0 and not is_split(parameter):
        return False
    if name.startswith("vision."):
        return rank in groups.vision_layout.holders[0]
    return layout.replica(rank) == layout.context_index(rank) == 0
