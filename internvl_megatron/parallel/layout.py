"""Which rank is which: pure arithmetic on the rank grid, without torch.

Ranks are numbered as Megatron Core numbers them ("tp-cp-ep-dp-pp"): tensor-parallel ranks are neighbours, then come the
context-parallel ones, pipeline stages are farthest apart. A *replica* is one data-parallel copy of the language model; the
vision encoder is data parallel over all ranks.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Sizes of the language model's parallel axes and the place of every rank in them."""

    tensor_size: int
    pipeline_size: int
    data_size: int
    context_size: int = 1
    virtual_size: int = 1
    """Model chunks of a pipeline rank; they are passed one after the other, all ranks between two of them."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.stage_size * self.pipeline_size * self.data_size

    @property
    def stage_size(self) -> int:
        """Ranks of one replica on one pipeline stage."""
        return self.tensor_size * self.context_size

    def rank(self, tensor: int, data: int, pipeline: int, context: int = 0) -> int:
        """Global rank at these coordinates."""
        return tensor + self.tensor_size * (context + self.context_size * (data + self.data_size * pipeline))

    def tensor_index(self, rank: int) -> int:
        """Place of a rank in its tensor-parallel group."""
        return rank % self.tensor_size

    def context_index(self, rank: int) -> int:
        """Place of a rank in its context-parallel group: which part of the row it has."""
        return rank // self.tensor_size % self.context_size

    def replica(self, rank: int) -> int:
        """Data-parallel copy of the language model a rank belongs to."""
        return rank // self.stage_size % self.data_size

    def stage(self, rank: int) -> int:
        """Pipeline stage of a rank."""
        return rank // (self.stage_size * self.data_size)

    def row_slice(self, rank: int, num_tokens: int) -> tuple[int, int]:
        """First and end place, in a row of so many tokens, of the part a rank's attention queries come from.

        Under sequence parallelism the ranks of its tensor-parallel group share this part between the blocks.
        """
        index = self.context_index(rank)
        return num_tokens * index // self.context_size, num_tokens * (index + 1) // self.context_size

    def replica_ranks(self, replica: int) -> list[int]:
        """Global ranks of one replica in ascending order; the first is on the first stage and leads the replica."""
        return [
            self.rank(tensor, replica, stage, context)
            for stage in range(self.pipeline_size)
            for context in range(self.context_size)
            for tensor in range(self.tensor_size)
        ]

    def copies(self) -> list[list[int]]:
        """Ranks that hold the same language parameters: those that differ in context and replica only."""
        return [
            [
                self.rank(tensor, replica, stage, context)
                for replica in range(self.data_size)
                for context in range(self.context_size)
            ]
            for stage in range(self.pipeline_size)
            for tensor in range(self.tensor_size)
        ]

    def __str__(self) -> str:
        """Short form for logs, like TP2 x PP2 x DP1."""
        context = f" x CP{self.context_size}" if self.context_size > 1 else ""
        virtual = f" x VPP{self.virtual_size}" if self.virtual_size > 1 else ""
        return f"TP{self.tensor_size}{context} x PP{self.pipeline_size}{virtual} x DP{self.data_size}"
