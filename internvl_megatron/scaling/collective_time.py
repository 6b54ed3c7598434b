"""How long messages take, from who sends how much to whom: a latency and bytes over a bandwidth, by the link they cross.

Ranks of a group are `stride` apart (`parallel.layout`: tensor-parallel ranks are neighbours, stages are farthest apart), eight to a
machine. Inside a machine they use NVLink; a group over several machines uses the network cards of all its ranks of a machine
at the same time, as rings of NCCL do on rails. Trees of switches are taken not to block.
"""

import math
from dataclasses import dataclass

from internvl_megatron.scaling.gpus import GPUS_PER_MACHINE, GpuKind

LINK_SHARE = 0.80
"""Of a link's bandwidth that large collectives reach. Assumed: nccl-tests on eight H100 show 360 of 450 GB/s in rings; all-reduce in
the switch 480 (dgxc-benchmarking, nccl/README.md)."""
NETWORK_LATENCY_SECONDS = 25e-6
"""Of a collective between machines, and `HOP_SECONDS` for each doubling of them: assumed."""
HOP_SECONDS = 5e-6


@dataclass(frozen=True)
class Group:
    """Ranks that send to each other."""

    size: int
    stride: int = 1

    @property
    def ranks_per_machine(self) -> int:
        """Of the group, in one machine."""
        return min(self.size, max(1, GPUS_PER_MACHINE // self.stride))

    @property
    def num_machines(self) -> int:
        """Machines the group is on."""
        return -(-self.size // self.ranks_per_machine)


@dataclass(frozen=True)
class Network:
    """Links between GPUs of one kind."""

    gpu: GpuKind

    def bandwidth(self, group: Group) -> float:
        """Bytes/s at which a rank passes on what goes around in a ring."""
        if group.num_machines == 1:
            return LINK_SHARE * self.gpu.machine_bandwidth
        rails = group.ranks_per_machine * self.gpu.network_bandwidth
        return LINK_SHARE * min(self.gpu.machine_bandwidth, rails)

    def latency(self, group: Group) -> float:
        """Seconds of a collective without bytes."""
        if group.num_machines == 1:
            return self.gpu.collective_latency_seconds
        return NETWORK_LATENCY_SECONDS + HOP_SECONDS * math.log2(group.num_machines)

    def all_gather(self, num_bytes: float, group: Group) -> float:
        """Seconds until all have `num_bytes`, of which each had its part."""
        if group.size == 1:
            return 0.0
        part = num_bytes * (group.size - 1) / group.size
        return self.latency(group) + part / self.bandwidth(group)

    def reduce_scatter(self, num_bytes: float, group: Group) -> float:
        """Seconds until each has its part of the sum of `num_bytes`."""
        summed = 0.0 if self.gpu.sum_bandwidth is None or group.size == 1 else num_bytes / self.gpu.sum_bandwidth
        return self.all_gather(num_bytes, group) + summed

    def all_to_all(self, num_bytes: float, group: Group) -> float:
        """Seconds until each rank has sent its `num_bytes`, in equal parts to all."""
        if group.size == 1:
            return 0.0
        inside = (group.ranks_per_machine - 1) / group.size
        outside = 1 - group.ranks_per_machine / group.size
        slowest = max(
            inside * num_bytes / (LINK_SHARE * self.gpu.machine_bandwidth),
            outside * num_bytes / (LINK_SHARE * self.gpu.network_bandwidth),
        )
        return self.latency(group) + slowest

    def message(self, num_bytes: float, stride: int) -> float:
        """Seconds of a message to the rank `stride` further."""
        is_near = stride < GPUS_PER_MACHINE
        link = self.gpu.machine_bandwidth if is_near else self.gpu.network_bandwidth
        return self.gpu.message_latency_seconds + num_bytes / (LINK_SHARE * link)
