"""What a run with pairs of answers has besides its steps: a reference that stays the same, figures, a history to save."""

from typing import Any

from internvl_megatron.checkpoint.folders import CheckpointInfo
from internvl_megatron.checkpoint.weight_sums import weights_id
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.data.reference_file import ReferenceFile
from internvl_megatron.errors import ConfigError
from internvl_megatron.model.preference_loss import RunningMean
from internvl_megatron.train.objective import Outcome, PreferenceFigures
from internvl_megatron.train.preference import MixedPreference
from internvl_megatron.train.step import Step


class PreferenceRun:
    """Keeps track of the reference and of the rewards so far. In runs without pairs it does nothing."""

    def __init__(self, config: RunConfig, step: Step) -> None:
        """Read the file of the reference's log-probabilities, if there is one.

        Raises:
            DataError: the file is wrong.
        """
        path = config.mpo.reference_file
        self.file = None if path is None else ReferenceFile(path)
        self._config = config
        self._step = step
        self._objective = step.objective if isinstance(step.objective, MixedPreference) else None
        self._reference_weights: str | None = None

    @property
    def needs_first_weights(self) -> bool:
        """Whether a run that continues has to see the weights it once started from."""
        return self._objective is not None and self.file is None

    def set_reference(self) -> None:
        """Let the weights as they are now be the reference, or see that those of the file are; collective.

        Raises:
            DataError: the file is of other weights.
        """
        if self._objective is None:
            return
        self._reference_weights = weights_id(self._step.model, self._step.groups)
        if self.file is None:
            self._step.keep_as_reference()
        else:
            self.file.check_weights(self._reference_weights)

    def continue_from(self, info: CheckpointInfo) -> None:
        """Go on with the rewards of earlier steps, judged against the same reference.

        Raises:
            ConfigError: the reference is another one now.
            DataError: the file is of other weights.
        """
        if self._objective is None:
            return
        self._objective.history = RunningMean(info.reward_total, info.num_rewarded_pairs)
        if self.file is not None and info.reference_weights is not None:
            self.file.check_weights(info.reference_weights)
            self._reference_weights = info.reference_weights
        if self._reference_weights != info.reference_weights:
            raise ConfigError(
                f"checkpoint.load={self._config.checkpoint.load}: has other weights than when the run in {self._config.folder} "
                "began, and they are the reference of its pairs; set it back, or choose another folder (folder=...)"
            )

    def checkpoint_fields(self) -> dict[str, Any]:
        """Fields of `CheckpointInfo`."""
        if self._objective is None:
            return {}
        history = self._objective.history
        return {
            "reference_weights": self._reference_weights,
            "reward_total": history.total,
            "num_rewarded_pairs": history.count,
        }


def preference_metrics(figures: PreferenceFigures | None, held_out: Outcome | None) -> dict[str, float]:
    """Fields of `StepMetrics` about pairs of answers."""
    found: dict[str, float] = {}
    if figures is not None:
        names = ("chosen_reward", "rejected_reward", "preference_loss", "quality_loss", "generation_loss")
        found |= {name: getattr(figures, name) for name in names}
        found |= {
            "preference_accuracy": figures.accuracy,
            "reward_margin": figures.margin,
            "reward_shift": figures.shift,
        }
    if held_out is not None and held_out.preference is not None:
        found["eval_preference_accuracy"] = held_out.preference.accuracy
        found["eval_reward_margin"] = held_out.preference.margin
    return found
