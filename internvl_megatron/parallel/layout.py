"""Which rank is which: pure arithmetic on the rank grid, without torch.

Ranks are numbered as Megatron Core numbers them ("tp-cp-ep-dp-pp"): tensor-parallel ranks are neighbours, pipeline
stages are farthest apart. A *replica* is one data-parallel copy of the language model; the vision encoder is data
parallel over all ranks.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Sizes of the language model's parallel axes and the place of every rank in them."""

    tensor_size: int
    pipeline_size: int
    data_size: int

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor_size * self.pipeline_size * self.data_size

    def rank(self, tensor: int, data: int, pipeline: int) -> int:
        """Global rank at these coordinates."""
        return tensor + self.tensor_size * (data + self.data_size * pipeline)

    def tensor_index(self, rank: int) -> int:
        """Place of a rank in its tensor-parallel group."""
        return rank % self.tensor_size

    def replica(self, rank: int) -> int:
        """Data-parallel copy of the language model a rank belongs to."""
        return rank // self.tensor_size % self.data_size

    def stage(self, rank: int) -> int:
        """Pipeline stage of a rank."""
        return rank // (self.tensor_size * self.data_size)

    def replica_ranks(self, replica: int) -> list[int]:
        """Global ranks of one replica in ascending order; the first is on the first stage and leads the replica."""
        return [
            self.rank(tensor, replica, stage)
            for stage in range(self.pipeline_size)
            for tensor in range(self.tensor_size)
        ]

    def __str__(self) -> str:
        """Short form for logs, like TP2 x PP2 x DP1."""
        return f"TP{self.tensor_size} x PP{self.pipeline_size} x DP{self.data_size}"
