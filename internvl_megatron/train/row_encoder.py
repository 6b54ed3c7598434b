"""The vision encoder inside the pipeline: what most Megatron trainers do, here to compare the decoupled schedule with.

The ranks of the first stage encode the images of a row when its forward pass begins, and run the encoder's backward pass
with the row's. The other stages wait for them: the encoder's work is on the critical path, on one stage.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from internvl_megatron.device import Device
from internvl_megatron.model.build import torch_dtype
from internvl_megatron.parallel.exchange import Exchange, HeldTiles
from internvl_megatron.parallel.tile_plan import TilePlan
from internvl_megatron.train.window_encoder import TileEncoder, WindowEncoder


class RowEncoder(WindowEncoder):
    """Image embeddings of rows, each computed when it is asked for."""

    def __init__(self, encoder: TileEncoder, exchange: Exchange, plan: TilePlan, tiles: HeldTiles) -> None:
        """Take the tiles of a window; the plan shares out the tiles of every row by themselves."""
        self._plan = plan
        self._tiles = tiles
        self._encoder = encoder
        self._exchange = exchange
        self._device = exchange.device
        self._replica = exchange.groups.layout.replica(exchange.groups.rank)
        config, kind = encoder.config, self._device.torch_device
        shape = 0, exchange.tokens_per_tile, config.model.language.hidden_size
        self._nothing = torch.empty(shape, dtype=torch_dtype(config.dtype), device=kind)

    def encode(self) -> None:
        """Nothing: every row comes when it is asked for."""

    def backprop(self) -> None:
        """Nothing: the passes of the rows have done it."""

    def row(self, row: int) -> tuple[Tensor, Tensor] | None:
        """A row's embeddings [m, D] and their places in the local slice, int64 [m]; None if the row has no image.

        Collective over the ranks of the first stage, in backward too.
        """
        plan = self._plan
        if not ((plan.table.row == row) & (plan.table.replica == self._replica)).any():
            return None
        mine = plan.tiles_of(self._exchange.unit, row)
        if len(mine):
            embeddings = self._encoder(self._tiles.take(mine), plan.table.number[mine], self._encoder.learns)
            places = plan.encoded_places(self._exchange.unit, row)
            if places is not None:
                embeddings = embeddings.index_select(0, self._device.put(places))
        else:
            # A part of the graph: this rank takes part in the messages of backward all the same.
            embeddings = self._nothing.detach().requires_grad_(self._encoder.learns)
        tokens = _SendEmbeddings.apply(embeddings, self._exchange, plan.places, row, self._device)
        assert isinstance(tokens, Tensor), "autograd functions return what their forward returns"
        return tokens, self._device.put(self._exchange.owned(plan.places, row).position)


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
