"""The decoupled step: one optimizer step of InternVL3 with vision encoder and language model sharded independently.

`Step.run` is the picture. Per window of micro-batches:

    plan      every rank computes the same assignment of tiles to ranks
    encode    tiles travel to their rank; chunk by chunk they run through ViT + projector and embeddings to their owners
    decode    Megatron Core's schedule runs the language model over the micro-batches; embeddings are detached leaves
    backprop  chunk by chunk their gradients travel back and ViT + projector run backward

With several pipeline stages most of encode and backprop goes on in the pauses of decode (`bubble_encoder`). Then gradients are
reduced in each module's own groups, clipped by one norm, and both optimizers step or none does.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from internvl_megatron.config.schema import RunConfig
from internvl_megatron.data.step_rows import StepRows
from internvl_megatron.device import Device
from internvl_megatron.model.bit_sum import bit_sum
from internvl_megatron.model.build import Model
from internvl_megatron.model.language import ImageTokens
from internvl_megatron.model.vision_shards import local_shard
from internvl_megatron.parallel.bubble_plan import BubblePlan
from internvl_megatron.parallel.exchange import Exchange
from internvl_megatron.parallel.groups import Groups
from internvl_megatron.parallel.host import gather_integers, sum_floats
from internvl_megatron.train.agreement import StepAgreement
from internvl_megatron.train.bad_steps import BadStep, BadSteps
from internvl_megatron.train.batch import device_row
from internvl_megatron.train.bubble_encoder import BubbleEncoder
from internvl_megatron.train.frozen_copy import FrozenCopy
from internvl_megatron.train.host_memory import keep_on_host
from internvl_megatron.train.loss_parts import LossParts
from internvl_megatron.train.objective import NextToken, Objective, Outcome, PreferenceFigures, RowLoss, RowTask
from internvl_megatron.train.optimizer import (
    JointOptimizer,
    UpdateResult,
    distributed,
    gather_in_next_forward,
    gather_parameters,
    megatron_optimizer,
)
from internvl_megatron.train.phases import PhaseClock, Span, Work
from internvl_megatron.train.pipeline_messages import PipelineMessages
from internvl_megatron.train.preference import AnswerScores, MixedPreference
from internvl_megatron.train.row_encoder import RowEncoder
from internvl_megatron.train.vision_side import vision_side
from internvl_megatron.train.window_encoder import PhasedEncoder, TileEncoder, WindowEncoder
from internvl_megatron.train.windows import Window, WindowMaker


@dataclass(frozen=True)
class StepResult:
    """One step, the same on every rank."""

    loss: float
    """Mean over the global batch, as the objective weights it; 0 if it has no supervised token."""
    grad_norm: float
    part_grad_norms: dict[str, float]
    """Of the trained ones of vision encoder (`vision`), `projector` and language model (`language`), before clipping."""
    learning_rate: float
    updated: bool
    """False if the step was bad (`bad_steps.py`), or there was nothing to learn from."""
    bad: BadStep | None
    """Why the parameters were left alone; None = the step was good."""
    differing_ranks: list[int]
    """Ranks that got other gradients when they computed them again; empty where nothing was computed again."""
    agreement: StepAgreement
    num_skipped_samples: int
    """Samples all leaders have left out since the run began."""
    stop_requested: bool
    """Some rank was asked to stop after this step."""
    most_tiles_per_rank: int
    """Tiles the busiest rank encoded."""
    sent_bytes: int
    """Tiles, embeddings and gradients that went from one rank to another, over all ranks."""
    parts: LossParts
    """What data sets and kinds of samples have to do with the loss."""
    preference: PreferenceFigures | None
    """Of pairs of answers, if that is what is trained on."""
    spans: list[Span]
    """When each phase ran on this rank; not the same on every rank, as is the next."""
    work: dict[str, Work]
    """What this rank did by itself: the vision encoder's forward passes over tiles, the language model's over rows."""


class Step:
    """Everything one optimizer step needs, built once."""

    def __init__(self, config: RunConfig, model: Model, groups: Groups, device: Device) -> None:
        self.config = config
        self.groups = groups
        self.device = device
        self.model = model
        self.vision = vision_side(config, model, groups)
        self.language = [distributed(chunk, groups.language, config) for chunk in model.language]
        language_parts = {"*": config.optimizer.language}
        language_optimizer = megatron_optimizer(config, self.language, groups.language, language_parts)
        projector = [*model.vision.projector.parameters()]
        self.optimizer = JointOptimizer(
            config, self.vision.optimizer, projector, language_optimizer, device.torch_device
        )
        self.exchange = Exchange(
            groups,
            device,
            tile_pixels=config.model.vision.tile_pixels,
            tokens_per_tile=config.model.vision.tokens_per_tile,
            sequence_parallel=config.parallel.sequence_parallel,
        )
        self.windows = WindowMaker(config, groups, device, self.exchange)
        parts = config.optimizer
        self._trains_vision = parts.vision.trainable or parts.projector.trainable
        self.clock = PhaseClock(device)
        self._messages = PipelineMessages(groups.language.pp, model.language[0].config)
        is_mpo = config.loss.kind == "mpo"
        self.bad_steps = BadSteps(config.bad_steps)
        self.objective: Objective = (MixedPreference if is_mpo else NextToken)(config, groups, device)

    def run(
        self,
        batch: StepRows,
        step: int,
        following: StepRows | None = None,
        num_skipped_samples: int = 0,
        stop_requested: bool = False,
    ) -> StepResult:
        """Train on one global batch; collective over all ranks.

        Args:
            batch: this replica's rows and this rank's tiles.
            step: number of the step, from 0; sets the learning rate and the drop-path draws.
            following: the batch of the next step, if there is one: it is prepared while this one is trained on.
            num_skipped_samples: samples this replica's leader has left out so far; 0 on the other ranks.
            stop_requested: this rank was asked to stop; shared with all ranks through the result.
        """
        every = self.config.bad_steps.recheck_every_steps
        checks = every is not None and (step + 1) % every == 0
        first_sum = self._rehearse(batch, step) if checks else None
        phase, kept = self.clock.phase, dict[int, Tensor]()
        self.clock.clear()
        agreement, tiles_per_unit = self._gradients(batch, step, following, kept)
        totals = [self.exchange.sent_bytes, num_skipped_samples, float(stop_requested)]
        totals += self.objective.sums(agreement, kept)
        sent_bytes, num_skipped, num_stopping, *sums = sum_floats(totals, self.groups.host_world)
        outcome, bad = self.objective.outcome(sums), list[BadStep]()

        def is_good(grad_norm: float) -> bool:
            found = self.bad_steps.judge(outcome.loss, grad_norm)
            bad.extend([] if found is None else [found])
            return found is None

        with phase("update"):
            self._reduce(agreement)
            own_sum = self._gradient_sum() if checks else None
            if self.model.amax_histories is not None:
                self.model.amax_histories.end_step(self.groups.language.tp_dp_cp)
            rate = self.optimizer.set_learning_rate(step)
            has_targets = agreement.row_weights.sum() > 0
            update = self.optimizer.clip_and_step(is_good) if has_targets else UpdateResult(0.0, {}, updated=False)
            self.vision.gather_in_next_forward()
            for chunk in self.language:
                gather_in_next_forward(chunk)
        differing = gather_integers(np.array([first_sum != own_sum]), self.groups.host_world) if checks else []
        self.windows.wait()
        return StepResult(
            loss=outcome.loss,
            grad_norm=update.grad_norm,
            part_grad_norms=update.part_grad_norms,
            learning_rate=rate,
            updated=update.updated,
            bad=bad[0] if bad else None,
            differing_ranks=[rank for rank, differs in enumerate(differing) if differs[0]],
            agreement=agreement,
            num_skipped_samples=int(num_skipped),
            stop_requested=num_stopping > 0,
            most_tiles_per_rank=int(tiles_per_unit.max()),
            sent_bytes=int(sent_bytes),
            parts=outcome.parts,
            preference=outcome.preference,
            spans=self.clock.spans(),
            work=self.clock.work_done(),
        )

    def _gradients(
        self, batch: StepRows, step: int, following: StepRows | None, kept: dict[int, Tensor]
    ) -> tuple[StepAgreement, np.ndarray]:
        """Forward and backward of all windows.

        Args:
            batch: see `run`.
            step: see `run`.
            following: see `run`.
            kept: gets what the objective keeps of each row.

        Returns:
            What the ranks have agreed on, and the tiles each unit has encoded.
        """
        phase = self.clock.phase
        self.exchange.sent_bytes = 0
        self.vision.clear()
        for chunk in self.language:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        with phase("plan"):
            window = self.windows.first(batch)
        agreement = window.agreement
        self._prepare(batch, agreement, step, trains=True)
        for module in (self.vision, *self.language):
            module.train()
        tiles_per_unit = np.zeros(len(self.groups.vision_layout.units), dtype=np.int64)
        while True:
            tiles_per_unit += np.bincount(window.plan.encoder, minlength=len(tiles_per_unit))
            with phase("encode"):
                images = self._images(window, step, training=True, drop_path=True)
            self.windows.prepare_after(window, following)
            with phase("decode"):
                kept |= self._decode(window, images, self.objective.row, training=True)
            with phase("backprop"):
                if images is not None:
                    images.backprop()
            del images  # or they would lie beside the next window's
            if window.is_last:
                break
            with phase("plan"):
                window = self.windows.after(window)
        return agreement, tiles_per_unit

    def _rehearse(self, batch: StepRows, step: int) -> int:
        """Compute a step's gradients and leave everything as it was; returns their sum on this rank."""
        history = self.objective.history if isinstance(self.objective, MixedPreference) else None
        agreement, _ = self._gradients(batch, step, None, {})
        self._reduce(agreement)
        self.windows.wait()
        if isinstance(self.objective, MixedPreference) and history is not None:
            self.objective.history = history
        return self._gradient_sum()

    def _gradient_sum(self) -> int:
        """Sum of the bits of this rank's reduced gradients, which tells any two apart that differ in one of them."""
        gradients = [getattr(parameter, "main_grad", None) for _, parameter in self.model.named_parameters()]
        if self.model.vision_mesh is not None:
            gradients += [local_shard(p.grad) for _, p in self.model.named_parameters() if p.grad is not None]
        return sum(bit_sum(gradient, gradient.dtype) for gradient in gradients if gradient is not None)

    def evaluate(self, batch: StepRows) -> float:
        """Loss of held-out rows, without drop path; collective over all ranks."""
        return self.judge(batch).loss

    def judge(self, batch: StepRows) -> Outcome:
        """All figures of held-out rows, without drop path; collective over all ranks."""
        window = self.windows.first_of_evaluation(batch)
        self._prepare(batch, window.agreement, step=0, trains=False)
        kept = self._forward(window, self.objective.row, step=0, drop_path=False)
        sums = self.objective.sums(window.agreement, kept)
        return self.objective.outcome(sum_floats(sums, self.groups.host_world))

    def _prepare(self, batch: StepRows, agreement: StepAgreement, step: int, trains: bool) -> None:
        """Let the objective find out what it must know before the passes."""

        def forward(task: RowTask, *, drop_path: bool) -> dict[int, Tensor]:
            with self.clock.phase("prepare"):
                window = self.windows.first_of_evaluation(batch, agreement)
                return self._forward(window, task, step, drop_path)

        self.objective.prepare(agreement, forward, trains)

    @torch.no_grad()
    def _forward(self, window: Window, task: RowTask, step: int, drop_path: bool) -> dict[int, Tensor]:
        """A whole batch from its first window on, forward alone; what is kept of its rows."""
        for module in (self.vision, *self.language):
            module.eval()
        kept = dict[int, Tensor]()
        while True:
            images = self._images(window, step, training=False, drop_path=drop_path)
            kept |= self._decode(window, images, task, training=False)
            del images
            if window.is_last:
                return kept
            window = self.windows.after(window)

    def _images(self, window: Window, step: int, training: bool, drop_path: bool) -> WindowEncoder | None:
        """The window's images, encoded as far as the pipeline waits for them; None without images, which costs nothing."""
        if window.tiles is None:
            return None
        exchange, plan = self.exchange, window.plan
        tiles = exchange.receive_tiles(window.take_tiles())
        encoder = TileEncoder(self.config, self.vision, self.device, step, training, drop_path, self.clock)
        if self.groups.vision_layout.first_stage_only:
            images: WindowEncoder = RowEncoder(encoder, exchange, plan, tiles)
        elif isinstance(plan, BubblePlan):
            images = BubbleEncoder(encoder, exchange, plan, tiles, self.clock)
        else:
            images = PhasedEncoder(encoder, exchange, plan, tiles, window.is_last_with_images)
        images.encode()
        return images

    def _decode(
        self, window: Window, encoder: WindowEncoder | None, task: RowTask, training: bool
    ) -> dict[int, Tensor]:
        """Run the language model over the window; what is kept of its rows on the last stage, nothing elsewhere."""
        agreement, layout = window.agreement, self.groups.layout
        rows = window.order(layout.replica(self.groups.rank))
        self._messages.fill(encoder.while_waiting if isinstance(encoder, BubbleEncoder) else None)
        interleaved = layout.virtual_size > 1
        chunks = list[torch.nn.Module](self.language)
        schedule = get_forward_backward_func(layout.pipeline_size, layout.virtual_size if interleaved else None)

        def forward_step(numbers: Iterator[int], language: DistributedDataParallel) -> tuple[Tensor, RowLoss]:
            number = next(numbers)
            self.clock.tick()
            images = None
            if encoder is not None and language.module.pre_process:
                images = encoder.row(number)
            language_model, rank = self.config.model.language, self.groups.rank
            row = device_row(agreement.rows[number], language_model, self.device, layout, rank)
            targets, row_loss = task(agreement, number, row)
            offload = keep_on_host(self.device, self.config.parallel.language_offload)
            with offload, self.clock.work("language", 1):
                output = language(row.token_ids, row.packed, self._image_tokens(images), row.target_positions, targets)
            return output, row_loss

        with self._reducing_at_the_end(window.is_last), self._rounding_weights_once(window.is_first):
            kept: list[Tensor] = schedule(
                forward_step_func=forward_step,
                data_iterator=[iter(rows) for _ in self.language] if interleaved else iter(rows),
                model=chunks if interleaved else chunks[0],
                num_microbatches=len(rows),
                seq_length=self.config.data.tokens_per_row,
                micro_batch_size=1,
                forward_only=not training,
                p2p_communicator=self._messages,
                pg_collection=self.groups.language,
            )
        for chunk in self.language:
            model: Any = chunk.module
            model.set_input_tensor(None)  # or its last input and the gradient of that would lie beside the encoder's
        return dict(zip(rows, kept, strict=True)) if kept else {}

    @contextlib.contextmanager
    def _reducing_at_the_end(self, is_last_window: bool) -> Iterator[None]:
        """Let reductions of the language model start in the last backward pass of the step, and in no other."""
        settings: Any = self.language[0].config
        no_sync = [chunk.no_sync for chunk in self.language]
        with contextlib.ExitStack() as stack:
            if is_last_window:
                # Megatron Core's schedule enters these before all passes but the last.
                settings.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
                stack.callback(setattr, settings, "no_sync_func", None)
            else:
                for context in no_sync:
                    stack.enter_context(context())
            yield

    @contextlib.contextmanager
    def _rounding_weights_once(self, is_first_window: bool) -> Iterator[None]:
        """Let Transformer Engine round weights to FP8 in the first window and keep them; gradients that it computes then replace
        what is in the buffer, which those of later windows must not."""
        if is_first_window:
            yield
            return
        for chunk in self.language:
            # Megatron Core's schedule calls it before its first row, that is, in every window.
            setattr(chunk, "set_is_first_microbatch", lambda: None)
        try:
            yield
        finally:
            for chunk in self.language:
                delattr(chunk, "set_is_first_microbatch")

    @staticmethod
    def _image_tokens(images: tuple[Tensor, Tensor] | None) -> ImageTokens | None:
        return None if images is None else ImageTokens(*images)

    def _reduce(self, agreement: StepAgreement) -> None:
        """Sum gradients over the copies of each module; both are already divided by the global weight."""
        if self.config.optimizer.language.trainable:
            finalize_model_grads(list[torch.nn.Module](self.language), None, pg_collection=self.groups.language)
        if len(agreement.table) and self._trains_vision:
            self.vision.reduce()

    def keep_as_reference(self) -> None:
        """Let the model as it is now be the reference that pairs are judged against; collective."""
        assert isinstance(self.objective, MixedPreference), "only preference training has a reference"
        self.objective.reference = FrozenCopy(self.model, self.device, self.gather_parameters).in_place

    def answer_logprobs(self, batch: StepRows) -> dict[int, Tensor]:
        """Log-probabilities of all answers of a batch of pairs, fp64 [s] by row, on ranks of the last stage; collective."""
        window = self.windows.first_of_evaluation(batch)
        return self._forward(window, AnswerScores(self.groups, self.device), step=0, drop_path=False)

    def gather_parameters(self) -> None:
        """Have all parameters up to date on this rank, as whoever reads them outside of a forward pass needs; collective."""
        self.vision.gather_parameters()
        for chunk in self.language:
            gather_parameters(chunk)
