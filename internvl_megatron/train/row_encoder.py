"""The vision encoder inside the pipeline: what most Megatron trainers do, here to compare the decoupled schedule with.

The ranks of the first stage encode the images of a row when its forward pass begins, and run the encoder's backward pass
with the row's. The other stages wait for them: the encoder's work is on the critical path, on one stage.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from internvl_megatron.device import Device
from internvl_megatron.parallel.exchange import Exchange, HeldTiles
from internvl_megatron.parallel.tile_plan import TilePlan


class RowEncoder:
    """Image embeddings of rows, each computed when it is asked for; takes the place of an `EmbeddingStore`."""

    def __init__(
        self,
        plan: TilePlan,
        tiles: HeldTiles,
        encode: Callable[[Tensor, np.ndarray], Tensor],
        exchange: Exchange,
        device: Device,
        nothing: Tensor,
    ) -> None:
        """Take the tiles of a window.

        Args:
            plan: of the window; the tiles of every row are shared out by themselves.
            tiles: those this rank encodes.
            encode: tiles and their numbers in the global batch to embeddings [t, K, D].
            exchange: between the ranks of the first stage.
            device: of the embeddings.
            nothing: [0, K, D], the embeddings of a rank that has no tile of a row.
        """
        self._plan = plan
        self._tiles = tiles
        self._encode = encode
        self._exchange = exchange
        self._device = device
        self._nothing = nothing
        self._replica = exchange.groups.layout.replica(exchange.groups.rank)

    def row(self, row: int, requires_grad: bool) -> tuple[Tensor, Tensor] | None:
        """A row's embeddings [m, D] and their places in the local slice, int64 [m]; None if the row has no image.

        Collective over the ranks of the first stage, in backward too.
        """
        plan = self._plan
        if not ((plan.table.row == row) & (plan.table.replica == self._replica)).any():
            return None
        mine = plan.tiles_of(self._exchange.unit, row)
        if len(mine):
            embeddings = self._encode(self._tiles.take(mine), plan.table.number[mine])
        else:
            # A part of the graph: this rank takes part in the messages of backward all the same.
            embeddings = self._nothing.detach().requires_grad_(requires_grad)
        tokens = _SendEmbeddings.apply(embeddings, self._exchange, plan, row, self._device)
        assert isinstance(tokens, Tensor), "autograd functions return what their forward returns"
        return tokens, self._device.put(self._exchange.owned(plan, row).position)


class _SendEmbeddings(torch.autograd.Function):
    """`Exchange.send_embeddings`, and `send_gradients` as its backward."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, exchange: Exchange, plan: TilePlan, row: int, device: Device) -> Tensor:
        """[t, K, D] to [n, D]."""
        ctx.exchange, ctx.plan, ctx.row, ctx.device = exchange, plan, row, device
        tokens, received = exchange.send_embeddings(plan, row, embeddings)
        order = np.argsort(tokens)
        ctx.tokens = tokens[order]
        return received[device.put(order)]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """[n, D] to [t, K, D]."""

        def gradients_of(tokens: np.ndarray) -> Tensor:
            return gradients[0][ctx.device.put(np.searchsorted(ctx.tokens, tokens))]

        return ctx.exchange.send_gradients(ctx.plan, ctx.row, gradients_of), None, None, None, None
