"""Mixed Preference Optimization as an objective: pairs of answers in packed rows, under every layout.

Both samples of a pair are in one row, so the last stage has all of a pair's loss in the pass of its row: sums of token
log-probabilities by sample, over the context-parallel ranks too. What other rows have to do with it is known before the
passes with gradients begin: how many pairs and chosen tokens the global batch has, the reference model's log-probabilities,
and the shift that rewards are compared with. For the last two there are forward passes of the same schedule: one with the
reference's weights in place of the policy's, unless a file says what it would find; one of the policy, with the same
drop-path draws, if the shift is to know this step's rewards (`mpo.shift`).

Shapes: n positions with a target, s samples of a row (chosen and rejected in turn), p pairs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from internvl_megatron.config.schema import RunConfig
from internvl_megatron.data.rows import Row
from internvl_megatron.device import Device
from internvl_megatron.model.output_layer import Targets
from internvl_megatron.model.preference_loss import (
    RunningMean,
    implicit_rewards,
    preference_losses,
    quality_losses,
)
from internvl_megatron.parallel.groups import Groups
from internvl_megatron.parallel.host import sum_floats
from internvl_megatron.train.agreement import StepAgreement
from internvl_megatron.train.batch import DeviceRow
from internvl_megatron.train.loss_parts import LossParts, PartSums
from internvl_megatron.train.objective import (
    NO_COUNT,
    ForwardPass,
    Objective,
    Outcome,
    PreferenceFigures,
    RowLoss,
    sums_by_sample,
)


class AnswerScores:
    """Log-probabilities of a row's answers, fp64 [s]: what is kept of rows where no loss is wanted."""

    def __init__(self, groups: Groups, device: Device) -> None:
        self._context = groups.language.cp
        self._device = device

    def __call__(self, agreement: StepAgreement, number: int, row: DeviceRow) -> tuple[Targets, RowLoss]:
        """See `RowTask`."""

        def keep(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logprobs = self.of_row(agreement.rows[number], row, losses)
            return logprobs.sum(), NO_COUNT, logprobs.detach()

        return Targets(row.targets, weights=None), keep

    def of_row(self, row: Row, on_device: DeviceRow, losses: Tensor) -> Tensor:
        """Sums over each sample of the whole row, fp64 [s]; gradients reach this rank's own positions.

        Args:
            row: the whole row.
            on_device: this rank's part of it.
            losses: of this part's targets, fp32 [n].
        """
        own = sums_by_sample(-losses.double() * on_device.weights, row, on_device, self._device)
        if self._context.size() == 1:
            return own
        total = own.detach().clone()
        dist.all_reduce(total, group=self._context)
        return own + (total - own.detach())


@dataclass(frozen=True)
class _PairWeights:
    """Of a row's pairs in the loss of the global batch, fp64 [p]; 0 where a pair has lost its loss."""

    mean: np.ndarray
    """For means over pairs."""
    generation: np.ndarray
    """Times the log-probability of the chosen answer: for the mean over tokens."""


class MixedPreference(Objective):
    """MPO's loss and what it needs to know. `history` belongs into checkpoints."""

    def __init__(self, config: RunConfig, groups: Groups, device: Device) -> None:
        self.history = RunningMean()
        """Of all pairs' mean rewards so far, on every rank the same."""
        self.reference: Callable[[], AbstractContextManager[None]] | None = None
        """In its block the model has the reference's weights; None = rows bring their log-probabilities."""
        self._mpo, self._normalize = config.mpo, config.loss.normalize
        self._groups, self._device = groups, device
        layout, rank = groups.layout, groups.rank
        self._leads = rank == layout.replica_ranks(layout.replica(rank))[0]
        self._counts = groups.is_last_stage and layout.tensor_index(rank) == layout.context_index(rank) == 0
        self._scores = AnswerScores(groups, device)
        self._num_pairs = self._num_chosen = 0
        self._references: Mapping[int, Tensor] = {}
        self._shift = 0.0
        self._trains = False

    def prepare(self, agreement: StepAgreement, forward: ForwardPass, trains: bool) -> None:
        """Count, ask the reference, and find the shift."""
        self._trains = trains
        pairs = [_answer_tokens(row) for row in agreement.rows] if self._leads else []
        counts = [sum(len(tokens[tokens > 0]) for tokens in pairs), sum(tokens.sum() for tokens in pairs)]
        self._num_pairs, self._num_chosen = map(int, sum_floats([float(count) for count in counts], self._host))
        self._references = self._ask_reference(agreement, forward)
        self._shift = self.history.value
        if trains and self._mpo.shift == "with_step":
            self._remember(self._sums(agreement, forward(self._scores, drop_path=True)))
            self._shift = self.history.value

    def row(self, agreement: StepAgreement, number: int, row: DeviceRow) -> tuple[Targets, RowLoss]:
        """The row's share of the loss; its answers' log-probabilities are kept."""
        whole, weights = agreement.rows[number], self._weights(agreement.rows[number])
        reference, put = self._reference(agreement, number), self._device.put

        def loss(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logprobs = self._scores.of_row(whole, row, losses)
            mpo, rewards = self._mpo, implicit_rewards(logprobs, reference, self._mpo.beta)
            by_pair = mpo.preference_factor * preference_losses(rewards)
            by_pair = by_pair + mpo.quality_factor * quality_losses(rewards, self._shift)
            generation = -(logprobs[0::2] * put(weights.generation)).sum()
            share = (by_pair * put(weights.mean)).sum() + mpo.generation_factor * generation
            return share.float(), NO_COUNT, logprobs.detach()

        return Targets(row.targets, weights=None), loss

    def sums(self, agreement: StepAgreement, kept: Mapping[int, Tensor]) -> list[float]:
        """Of both rewards, right orders and the three losses, each divided so that the sum is the mean; and the loss's parts."""
        return self._sums(agreement, kept)

    def outcome(self, sums: Sequence[float]) -> Outcome:
        """The loss and the figures."""
        chosen, rejected, right, preference, quality, generation = sums[:6]
        if self._trains and self._mpo.shift == "before_step":
            self._add((chosen + rejected) / 2)
        mpo = self._mpo
        loss = mpo.preference_factor * preference + mpo.quality_factor * quality + mpo.generation_factor * generation
        figures = PreferenceFigures(
            chosen_reward=chosen,
            rejected_reward=rejected,
            accuracy=right,
            preference_loss=preference,
            quality_loss=quality,
            generation_loss=generation,
            shift=self._shift,
            num_pairs=self._num_pairs,
        )
        return Outcome(loss, LossParts.of_sums(sums[6:]), figures)

    @property
    def _host(self) -> dist.ProcessGroup:
        return self._groups.host_world

    def _ask_reference(self, agreement: StepAgreement, forward: ForwardPass) -> Mapping[int, Tensor]:
        """Log-probabilities by row, fp64 [s], on the last stage."""
        if self.reference is not None:
            with self.reference():
                return forward(self._scores, drop_path=False)
        return {}

    def _reference(self, agreement: StepAgreement, number: int) -> Tensor:
        """Log-probabilities of the reference for a row's answers, fp64 [s]."""
        if self.reference is not None:
            return self._references[number] if self._groups.is_last_stage else torch.empty(0)
        row = agreement.rows[number]
        known, wanted = len(row.reference_logprobs), row.num_samples
        assert known == wanted, f"row {number} brings {known} log-probabilities of the reference for {wanted} answers"
        return self._device.put(row.reference_logprobs)

    def _weights(self, row: Row) -> _PairWeights:
        tokens = _answer_tokens(row)
        has_loss = tokens > 0
        mean = has_loss / max(1, self._num_pairs)
        if self._normalize == "step":
            return _PairWeights(mean, has_loss / max(1, self._num_chosen))
        return _PairWeights(mean, mean / np.maximum(1, tokens))

    def _sums(self, agreement: StepAgreement, kept: Mapping[int, Tensor]) -> list[float]:
        total, mpo = torch.zeros(6, dtype=torch.float64), self._mpo
        parts = PartSums(agreement.num_datasets)
        for number, logprobs in kept.items() if self._counts else ():
            weights = self._weights(agreement.rows[number])
            answers, reference = logprobs.cpu(), self._reference(agreement, number).cpu()
            rewards = implicit_rewards(answers, reference, self._mpo.beta)
            is_right = (rewards.chosen > rewards.rejected).double()
            losses = preference_losses(rewards), quality_losses(rewards, self._shift)
            terms = torch.stack([rewards.chosen, rewards.rejected, is_right, *losses])
            total[:5] += terms @ torch.from_numpy(weights.mean)
            by_pair = -answers[0::2] * torch.from_numpy(weights.generation)
            total[5] += by_pair.sum()
            by_pair = mpo.generation_factor * by_pair
            for factor, pair_losses in zip((mpo.preference_factor, mpo.quality_factor), losses, strict=True):
                by_pair = by_pair + factor * pair_losses * torch.from_numpy(weights.mean)
            # Of a pair the chosen sample is the one that counts.
            both = np.arange(agreement.rows[number].num_samples) % 2 == 0
            parts.add_samples(agreement.rows[number], np.where(both, np.repeat(weights.mean, 2), 0.0))
            parts.add_losses(agreement.rows[number], np.where(both, np.repeat(by_pair.numpy(), 2), 0.0))
        return [*total.tolist(), *parts.values]

    def _remember(self, sums: list[float]) -> None:
        """Let the history know this step's rewards, from what this rank adds to their means."""
        chosen, rejected = sum_floats(sums[:2], self._host)
        self._add((chosen + rejected) / 2)

    def _add(self, mean: float) -> None:
        """One step's mean; a reward that is not finite would stay in the history for ever."""
        if math.isfinite(mean):
            self.history = self.history.including(mean * self._num_pairs, self._num_pairs)


def _answer_tokens(row: Row) -> np.ndarray:
    """Tokens of each pair's chosen answer, int64 [p]; 0 for pairs whose images could not be decoded."""
    bounds = row.sample_bounds
    return np.array(
        [np.count_nonzero(row.weights[first:end]) for first, end in zip(bounds[:-1:2], bounds[1::2], strict=True)],
        dtype=np.int64,
    )
