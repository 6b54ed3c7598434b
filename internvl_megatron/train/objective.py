"""What is trained for: how the output of a row becomes its share of a step's loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from internvl_megatron.config.schema import RunConfig
from internvl_megatron.data.rows import Row
from internvl_megatron.device import Device
from internvl_megatron.model.output_layer import Targets
from internvl_megatron.parallel.groups import Groups
from internvl_megatron.train.agreement import StepAgreement
from internvl_megatron.train.batch import DeviceRow
from internvl_megatron.train.loss_parts import LossParts, PartSums

RowLoss = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""From what the output layer makes of a row's targets: the row's share of the loss, a token count that is not used by anything,
and what is kept of the row. Megatron Core's schedule calls it on the last stage."""

RowTask = Callable[[StepAgreement, int, DeviceRow], tuple[Targets, RowLoss]]
"""What the output layer is asked for of a row, by its number in the step, and what becomes of it."""

NO_COUNT = torch.zeros((), dtype=torch.int)


class ForwardPass(Protocol):
    """Runs the model over a batch without gradients; collective over all ranks."""

    def __call__(self, task: RowTask, *, drop_path: bool) -> dict[int, Tensor]:
        """What is kept of this replica's rows, by their numbers, on ranks of the last stage; nothing elsewhere."""
        ...


@dataclass(frozen=True)
class PreferenceFigures:
    """What a batch of pairs says of the policy; means over the pairs."""

    chosen_reward: float
    rejected_reward: float
    accuracy: float
    """Share of the pairs, 0 to 1, whose chosen answer has the higher reward."""
    preference_loss: float
    quality_loss: float
    generation_loss: float
    shift: float
    """What rewards were compared with in the quality loss."""
    num_pairs: int

    @property
    def margin(self) -> float:
        """How much higher the chosen answers' rewards are."""
        return self.chosen_reward - self.rejected_reward


@dataclass(frozen=True)
class Outcome:
    """Of a batch, the same on every rank."""

    loss: float
    parts: LossParts
    """What data sets and kinds of samples have to do with it."""
    preference: PreferenceFigures | None = None


class Objective(ABC):
    """Of a run. Sees every step in turn, between two updates also evaluations."""

    @abstractmethod
    def prepare(self, agreement: StepAgreement, forward: ForwardPass, trains: bool) -> None:
        """Whatever must be known of a batch before its passes; collective over all ranks.

        Args:
            agreement: of the batch.
            forward: over the batch.
            trains: the passes have gradients, and an update will follow.
        """

    @abstractmethod
    def row(self, agreement: StepAgreement, number: int, row: DeviceRow) -> tuple[Targets, RowLoss]:
        """See `RowTask`."""

    @abstractmethod
    def sums(self, agreement: StepAgreement, kept: Mapping[int, Tensor]) -> list[float]:
        """What this rank adds to the figures of the batch, from what was kept of its rows."""

    @abstractmethod
    def outcome(self, sums: Sequence[float]) -> Outcome:
        """The figures, from their sums over all ranks."""


class NextToken(Objective):
    """Weighted next-token cross entropy; weights come with the data."""

    def __init__(self, config: RunConfig, groups: Groups, device: Device) -> None:
        layout, rank = groups.layout, groups.rank
        self._normalize = config.loss.normalize
        self._device = device
        self._counts = groups.is_last_stage and layout.tensor_index(rank) == 0
        self._leads = self._counts and layout.context_index(rank) == 0

    def prepare(self, agreement: StepAgreement, forward: ForwardPass, trains: bool) -> None:
        """Nothing."""

    def row(self, agreement: StepAgreement, number: int, row: DeviceRow) -> tuple[Targets, RowLoss]:
        """The row's sum, divided by the global weight; it is kept with what each sample adds to it, fp64 [1 + s]."""
        whole = agreement.rows[number]

        def loss(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            # Without their graph, which would keep the row's activations for as long as they are kept.
            values = output.detach().double()
            by_sample = sums_by_sample(values[1:], whole, row, self._device)
            # A copy: Megatron Core frees what it gets, which must not be a part of another tensor.
            return output[0].clone(), NO_COUNT, torch.cat([values[:1], by_sample])

        return Targets(row.targets, row.weights * self._scale(agreement, number)), loss

    def sums(self, agreement: StepAgreement, kept: Mapping[int, Tensor]) -> list[float]:
        """The loss, which is the sum of all rows' shares, and its parts."""
        parts = PartSums(agreement.num_datasets)
        for number, row in enumerate(agreement.rows) if self._leads else ():
            parts.add_samples(row, row.sample_weights * self._scale(agreement, number))
        if not (self._counts and kept):
            return [0.0, *parts.values]
        values = torch.cat([*kept.values()]).tolist()  # once for all rows: the host waits here
        ends = np.cumsum([len(row) for row in kept.values()])
        by_row = np.split(np.array(values), ends[:-1])
        for number, row in zip(kept, by_row, strict=True):
            parts.add_losses(agreement.rows[number], row[1:])
        return [float(torch.tensor([row[0] for row in by_row], dtype=torch.float64).sum()), *parts.values]

    def outcome(self, sums: Sequence[float]) -> Outcome:
        """The loss and its parts."""
        return Outcome(sums[0], LossParts.of_sums(sums[1:]))

    def _scale(self, agreement: StepAgreement, row: int) -> float:
        """1 / (weight the row's loss is divided by), or 0 where there is nothing to learn from."""
        if self._normalize == "step":
            weight = float(agreement.row_weights.sum())
        else:
            weight = float(agreement.row_weights[row]) * len(agreement.rows)
        return 1.0 / weight if weight > 0 else 0.0


def sums_by_sample(values: Tensor, row: Row, on_device: DeviceRow, device: Device) -> Tensor:
    """Sums over each sample of a row, [s], of values [n] of the targets of this rank's part of it."""
    samples = np.searchsorted(row.sample_bounds, on_device.target_places, side="right") - 1
    # Fillers may lie in the padding; they have weight 0.
    places = device.put(samples.clip(max=max(0, row.num_samples - 1)))
    sums = torch.zeros(max(1, row.num_samples), dtype=values.dtype, device=values.device)
    return sums.index_add(0, places, values)[: row.num_samples]
