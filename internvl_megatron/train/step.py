"""The decoupled step: one optimizer step of InternVL3 with vision encoder and language model sharded independently.

`Step.run` is the picture. Per window of micro-batches:

    plan      every rank computes the same assignment of tiles to ranks
    encode    tiles travel to their rank, run through ViT + projector chunk by chunk, embeddings travel to their owners
    decode    Megatron Core's schedule runs the language model over the micro-batches; embeddings are detached leaves
    backprop  their gradients travel back; ViT + projector run backward chunk by chunk

then gradients are reduced in each module's own groups, clipped by one norm, and both optimizers step or none does.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from internvl_megatron.config.schema import RunConfig
from internvl_megatron.data.step_rows import StepRows
from internvl_megatron.device import Device
from internvl_megatron.model.build import Model
from internvl_megatron.model.drop_path import residual_scale
from internvl_megatron.model.language import ImageTokens
from internvl_megatron.model.loss import weighted_loss
from internvl_megatron.parallel.embedding_store import EmbeddingStore
from internvl_megatron.parallel.exchange import Exchange
from internvl_megatron.parallel.groups import Groups
from internvl_megatron.parallel.host import sum_floats
from internvl_megatron.parallel.tile_plan import TilePlan, plan_tiles
from internvl_megatron.train.agreement import StepAgreement, agree, decoded_tiles
from internvl_megatron.train.batch import DeviceRow, device_row
from internvl_megatron.train.optimizer import JointOptimizer, UpdateResult, distributed
from internvl_megatron.train.phases import PhaseClock, Span


@dataclass(frozen=True)
class StepResult:
    """One step, the same on every rank."""

    loss: float
    """Weighted mean over the global batch; 0 if it has no supervised token."""
    grad_norm: float
    learning_rate: float
    updated: bool
    """False if the gradient norm was not finite or there was nothing to learn from."""
    agreement: StepAgreement
    most_tiles_per_rank: int
    """Tiles the busiest rank encoded."""
    sent_bytes: int
    """Tiles, embeddings and gradients that went from one rank to another, over all ranks."""
    spans: list[Span]
    """When each phase ran on this rank; not the same on every rank."""


@dataclass
class EncodedChunk:
    """One pass of the vision side, kept for its backward pass."""

    tiles: Tensor
    """uint8 [t, 3, H, W]."""
    residual_scale: Tensor | None
    num_real_tiles: int
    """Tiles that are not the dummy of a rank with nothing to encode."""
    output: Tensor
    """[t, K, D]; without graph if it is computed again in backward."""


class Step:
    """Everything one optimizer step needs, built once."""

    def __init__(self, config: RunConfig, model: Model, groups: Groups, device: Device) -> None:
        self.config = config
        self.groups = groups
        self.device = device
        self.model = model
        self.vision = distributed(model.vision, groups.vision, config)
        self.language = [distributed(chunk, groups.language, config) for chunk in model.language]
        self.optimizer = JointOptimizer(config, self.vision, self.language, groups.vision, groups.language)
        self.exchange = Exchange(
            groups,
            device,
            tokens_per_tile=config.model.vision.tokens_per_tile,
            tokens_per_row=config.data.tokens_per_row,
            sequence_parallel=config.parallel.sequence_parallel,
        )
        parts = config.optimizer
        self._trains_vision = parts.vision.trainable or parts.projector.trainable
        self._part = slice(*groups.layout.row_slice(groups.rank, config.data.tokens_per_row))
        self.clock = PhaseClock(device)
        self._p2p = P2PCommunicator(groups.language.pp, model.language[0].config)

    def run(
        self, batch: StepRows, step: int, num_skipped_samples: int = 0, stop_requested: bool = False
    ) -> StepResult:
        """Train on one global batch; collective over all ranks.

        Args:
            batch: this replica's rows and this rank's tiles.
            step: number of the step, from 0; sets the learning rate and the drop-path draws.
            num_skipped_samples: samples this replica's leader has left out so far; 0 on the other ranks.
            stop_requested: this rank was asked to stop; shared with all ranks through the result.
        """
        phase, losses = self.clock.phase, []
        self.clock.clear()
        self.exchange.sent_bytes = 0
        with phase("plan"):
            agreement = agree(batch, self.groups, self.config.data.tiles_per_row, num_skipped_samples, stop_requested)
        for module in (self.vision, *self.language):
            module.train()
            module.zero_grad_buffer()
        self.optimizer.zero_grad()
        tiles_per_rank = np.zeros(self.groups.layout.world_size, dtype=np.int64)
        for rows in self._windows(len(agreement.rows)):
            with phase("plan"):
                plan = self._plan(agreement, rows)
            tiles_per_rank += np.bincount(plan.encoder, minlength=len(tiles_per_rank))
            with phase("encode"):
                store, chunks = self._encode(plan, batch, rows, step, training=True)
            with phase("decode"):
                losses += self._decode(agreement, rows, store, training=True)
            with phase("backprop"):
                self._backprop(plan, store, chunks)
        with phase("update"):
            self._reduce(agreement)
            rate = self.optimizer.set_learning_rate(step)
            has_targets = agreement.row_weights.sum() > 0
            update = self.optimizer.clip_and_step() if has_targets else UpdateResult(0.0, updated=False)
        loss, sent_bytes = self._totals(losses)
        return StepResult(
            loss=loss,
            grad_norm=update.grad_norm,
            learning_rate=rate,
            updated=update.updated,
            agreement=agreement,
            most_tiles_per_rank=int(tiles_per_rank.max()),
            sent_bytes=sent_bytes,
            spans=self.clock.spans(),
        )

    @torch.no_grad()
    def evaluate(self, batch: StepRows) -> float:
        """Loss of held-out rows, without drop path; collective over all ranks."""
        agreement = agree(batch, self.groups, self.config.data.tiles_per_row)
        for module in (self.vision, *self.language):
            module.eval()
        losses = []
        for rows in self._windows(len(agreement.rows)):
            store, _ = self._encode(self._plan(agreement, rows), batch, rows, step=0, training=False)
            losses += self._decode(agreement, rows, store, training=False)
        return self._totals(losses)[0]

    def _windows(self, num_rows: int) -> Iterator[range]:
        size = self.config.parallel.vision_window_rows or num_rows
        return (range(first, min(first + size, num_rows)) for first in range(0, num_rows, size))

    def _plan(self, agreement: StepAgreement, rows: range) -> TilePlan:
        chosen = (agreement.table.row >= rows.start) & (agreement.table.row < rows.stop)
        return plan_tiles(
            agreement.table.select(chosen), self.groups.layout.world_size, self.config.parallel.vision_chunk_tiles
        )

    def _encode(
        self, plan: TilePlan, batch: StepRows, rows: range, step: int, training: bool
    ) -> tuple[EmbeddingStore | None, list[EncodedChunk]]:
        """Embeddings of the window's images at their owners; a window without images costs nothing."""
        if plan.num_tiles == 0:
            return None, []
        decoded = decoded_tiles(batch, self.config.model.vision.tile_pixels, rows)
        tiles = self.exchange.send_tiles(plan, self.device.put(decoded))
        numbers = plan.table.number[plan.tiles_of(self.groups.rank)]
        chunks = [self._encode_chunk(tiles, numbers, chunk, step, training) for chunk in range(plan.num_chunks)]
        embeddings = torch.cat([chunk.output.detach()[: chunk.num_real_tiles] for chunk in chunks])
        received = self.exchange.send_embeddings(plan, embeddings)
        return EmbeddingStore(received, self.exchange.owned(plan), self.device), chunks

    def _encode_chunk(self, tiles: Tensor, numbers: np.ndarray, chunk: int, step: int, training: bool) -> EncodedChunk:
        size = self.config.parallel.vision_chunk_tiles
        mine = tiles[chunk * size : (chunk + 1) * size]
        numbers = numbers[chunk * size : (chunk + 1) * size]
        num_real = len(mine)
        if num_real == 0:
            # Every rank runs every chunk: collectives of sharded parameters would otherwise wait for this rank.
            mine, numbers = tiles.new_zeros(1, *tiles.shape[1:]), np.zeros(1, dtype=np.int64)
        vision = self.config.model.vision
        rate = vision.drop_path_rate if training else 0.0
        scale = residual_scale(rate, vision.num_layers, numbers, self.config.seed, step)
        on_device = None if scale is None else self.device.put(scale)
        keep_graph = training and self._trains_vision and self.config.parallel.vision_recompute != "full"
        with torch.set_grad_enabled(keep_graph):
            output = self.vision(mine, on_device)
        return EncodedChunk(mine, on_device, num_real, output)

    def _decode(
        self, agreement: StepAgreement, rows: range, store: EmbeddingStore | None, training: bool
    ) -> list[Tensor]:
        """Run the language model over the window; losses of its rows on the last stage, nothing elsewhere."""
        layout = self.groups.layout
        interleaved = layout.virtual_size > 1
        chunks = list[torch.nn.Module](self.language)
        schedule = get_forward_backward_func(layout.pipeline_size, layout.virtual_size if interleaved else None)

        def forward_step(
            numbers: Iterator[int], language: DistributedDataParallel
        ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
            number = next(numbers)
            images = None
            if store is not None and language.module.pre_process:
                images = store.row(number, requires_grad=training and self._trains_vision)
            row = device_row(agreement.rows[number], self.config.model.language, self.device, self._part)
            output = language(row.token_ids, row.packed, self._image_tokens(images), row.target_positions)
            return output, lambda logits: self._row_loss(logits, row, self._loss_scale(agreement, number))

        return schedule(
            forward_step_func=forward_step,
            data_iterator=[iter(rows) for _ in self.language] if interleaved else iter(rows),
            model=chunks if interleaved else chunks[0],
            num_microbatches=len(rows),
            seq_length=self.config.data.tokens_per_row,
            micro_batch_size=1,
            forward_only=not training,
            p2p_communicator=self._p2p,
            pg_collection=self.groups.language,
        )

    @staticmethod
    def _image_tokens(images: tuple[Tensor, Tensor] | None) -> ImageTokens | None:
        return None if images is None else ImageTokens(*images)

    def _row_loss(self, logits: Tensor, row: DeviceRow, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """The row's share of the loss; the token count Megatron Core asks for is not used by anything."""
        loss = weighted_loss(logits, row.targets, row.weights, self.groups.language.tp) * scale
        return loss, torch.zeros((), dtype=torch.int), loss.detach()

    def _loss_scale(self, agreement: StepAgreement, row: int) -> float:
        """1 / (weight the row's loss is divided by), or 0 where there is nothing to learn from."""
        if self.config.loss.normalize == "step":
            weight = float(agreement.row_weights.sum())
        else:
            weight = float(agreement.row_weights[row]) * len(agreement.rows)
        return 1.0 / weight if weight > 0 else 0.0

    def _backprop(self, plan: TilePlan, store: EmbeddingStore | None, chunks: list[EncodedChunk]) -> None:
        """Bring the gradients of the embeddings back and run the vision side backward."""
        if store is None or not self._trains_vision:
            return
        gradients = self.exchange.send_gradients(plan, store.gradients())
        last = len(chunks) - 1
        first_tile = 0
        for index, chunk in enumerate(chunks):
            gradient = gradients[first_tile : first_tile + chunk.num_real_tiles]
            first_tile += chunk.num_real_tiles
            output = chunk.output
            if self.config.parallel.vision_recompute == "full":
                output = self.vision(chunk.tiles, chunk.residual_scale)
            if chunk.num_real_tiles == 0:
                gradient = torch.zeros_like(output)
            # Reductions may start in the one backward pass that every rank has: the last.
            with contextlib.nullcontext() if index == last else self.vision.no_sync():
                output.backward(gradient.to(output.dtype))
            chunks[index].output = output.detach()

    def _reduce(self, agreement: StepAgreement) -> None:
        """Sum gradients over the copies of each module; both are already divided by the global weight."""
        if self.config.optimizer.language.trainable:
            finalize_model_grads(list[torch.nn.Module](self.language), None, pg_collection=self.groups.language)
        if len(agreement.table) and self._trains_vision:
            finalize_model_grads([self.vision], None, pg_collection=self.groups.vision)

    def _totals(self, losses: list[Tensor]) -> tuple[float, int]:
        """The loss, as the sum of all rows' shares, and the bytes all ranks have sent; on every rank."""
        layout, rank = self.groups.layout, self.groups.rank
        counts = self.groups.is_last_stage and layout.tensor_index(rank) == 0
        mine = float(torch.stack(losses).double().sum()) if counts and losses else 0.0
        loss, sent_bytes = sum_floats([mine, self.exchange.sent_bytes], self.groups.host_world)
        return loss, int(sent_bytes)
