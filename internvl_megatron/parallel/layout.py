"""Which rank is which: pure arithmetic on the rank grid, without torch.

Ranks are numbered as Megatron Core numbers them ("tp-cp-ep-dp-pp"): tensor-parallel ranks are neighbours, then come the
context-parallel ones, pipeline stages are farthest apart. A *replica* is one data-parallel copy of the language model; the
vision encoder has a layout of its own over the same ranks: by default it is data parallel over all of them.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Layout:
    """Sizes of the language model's parallel axes and the place of every rank in them."""

    tensor_size: int
    pipeline_size: int
    data_size: int
    context_size: int = 1
    virtual_size: int = 1
    """Model chunks of a pipeline rank; they are passed one after the other, all ranks between two of them."""
    ring_size: int = 1
    """Context-parallel ranks, of `context_size`, over which every sample is divided; the others of them share its heads."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.stage_size * self.pipeline_size * self.data_size

    @property
    def stage_size(self) -> int:
        """Ranks of one replica on one pipeline stage."""
        return self.tensor_size * self.context_size

    @property
    def row_multiple(self) -> int:
        """A row without its padding has a multiple of so many tokens, so that the ranks of a stage can share it."""
        return math.lcm(self.stage_size, 2 * self.ring_size)

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

    def context_place(
        self, position: np.ndarray, span_start: np.ndarray, span_tokens: np.ndarray, row_tokens: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Which context-parallel rank has a token, and where in its part of the row.

        Parts are runs of the row, unless the ring has several ranks. It cuts every span (sample, or padding at the end) into
        twice as many chunks as it has ranks and gives rank i the i-th and the i-th from the end, which makes causal
        attention cost the same everywhere; what a ring rank has is then cut into runs for the ranks that share heads.

        Args:
            position: places of tokens in their rows.
            span_start: first place of the token's span.
            span_tokens: its length, a multiple of twice the ring's ranks.
            row_tokens: length of the row.
        """
        ring = np.zeros_like(position)
        if self.ring_size > 1:
            chunk_tokens = span_tokens // (2 * self.ring_size)
            chunk, rest = np.divmod(position - span_start, chunk_tokens)
            in_second_half = chunk >= self.ring_size
            ring = np.where(in_second_half, 2 * self.ring_size - 1 - chunk, chunk)
            position = span_start // self.ring_size + in_second_half * chunk_tokens + rest
        sharing = self.context_size // self.ring_size
        index, place = np.divmod(position, row_tokens // self.context_size)
        return ring * sharing + index, place

    def row_part(self, rank: int, segment_lengths: np.ndarray) -> slice | np.ndarray:
        """Places in a row, of the part a rank's attention queries come from, in the order it has them.

        Under sequence parallelism the ranks of its tensor-parallel group share this part between the blocks.
        """
        num_tokens, index = int(segment_lengths.sum()), self.context_index(rank)
        if self.ring_size == 1:
            return slice(num_tokens * index // self.context_size, num_tokens * (index + 1) // self.context_size)
        owner, place = self.context_place(*_tokens_of(segment_lengths), np.array(num_tokens))
        mine = np.flatnonzero(owner == index)
        return mine[np.argsort(place[mine])]

    def ring_order(self, segment_lengths: np.ndarray) -> np.ndarray:
        """Where each token of a row is in the parts of the ring's ranks laid end to end."""
        ring = replace(self, context_size=self.ring_size)
        num_tokens = int(segment_lengths.sum())
        owner, place = ring.context_place(*_tokens_of(segment_lengths), np.array(num_tokens))
        return owner * (num_tokens // self.ring_size) + place

    def replica_ranks(self, replica: int) -> list[int]:
        """Global ranks of one replica in ascending order; the first is on the first stage and leads the replica."""
        return [
            self.rank(tensor, replica, stage, context)
            for stage in range(self.pipeline_size)
            for context in range(self.context_size)
            for tensor in range(self.tensor_size)
        ]

    def sharing_heads(self) -> list[list[int]]:
        """Context-parallel ranks that have one ring rank's tokens between them; neighbours, whose messages are fastest."""
        sharing = self.context_size // self.ring_size
        return [
            context[first : first + sharing]
            for context in self._contexts()
            for first in range(0, len(context), sharing)
        ]

    def rings(self) -> list[list[int]]:
        """Context-parallel ranks that have the same heads of different tokens."""
        sharing = self.context_size // self.ring_size
        return [context[first::sharing] for context in self._contexts() for first in range(sharing)]

    def _contexts(self) -> list[list[int]]:
        """Context-parallel groups."""
        return [
            [self.rank(tensor, replica, stage, context) for context in range(self.context_size)]
            for stage in range(self.pipeline_size)
            for replica in range(self.data_size)
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
        if self.ring_size > 1:
            context += f" (ring {self.ring_size})"
        virtual = f" x VPP{self.virtual_size}" if self.virtual_size > 1 else ""
        return f"TP{self.tensor_size}{context} x PP{self.pipeline_size}{virtual} x DP{self.data_size}"


def _tokens_of(segment_lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every token of a row: its place, first place and length of its segment."""
    lengths = segment_lengths.astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()), np.repeat(starts, lengths), np.repeat(lengths, lengths)


@dataclass(frozen=True)
class VisionLayout:
    """Which ranks encode tiles, and between which ranks tiles travel.

    A *unit* is the ranks that encode a tile together: one rank, unless the encoder is tensor parallel. An *exchange group* is
    the replicas that share out their tiles.
    """

    language: Layout
    tensor_size: int = 1
    """Ranks of a unit."""
    exchange_replicas: int = 1
    """Replicas of an exchange group; divides the number of replicas."""
    first_stage_only: bool = False
    """Only ranks of the first pipeline stage encode."""

    @property
    def num_groups(self) -> int:
        """Exchange groups."""
        return self.language.data_size // self.exchange_replicas

    def group_of(self, rank: int) -> int:
        """Exchange group of a rank."""
        return self.language.replica(rank) // self.exchange_replicas

    def members(self, group: int) -> list[int]:
        """Ranks of an exchange group, ascending."""
        replicas = range(group * self.exchange_replicas, (group + 1) * self.exchange_replicas)
        return sorted(rank for replica in replicas for rank in self.language.replica_ranks(replica))

    @cached_property
    def units(self) -> list[list[int]]:
        """Ranks of every unit, by exchange group; in it, neighbours make a unit."""
        return [unit for group in range(self.num_groups) for unit in self._units_of(group)]

    @property
    def units_per_group(self) -> int:
        """Units of an exchange group: group g has those from g times as many."""
        return len(self.units) // self.num_groups

    @cached_property
    def unit_of_rank(self) -> list[int | None]:
        """Unit of every rank; None for ranks that do not encode."""
        found: list[int | None] = [None] * self.language.world_size
        for number, unit in enumerate(self.units):
            for rank in unit:
                found[rank] = number
        return found

    @cached_property
    def holders(self) -> list[list[int]]:
        """Ranks that hold the encoder's parameters between them, a part each: the units, and sets as large of ranks that do
        not encode."""
        parts = [part for group in range(self.num_groups) for part in self.parts(group, whole=False)]
        return [holders for part in parts for holders in self._in_units(part)]

    def parts(self, group: int, whole: bool) -> list[list[int]]:
        """An exchange group's members in one part, or those that encode in one and the others in another."""
        members = self.members(group)
        if whole:
            return [members]
        encoders = self._encoders(group)
        others = [rank for rank in members if rank not in encoders]
        return [encoders, others] if others else [encoders]

    def _encoders(self, group: int) -> list[int]:
        return [rank for rank in self.members(group) if self.language.stage(rank) == 0 or not self.first_stage_only]

    def _units_of(self, group: int) -> list[list[int]]:
        return self._in_units(self._encoders(group))

    def _in_units(self, ranks: list[int]) -> list[list[int]]:
        return [ranks[first : first + self.tensor_size] for first in range(0, len(ranks), self.tensor_size)]
