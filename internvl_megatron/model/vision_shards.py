"""The vision tower in shards: every rank holds some rows of every parameter and gathers whole layers while it uses them.

torch's FSDP2 does the work. A shard is this rank's chunk along dimension 0, in fp32: it is the optimizer's copy as well.
"""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from internvl_megatron.model.vision import VisionTower
from internvl_megatron.parallel.vision_mesh import SHARDS


def shard(tower: VisionTower, mesh: DeviceMesh, dtype: torch.dtype, device: torch.device) -> None:
    """Turn a tower without values (on torch's meta device) into this rank's shards, whose values are undefined.

    Args:
        tower: changed in place; its parameters become DTensors.
        mesh: of the vision side (`vision_mesh`).
        dtype: in which layers compute; parameters stay fp32.
        device: of the shards.
    """
    assert not list(tower.buffers()), "a buffer on the meta device would never get its values back"
    tower.float()
    policy = MixedPrecisionPolicy()
    if dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*tower.encoder.layers, tower.projector, tower):
        # The root too, although its own parameters are few: kept whole after an evaluation, they would be those from before
        # an update without images when the next tiles come.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        assert isinstance(module, FSDPModule), "fully_shard gives a module this class"
        # Losses are divided by their global weight already: gradients are summed.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    tower.to_empty(device=device)


def local_shard(parameter: Tensor) -> Tensor:
    """This rank's rows of a parameter or gradient, without communication; a whole tensor's are all of them."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def own_rows(parameter: DTensor) -> slice:
    """Which rows of a parameter this rank has; none where there are fewer rows than ranks before it."""
    num_rows, mesh = parameter.shape[0], parameter.device_mesh
    per_rank = -(-num_rows // mesh.size(-1))
    first = min(mesh.get_local_rank(SHARDS) * per_rank, num_rows)
    rows = slice(first, min(first + per_rank, num_rows))
    assert parameter.to_local().shape[0] == rows.stop - rows.start, f"FSDP2 has cut {parameter.shape} in another way"
    return rows
