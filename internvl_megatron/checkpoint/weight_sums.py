"""Checksums of a model's parameters over all ranks, the same under every layout: by them checkpoints know other weights again."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable

import torch
from torch.distributed.tensor import DTensor

from internvl_megatron.model.adapter import is_adapter
from internvl_megatron.model.bit_sum import bit_sum
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
    return _sums(model, groups, dtype, lambda name, parameter: not parameter.requires_grad)


def weights_id(model: Model, groups: Groups, with_adapters: bool = False) -> str:
    """16 hex digits over the names, bits and number formats of all parameters; collective over all ranks.

    They must be up to date. Values that change places inside one parameter are not seen, and that is not what it is for.
    Those of adapters count only if that is asked for.
    """
    sums = _sums(model, groups, None, lambda name, parameter: with_adapters or not is_adapter(name))
    return hashlib.blake2b(json.dumps(sorted(sums.items())).encode(), digest_size=8).hexdigest()


def _sums(
    model: Model, groups: Groups, dtype: torch.dtype | None, wanted: Callable[[str, torch.nn.Parameter], bool]
) -> dict[str, int]:
    """Sums of the bits of the wanted parameters by name, in one number format or (None) each in its own."""
    own = {
        name: bit_sum(local_shard(parameter.detach()), dtype or parameter.dtype)
        for name, parameter in model.named_parameters()
        if wanted(name, parameter) and _counts(name, parameter, model, groups)
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
