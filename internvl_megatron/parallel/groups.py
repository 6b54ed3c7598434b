"""Process groups: the only file that touches Megatron Core's `parallel_state`.

The language model uses the groups `parallel_state` makes. The vision side has its own collection: units of tensor-parallel
ranks, most often of one, that are data parallel. The exchange between the two has groups of its own, one per kind of
message: with two pipeline stages Megatron Core sends half of its point-to-point traffic over the world group, and
collectives of different threads or phases on one communicator can wait for each other for ever.
"""

from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from internvl_megatron.device import Device
from internvl_megatron.parallel.layout import Layout, VisionLayout


@dataclass(frozen=True)
class Peers:
    """A process group and the global ranks in it, ascending."""

    group: dist.ProcessGroup
    ranks: np.ndarray
    """int64 [n]."""


@dataclass(frozen=True)
class Groups:
    """All process groups of a run, as seen by one rank."""

    layout: Layout
    vision_layout: VisionLayout
    rank: int
    language: ProcessGroupCollection
    vision: ProcessGroupCollection
    tiles: Peers
    """Pixels of tiles on their way to the ranks that encode them."""
    embeddings: Peers
    """Image embeddings on their way to the ranks that own those tokens."""
    gradients: Peers
    """Gradients of image embeddings on their way back."""
    host_world: dist.ProcessGroup
    """Small host messages between all ranks."""
    host_replica: dist.ProcessGroup
    """Small host messages inside one replica."""
    host_data: dist.ProcessGroup
    """Small host messages between the ranks at the same place of every replica."""
    host_copies: dist.ProcessGroup
    """Small host messages between the ranks that hold copies of the same language parameters."""

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.layout.stage(self.rank) == self.layout.pipeline_size - 1


def make_groups(
    layout: Layout, device: Device, timeout_seconds: int, vision_layout: VisionLayout | None = None
) -> Groups:
    """Create every process group; collective over all ranks of an initialised world.

    Without a layout of its own the vision encoder is data parallel over all ranks, and tiles travel between all of them.
    Groups made before stay as they are, but Megatron Core's own global ones are those made last.
    """
    if vision_layout is None:
        vision_layout = VisionLayout(layout, exchange_replicas=layout.data_size)
    rank, world = dist.get_rank(), dist.get_world_size()
    assert world == layout.world_size, f"layout {layout} wants {layout.world_size} ranks, the world has {world}"
    parallel_state.destroy_model_parallel()  # of a layout before
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_size,
        pipeline_model_parallel_size=layout.pipeline_size,
        context_parallel_size=layout.context_size,
        virtual_pipeline_model_parallel_size=layout.virtual_size if layout.virtual_size > 1 else None,
        distributed_timeout_minutes=max(1, timeout_seconds // 60),
        create_gloo_process_groups=False,
    )
    timeout = timedelta(seconds=timeout_seconds)
    everyone = list(range(world))

    def whole_world(backend: str) -> dist.ProcessGroup:
        return _checked(dist.new_group(everyone, timeout=timeout, backend=backend))

    alone = _checked(dist.new_group([rank], timeout=timeout, backend=device.backend, use_local_synchronization=True))
    replicas = [layout.replica_ranks(replica) for replica in range(layout.data_size)]

    def exchange(whole: bool) -> Peers:
        """A communicator of this rank's exchange group, or of its ranks that encode and of those that do not."""
        parts = [part for group in range(vision_layout.num_groups) for part in vision_layout.parts(group, whole)]
        made = [dist.new_group(part, timeout=timeout, backend=device.backend) for part in parts]
        return next(
            Peers(_checked(group), np.array(part)) for part, group in zip(parts, made, strict=True) if rank in part
        )

    def group_of_mine(partition: list[list[int]], backend: str) -> dist.ProcessGroup:
        """Create a group per part, as all ranks must, and return the one this rank is in."""
        made = [dist.new_group(part, timeout=timeout, backend=backend) for part in partition]
        return _checked(next(group for part, group in zip(partition, made, strict=True) if rank in part))

    def host_group_of_mine(partition: list[list[int]]) -> dist.ProcessGroup:
        return group_of_mine(partition, device.host_backend)

    language = ProcessGroupCollection.use_mpu_process_groups()
    # Megatron Core's own hierarchical groups need a package that is not among its dependencies.
    language.hcp = [
        group_of_mine(layout.sharing_heads(), device.backend),
        group_of_mine(layout.rings(), device.backend),
    ]
    vision_world = vision_data = whole_world(device.backend)
    vision_tensor = alone
    if vision_layout.tensor_size > 1:
        holders = vision_layout.holders
        vision_tensor = group_of_mine(holders, device.backend)
        vision_data = group_of_mine([list(peers) for peers in zip(*holders, strict=True)], device.backend)
    return Groups(
        layout=layout,
        vision_layout=vision_layout,
        rank=rank,
        language=language,
        vision=_vision_groups(alone, vision_tensor, vision_data, vision_world),
        tiles=exchange(whole=True),
        # An encoder inside the pipeline exchanges with its own stage alone: the others are busy with other rows.
        embeddings=exchange(whole=not vision_layout.first_stage_only),
        gradients=exchange(whole=not vision_layout.first_stage_only),
        host_world=whole_world(device.host_backend),
        host_replica=host_group_of_mine(replicas),
        host_data=host_group_of_mine([list(peers) for peers in zip(*replicas, strict=True)]),
        host_copies=host_group_of_mine(layout.copies()),
    )


def _vision_groups(
    alone: dist.ProcessGroup, tensor: dist.ProcessGroup, data: dist.ProcessGroup, world: dist.ProcessGroup
) -> ProcessGroupCollection:
    """The vision side is tensor and data parallel; the other axes have size 1.

    Args:
        alone: this rank.
        tensor: ranks that hold the parameters between them (`VisionLayout.holders`).
        data: ranks at the same place of every such set: they hold the same part.
        world: all ranks, over which the distributed optimizer sums the squares of gradients, of which each has a part.
    """
    collection = ProcessGroupCollection()
    for name in ("pp", "cp", "ep", "embd", "pos_embd", "expt_dp"):
        setattr(collection, name, alone)
    for name in ("tp", "mp", "tp_cp", "expt_tp", "tp_ep_pp"):
        setattr(collection, name, tensor)
    for name in ("dp", "dp_cp", "dp_cp_gtp_remat", "intra_dp_cp"):
        setattr(collection, name, data)
    for name in ("intra_dist_opt", "tp_dp_cp"):
        setattr(collection, name, world)
    return collection


def _checked(group: dist.ProcessGroup | int | None) -> dist.ProcessGroup:
    assert isinstance(group, dist.ProcessGroup), f"this rank is not part of the group it asked for: {group}"
    return group
