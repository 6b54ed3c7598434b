"""Image embeddings of one window on their owner, and later their gradients, in one piece of memory."""

import numpy as np
import torch
from torch import Tensor

from internvl_megatron.device import Device
from internvl_megatron.parallel.exchange import TokenSlice


class EmbeddingStore:
    """One tensor [n, D] that holds the embeddings until a row's backward pass puts their gradient in the same place.

    Each row takes its embeddings as a leaf of its own, cut off from the vision encoder's graph: the language model's
    schedule can run forward and backward in any order, and the encoder's backward runs when all gradients are there.
    """

    def __init__(self, embeddings: Tensor, owned: TokenSlice, device: Device) -> None:
        self._memory = embeddings
        self._first = np.searchsorted(owned.row, np.arange(owned.row.max(initial=-1) + 2))
        self._positions = device.put(owned.position)
        self._waiting: set[int] = set()

    def row(self, row: int, requires_grad: bool) -> tuple[Tensor, Tensor] | None:
        """A row's embeddings [m, D] and their places in the local slice, int64 [m]; None where it has none here."""
        if row + 1 >= len(self._first) or self._first[row] == self._first[row + 1]:
            return None
        span = slice(int(self._first[row]), int(self._first[row + 1]))
        # `.data` gives the leaf a version counter of its own: gradients written for other rows must not look to
        # autograd like a change of this row's values.
        leaf = self._memory[span].data.requires_grad_(requires_grad)
        if requires_grad:
            self._waiting.add(row)
            leaf.register_post_accumulate_grad_hook(lambda tensor: self._keep_gradient(row, span, tensor))
        return leaf, self._positions[span]

    def gradients(self) -> Tensor:
        """Gradients [n, D] of all embeddings, once every row has run backward."""
        assert not self._waiting, f"rows {sorted(self._waiting)} have not run backward"
        return self._memory

    @torch.no_grad()
    def _keep_gradient(self, row: int, span: slice, leaf: Tensor) -> None:
        assert leaf.grad is not None, f"row {row} got no gradient"
        self._memory[span].copy_(leaf.grad)
        leaf.grad = None
        self._waiting.discard(row)
