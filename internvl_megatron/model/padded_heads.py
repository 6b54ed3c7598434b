"""Attention heads shared out evenly over tensor-parallel ranks: heads of zeros after the real ones make up the number.

InternViT-6B has 25 heads. On two ranks it computes 26: in its parameters the last one is rows of zeros (queries, keys and
values, their biases and norms) and columns of zeros (the output projection). Such a head contributes nothing: its values are
0, and the columns that would read them are too. It stays so: each of its gradients is a product with one of these zeros,
hence exactly 0 while gradients are finite, and what an optimizer makes of parameter 0 and gradient 0 (moments, weight
decay) is 0 again.

Outside the modules the extra heads do not exist: whole tensors and checkpoint files hold the real ones, so they fit every
number of ranks.
"""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ReplicaId,
    ShardedBase,
    ShardedTensor,
    ShardedTensorFactory,
)
from torch import Tensor


def padded_heads(num_heads: int, tensor_size: int) -> int:
    """Heads over all tensor-parallel ranks, those of zeros counted."""
    return -(-num_heads // tensor_size) * tensor_size


def mark_padded(parameter: torch.nn.Parameter, real_size: int) -> None:
    """Note that a split parameter ends in zeros: over all ranks only the first `real_size` along its axis are real."""
    setattr(parameter, "real_size", real_size)


def real_size(parameter: Tensor) -> int | None:
    """What the real heads fill of a split parameter's axis over all ranks; None for a parameter without padding."""
    return getattr(parameter, "real_size", None)


def with_zeros(real: Tensor, axis: int, size: int) -> Tensor:
    """A tensor made `size` long along one axis by zeros at its end."""
    shape = list(real.shape)
    shape[axis] = size
    padded = real.new_zeros(shape)
    padded.narrow(axis, 0, real.shape[axis]).copy_(real)
    return padded


def only_real_heads(entry: ShardedBase) -> ShardedBase:
    """Make a checkpoint's entry of a padded parameter save and load the real heads alone; others stay as they are.

    Args:
        entry: as Megatron Core makes it of the parameter, which is its data.
    """
    parameter: Any = entry.data
    over_all_ranks = real_size(parameter) if isinstance(entry, ShardedTensor) else None
    if not isinstance(entry, ShardedTensor) or over_all_ranks is None:
        return entry
    # Real heads do not divide over the ranks, and parts of different sizes cannot be stacked.
    assert entry.prepend_axis_num == 0, f"{entry.key}: layers are saved one by one, not stacked in one tensor"
    axis = parameter.partition_dim
    size = parameter.shape[axis]
    here = min(max(over_all_ranks - entry.global_offset[axis], 0), size)
    shape, offset = list(entry.global_shape), entry.global_offset
    shape[axis] = over_all_ranks

    def build(
        key: str, data: Tensor, replica_id: ReplicaId, flattened_range: slice | None
    ) -> dict[str, ShardedTensor | LocalNonpersistentObject]:
        del flattened_range
        real = data.detach().narrow(axis, 0, here)
        if here == 0:
            return {"real": LocalNonpersistentObject(real)}
        return {
            "real": ShardedTensor(key, real, real.dtype, tuple(real.shape), tuple(shape), offset, None, replica_id)
        }

    def merge(loaded: dict[str, Tensor]) -> Tensor:
        return with_zeros(loaded["real"], axis, size)

    return ShardedTensorFactory(entry.key, parameter, build, merge, entry.replica_id)
