"""Which ranks split the vision side between them, and which hold copies of the same shards."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from internvl_megatron.device import Device
from internvl_megatron.parallel.groups import Groups

COPIES, SHARDS = "copies", "shards"
"""Names of the mesh's dimensions."""


def vision_mesh(groups: Groups, shard_ranks: int | None, device: Device, timeout_seconds: int) -> DeviceMesh:
    """The mesh of the vision side's data-parallel ranks, in communicators of its own; collective over all ranks.

    Args:
        groups: process groups; its vision layout says who encodes.
        shard_ranks: neighbouring ranks that hold all shards together; None = all ranks.
        device: whose backend moves the parameters.
        timeout_seconds: after which a message counts as lost.

    Returns:
        [shards], or [copies, shards] where there are fewer shards than ranks; its ranks are global ones.
    """
    mesh, found = None, None
    for place in range(groups.vision_layout.tensor_size):
        ranks = sorted(unit[place] for unit in groups.vision_layout.units)  # neighbours are on one machine
        size = shard_ranks or len(ranks)
        rows = [ranks[first : first + size] for first in range(0, len(ranks), size)]
        columns = [list(column) for column in zip(*rows, strict=True)]
        # Every rank creates every group, as torch asks for, and keeps its own.
        made = [
            [_group(part, device, timeout_seconds) for part in partition]
            for partition in ((columns, rows) if len(rows) > 1 else (rows,))
        ]
        if groups.rank in ranks:
            mesh = torch.tensor(rows if len(rows) > 1 else rows[0], dtype=torch.int)
            found = [next(group for group in partition if group is not None) for partition in made]
    assert mesh is not None and found is not None, f"rank {groups.rank} is no data-parallel rank of the vision side"
    kind = device.torch_device.type
    if len(found) == 1:
        return DeviceMesh.from_group(found[0], kind, mesh, mesh_dim_names=(SHARDS,))
    return DeviceMesh.from_group(found, kind, mesh, mesh_dim_names=(COPIES, SHARDS))


def holders_of_copies(mesh: DeviceMesh) -> list[int]:
    """Global ranks that hold the same shards as this one, this one among them."""
    rows = mesh.mesh.reshape(-1, mesh.size(-1))
    return rows[:, mesh.get_local_rank(SHARDS)].tolist()


def _group(ranks: list[int], device: Device, timeout_seconds: int) -> dist.ProcessGroup | None:
    """A communicator of these ranks; None on the others."""
    group = dist.new_group(ranks, timeout=timedelta(seconds=timeout_seconds), backend=device.backend)
    return group if isinstance(group, dist.ProcessGroup) else None
