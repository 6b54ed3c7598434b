"""Image embeddings of one window of micro-batches: who computes them when is what the schedules differ in.

`WindowEncoder` is what the step asks for; here is the schedule with a phase of its own for the encoder, before the pipeline
and after it. `bubble_encoder` fills the pipeline's pauses, `row_encoder` runs inside its passes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from internvl_megatron.config.schema import RunConfig
from internvl_megatron.device import Device
from internvl_megatron.model.build import torch_dtype
from internvl_megatron.model.drop_path import residual_scale
from internvl_megatron.parallel.embedding_store import EmbeddingStore
from internvl_megatron.parallel.exchange import Exchange, HeldTiles
from internvl_megatron.parallel.tile_plan import TilePlan
from internvl_megatron.train.host_memory import keep_on_host
from internvl_megatron.train.phases import PhaseClock
from internvl_megatron.train.vision_side import VisionSide


class WindowEncoder(ABC):
    """The images of one window."""

    @abstractmethod
    def encode(self) -> None:
        """Before the pipeline begins; all ranks."""

    @abstractmethod
    def row(self, row: int) -> tuple[Tensor, Tensor] | None:
        """A row's embeddings [m, D] and their places in the local slice, int64 [m]; None where it has none here.

        Asked for on the first stage alone, for every row, when the row's forward pass begins.
        """

    @abstractmethod
    def backprop(self) -> None:
        """When the pipeline is through; all ranks."""


@dataclass(frozen=True)
class TileEncoder:
    """The vision side in one step."""

    config: RunConfig
    vision: VisionSide
    device: Device
    step: int
    """Its number seeds drop path."""
    training: bool
    """Gradients, where something of the vision side is trained."""
    drop_path: bool
    clock: PhaseClock
    """Hears how long it takes."""

    @property
    def learns(self) -> bool:
        """Whether there is a backward pass."""
        parts = self.config.optimizer
        return self.training and (parts.vision.trainable or parts.projector.trainable)

    def __call__(self, pixels: Tensor, numbers: np.ndarray, keeps_graph: bool) -> Tensor:
        """Embeddings [t, K, D] of uint8 [t, 3, H, W] tiles with these numbers in the global batch, int64 [t]."""
        vision = self.config.model.vision
        rate = vision.drop_path_rate if self.drop_path else 0.0
        scale = residual_scale(rate, vision.num_layers, numbers, self.config.seed, self.step)
        offload = keep_on_host(self.device, self.config.parallel.vision_offload)
        with torch.set_grad_enabled(keeps_graph), offload, self.clock.work("vision", len(pixels)):
            return self.vision(pixels, None if scale is None else self.device.put(scale))


class ChunkPasses:
    """Forward and backward passes of the vision side over the chunks of a plan."""

    def __init__(self, encoder: TileEncoder, exchange: Exchange, plan: TilePlan, tiles: HeldTiles) -> None:
        self._encoder = encoder
        self._unit = exchange.unit
        self._plan = plan
        self._tiles = tiles
        self._outputs: dict[int, Tensor] = {}

    def forward(self, chunk: int) -> Tensor:
        """Embeddings [m, K, D] for all places of this rank's tiles in a chunk, without their graph.

        A rank without tiles runs a dummy.
        """
        keeps_graph = self._encoder.learns and self._encoder.config.parallel.vision_recompute != "full"
        output = self._encode(chunk, keeps_graph)
        if keeps_graph:
            self._outputs[chunk] = output
        places = self._places(chunk)
        if places is None:
            return output.detach()[: len(self._plan.tiles_of(self._unit, chunk))]
        return output.detach()[places]

    def backward(self, chunk: int, gradient: Callable[[], Tensor], is_last: bool) -> None:
        """Run a chunk backward, each once, and forward again before if nothing was kept.

        Args:
            chunk: has run forward.
            gradient: gives that of its embeddings, [m, K, D].
            is_last: no other backward pass of the vision side follows in this step.
        """
        output = self._outputs.pop(chunk, None)
        if output is None:
            output = self._encode(chunk, keeps_graph=True)
        values = gradient().to(output.dtype)
        places = self._places(chunk)
        if places is not None or len(values) == 0:
            # A tile with several places gets the sum of their gradients.
            found, values = values, torch.zeros_like(output)
            if places is not None:
                values.index_add_(0, places, found)
        with self._encoder.vision.backward_pass(is_last):
            output.backward(values)

    def _places(self, chunk: int) -> Tensor | None:
        device = self._encoder.device
        places = self._plan.encoded_places(self._unit, chunk)
        return None if places is None else device.put(places)

    def _encode(self, chunk: int, keeps_graph: bool) -> Tensor:
        mine = self._plan.tiles_of(self._unit, chunk)
        pixels, numbers = self._tiles.take(mine), self._plan.table.number[mine]
        if len(mine) == 0:
            # Collectives of the vision side would otherwise wait for this rank.
            pixels, numbers = pixels.new_zeros(1, *pixels.shape[1:]), np.zeros(1, dtype=np.int64)
        return self._encoder(pixels, numbers, keeps_graph)


def embedding_store(config: RunConfig, exchange: Exchange, plan: TilePlan) -> EmbeddingStore:
    """Room for the embeddings of the tokens this rank owns."""
    dtype = torch_dtype(config.dtype)
    return EmbeddingStore(exchange.owned(plan), config.model.language.hidden_size, dtype, exchange.device)


class PhasedEncoder(WindowEncoder):
    """All ranks encode all tiles of the window, then the pipeline runs, then all ranks run them backward."""

    def __init__(
        self, encoder: TileEncoder, exchange: Exchange, plan: TilePlan, tiles: HeldTiles, last_with_images: bool
    ) -> None:
        """Take the tiles of a window; `last_with_images`: no later window of the step has any."""
        self._encoder = encoder
        self._exchange = exchange
        self._plan = plan
        self._last_with_images = last_with_images
        self._passes = ChunkPasses(encoder, exchange, plan, tiles)
        self._store = embedding_store(encoder.config, exchange, plan.places)

    def encode(self) -> None:
        """Chunk by chunk, and every chunk to the owners of its tokens."""
        for chunk in range(self._plan.num_chunks):
            embeddings = self._passes.forward(chunk)
            self._store.put(*self._exchange.send_embeddings(self._plan.places, chunk, embeddings))

    def row(self, row: int) -> tuple[Tensor, Tensor] | None:
        """From the store."""
        return self._store.row(row, requires_grad=self._encoder.learns)

    def backprop(self) -> None:
        """Chunk by chunk."""
        if not self._encoder.learns:
            return
        for chunk in range(self._plan.num_chunks):
            gradient = partial(self._exchange.send_gradients, self._plan.places, chunk, self._store.gradients)
            is_last = self._last_with_images and chunk == self._plan.num_chunks - 1
            self._passes.backward(chunk, gradient, is_last)
