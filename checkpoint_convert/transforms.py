"""The ways a Megatron parameter is made of Hugging Face tensors, each with its exact inverse.

Nothing is computed: rows are placed, so every value survives bit for bit. Both directions also work on tensors without
values (torch's meta device), which is how the shapes of the Hugging Face tensors are found.

Shapes: G key/value heads, R query heads per key/value head, D head size, C input width (absent for biases).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Transform(Protocol):
    """Joins the Hugging Face tensors of one parameter, and takes them apart again."""

    def join(self, parts: list[Tensor]) -> Tensor:
        """Hugging Face tensors, in the table's order, to the Megatron parameter."""
        ...

    def split(self, whole: Tensor) -> list[Tensor]:
        """The inverse of `join`; parts may be views of the whole."""
        ...


@dataclass(frozen=True)
class Same:
    """One tensor, unchanged."""

    def join(self, parts: list[Tensor]) -> Tensor:
        """Pass through."""
        return parts[0]

    def split(self, whole: Tensor) -> list[Tensor]:
        """Pass through."""
        return [whole]


@dataclass(frozen=True)
class GroupedQKV:
    """q [G R D, C], k [G D, C], v [G D, C] to Megatron's rows grouped per key/value head: R queries, key, value."""

    num_groups: int
    head_size: int

    def join(self, parts: list[Tensor]) -> Tensor:
        """[G R D, C], [G D, C], [G D, C] to [G (R + 2) D, C]."""
        grouped = [part.reshape(self.num_groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def split(self, whole: Tensor) -> list[Tensor]:
        """[G (R + 2) D, C] to q, k, v."""
        grouped = whole.reshape(self.num_groups, -1, *whole.shape[1:])
        query_rows = grouped.shape[1] - 2 * self.head_size
        sizes = [query_rows, self.head_size, self.head_size]
        return [part.flatten(0, 1).contiguous() for part in grouped.split(sizes, dim=1)]


@dataclass(frozen=True)
class ThirdsQKV:
    """One tensor of contiguous thirds q | k | v (InternViT, as many key/value heads as heads) to grouped rows."""

    grouped: GroupedQKV

    def join(self, parts: list[Tensor]) -> Tensor:
        """[3 G D, C] in thirds to [3 G D, C] per head."""
        return self.grouped.join(list(parts[0].chunk(3)))

    def split(self, whole: Tensor) -> list[Tensor]:
        """The inverse."""
        return [torch.cat(self.grouped.split(whole))]


@dataclass(frozen=True)
class GateUp:
    """Gate and up projection stacked, gate first."""

    def join(self, parts: list[Tensor]) -> Tensor:
        """[F, C], [F, C] to [2 F, C]."""
        return torch.cat(parts)

    def split(self, whole: Tensor) -> list[Tensor]:
        """[2 F, C] to gate and up."""
        return list(whole.chunk(2))


@dataclass(frozen=True)
class PaddedVocab:
    """A table over the vocabulary; Megatron's has zero rows at its end."""

    vocab_size: int
    padded_size: int

    def join(self, parts: list[Tensor]) -> Tensor:
        """[V, C] to [padded V, C]."""
        table = parts[0]
        return torch.cat([table, table.new_zeros(self.padded_size - self.vocab_size, *table.shape[1:])])

    def split(self, whole: Tensor) -> list[Tensor]:
        """[padded V, C] to [V, C]."""
        return [whole[: self.vocab_size]]
