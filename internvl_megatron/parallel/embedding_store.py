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

    def __init__(self, owned: TokenSlice, hidden_size: int, dtype: torch.dtype, device: Device) -> None:
        """Make room for the embeddings of these tokens."""
        self.dtype = dtype
        self._memory = torch.empty(len(owned.tokens), hidden_size, dtype=dtype, device=device.torch_device)
        self._owned = owned
        self._first = np.searchsorted(owned.row, np.arange(owned.row.max(initial=-1) + 2))
        self._device = device
        self._waiting: set[int] = set()

    def put(self, tokens: np.ndarray, embeddings: Tensor) -> None:
        """Take the embeddings [m, D] of some of the tokens, in any order."""
        self._memory[self._places(tokens)] = embeddings

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
        return leaf, self._device.put(self._owned.position[span])

    def gradients(self, tokens: np.ndarray) -> Tensor:
        """Gradients [m, D] of some of the tokens' embeddings, in any order, once their rows have run backward."""
        places = np.searchsorted(self._owned.tokens, tokens)
        waiting = self._waiting.intersection(self._owned.row[places].tolist())
        assert not waiting, f"rows {sorted(waiting)} have not run backward"
        return self._memory[self._device.put(places)]

    def _places(self, tokens: np.ndarray) -> Tensor:
        return self._device.put(np.searchsorted(self._owned.tokens, tokens))

    @torch.no_grad()
    def _keep_gradient(self, row: int, span: slice, leaf: Tensor) -> None:
        assert leaf.grad is not None, f"row {row} got no gradient"
        self._memory[span].copy_(leaf.grad)
        leaf.grad = None
        self._waiting.discard(row)
