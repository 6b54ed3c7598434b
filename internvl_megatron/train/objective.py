"""What is trained for: how the output of a row becomes its share of a step's loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from internvl_megatron.config.schema import RunConfig
from internvl_megatron.model.output_layer import Targets
from internvl_megatron.parallel.groups import Groups
from internvl_megatron.train.agreement import StepAgreement
from internvl_megatron.train.batch import DeviceRow

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

    def __init__(self, config: RunConfig, groups: Groups) -> None:
        self._normalize = config.loss.normalize
        self._counts = groups.is_last_stage and groups.layout.tensor_index(groups.rank) == 0

    def prepare(self, agreement: StepAgreement, forward: ForwardPass, trains: bool) -> None:
        """Nothing."""

    def row(self, agreement: StepAgreement, number: int, row: DeviceRow) -> tuple[Targets, RowLoss]:
        """The row's sum, divided by the global weight."""
        return Targets(row.targets, row.weights * self._scale(agreement, number)), _kept_as_it_is

    def sums(self, agreement: StepAgreement, kept: Mapping[int, Tensor]) -> list[float]:
        """The loss, which is the sum of all rows' shares."""
        return [float(torch.stack([*kept.values()]).double().sum()) if self._counts and kept else 0.0]

    def outcome(self, sums: Sequence[float]) -> Outcome:
        """The loss."""
        return Outcome(sums[0])

    def _scale(self, agreement: StepAgreement, row: int) -> float:
        """1 / (weight the row's loss is divided by), or 0 where there is nothing to learn from."""
        if self._normalize == "step":
            weight = float(agreement.row_weights.sum())
        else:
            weight = float(agreement.row_weights[row]) * len(agreement.rows)
        return 1.0 / weight if weight > 0 else 0.0


def _kept_as_it_is(loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return loss, NO_COUNT, loss.detach()
