"""What a run reports of each step, and where it goes: `metrics.jsonl` and the boards, on one rank only."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from internvl_megatron.errors import DataError
from internvl_megatron.watching.boards import Board, ShownSample

METRICS_FILE = "metrics.jsonl"

GROUPS = {
    "loss": ("loss", "loss_by_dataset", "loss_by_kind"),
    "rewards": (
        "chosen_reward", "rejected_reward", "reward_margin", "preference_accuracy", "preference_loss", "quality_loss",
        "generation_loss", "reward_shift",
    ),
    "grad": (
        "grad_norm", "vision_grad_norm", "projector_grad_norm", "language_grad_norm", "learning_rate", "updated",
    ),
    "data": (
        "num_rows", "num_tiles", "num_tokens", "num_samples", "num_supervised_tokens", "total_tokens", "total_samples", "num_skipped_samples", "num_failed_images",
        "row_fill", "row_cost_imbalance", "row_cost_imbalance_before", "most_tiles_per_rank", "loss_weight_by_dataset",
        "samples_by_dataset", "loss_weight_by_kind", "samples_by_kind",
    ),
    "speed": (
        "tokens_per_second", "image_tokens_per_second", "step_seconds", "mfu", "model_tflops_per_second_per_rank",
        "plan_seconds", "encode_seconds", "decode_seconds", "backprop_seconds", "prepare_seconds", "update_seconds",
        "sent_bytes",
    ),
    "memory": ("peak_memory_bytes",),
    "faults": ("num_bad_steps", "num_rewinds", "num_failed_saves", "save_blocked_seconds", "stragglers"),
    "eval": (
        "eval_loss", "eval_loss_by_dataset", "eval_loss_by_kind", "eval_preference_accuracy", "eval_reward_margin",
        "benchmark_scores",
    ),
}  # fmt: skip
"""Fields of `StepMetrics` by the group that boards show them in; `images_by_delta` is a histogram beside them, and boards have clocks of their own."""


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One step over all ranks, unless a field says otherwise. Counts leave padding out."""

    step: int
    """Steps taken since the run began, this one counted."""
    total_tokens: int = 0
    """Tokens through the language model since the run began, in steps that rewinding has not taken back; the sum of `num_tokens`
    (at whatever `log_every_steps`), continued from checkpoints."""
    total_samples: int = 0
    """The same of samples."""
    unix_seconds: float = 0.0
    """When the step was reported, in seconds since 1970."""
    loss: float
    """Weighted mean over the global batch."""
    grad_norm: float
    """Over all parameters, before clipping."""
    vision_grad_norm: float | None = None
    """Over the vision encoder's, as the two below; None = it is not trained, or the step had nothing to learn from."""
    projector_grad_norm: float | None = None
    language_grad_norm: float | None = None
    learning_rate: float
    tokens_per_second: float
    """`num_tokens` over `step_seconds`."""
    image_tokens_per_second: float
    num_tiles: int
    num_tokens: int = 0
    """Tokens through the language model in this step, image tokens included."""
    num_samples: int
    num_supervised_tokens: int
    """Tokens that carry loss."""
    step_seconds: float
    """Wall time of the step."""
    mfu: float
    """Share, 0 to 1, of the device's peak that went into model FLOPs: the vision encoder's included, causal attention (half of the
    pairs), the output layer at supervised tokens, where it is computed; what is frozen without gradients of its weights, and forward
    alone where gradients do not reach (`scaling/counts.step_flops`)."""
    model_tflops_per_second_per_rank: float
    """10^12 model FLOPs per second and rank, counted as in `mfu`."""
    peak_memory_bytes: int
    """Highest so far on the reporting rank."""
    num_rows: int = 0
    """Packed rows of the step's global batch, which may grow at the beginning of a run (`RampConfig`)."""
    num_skipped_samples: int = 0
    """Samples left out because they were bad, since the run began."""
    num_failed_images: int = 0
    """Images of this step that could not be decoded; their samples carry no loss."""
    updated: bool = True
    """False if the optimizer left the parameters alone."""
    eval_loss: float | None = None
    """Loss of the held-out rows after this step; None = not measured."""
    plan_seconds: float = 0.0
    """Of the reporting rank, as the five below: agreeing on tiles and weights, planning."""
    encode_seconds: float = 0.0
    """Tiles to their ranks, vision encoder and projector forward, embeddings to their owners."""
    decode_seconds: float = 0.0
    """The language model's schedule, forward and backward, waiting for other stages included."""
    backprop_seconds: float = 0.0
    """Gradients back to the encoders, projector and vision encoder backward."""
    prepare_seconds: float = 0.0
    """Forward passes of the reference model, and of the policy beforehand (MPO)."""
    update_seconds: float = 0.0
    """Reducing gradients, clipping, both optimizers."""
    most_tiles_per_rank: int = 0
    """Tiles the busiest rank encoded; `num_tiles` over the number of ranks is the mean."""
    sent_bytes: int = 0
    """Tiles, embeddings and gradients that went from one rank to another."""
    row_fill: float | None = None
    """Share, 0 to 1, of the token budget of the step's rows that samples fill."""
    row_cost_imbalance: float | None = None
    """Work of the language model at the replica with most of it over the mean, in FLOPs; 1 = even. None = replicas keep
    their rows, and do not tell each other what they cost."""
    row_cost_imbalance_before: float | None = None
    """The same before replicas traded rows (`data.balance_rows`)."""
    chosen_reward: float | None = None
    """Of preference training, as the seven below: mean reward of the chosen answers."""
    rejected_reward: float | None = None
    reward_margin: float | None = None
    """How much higher the chosen answers' rewards are."""
    preference_accuracy: float | None = None
    """Share of the pairs, 0 to 1, whose chosen answer has the higher reward."""
    preference_loss: float | None = None
    """DPO's; these three without their factors."""
    quality_loss: float | None = None
    """BCO's."""
    generation_loss: float | None = None
    """Cross entropy of the chosen answers."""
    reward_shift: float | None = None
    """What rewards are compared with in the quality loss."""
    eval_preference_accuracy: float | None = None
    """Of the held-out pairs after this step."""
    eval_reward_margin: float | None = None
    num_bad_steps: int = 0
    """Steps since the run began that did not count: not finite, or a spike; those that rewinding took back too."""
    num_rewinds: int = 0
    """Times the run went back to a checkpoint."""
    num_failed_saves: int = 0
    """Checkpoints that could not be written, since this process began."""
    save_blocked_seconds: float = 0.0
    """Training waited so long for the last checkpoint that was begun."""
    stragglers: dict[str, float] = field(default_factory=dict)
    """Slow ranks and what is slow, like `rank 3 vision`: times as long as the median of their peers (`watchdog.straggler_factor`)."""
    loss_by_dataset: dict[str, float | None] = field(default_factory=dict)
    """Of each data set with samples in the step, by its name in the meta file; None = none of its tokens carries loss. The sum of
    these times `loss_weight_by_dataset` is `loss`."""
    loss_weight_by_dataset: dict[str, float] = field(default_factory=dict)
    """Share, 0 to 1, of the step's loss weight."""
    samples_by_dataset: dict[str, int] = field(default_factory=dict)
    loss_by_kind: dict[str, float | None] = field(default_factory=dict)
    """The same three by kind of sample: text, image, multi_image, video."""
    loss_weight_by_kind: dict[str, float] = field(default_factory=dict)
    samples_by_kind: dict[str, int] = field(default_factory=dict)
    images_by_delta: dict[str, int] = field(default_factory=dict)
    """Images and videos of the step by their V2PE delta, like `16/256`."""
    eval_loss_by_dataset: dict[str, float | None] = field(default_factory=dict)
    """Of the held-out rows."""
    eval_loss_by_kind: dict[str, float | None] = field(default_factory=dict)
    benchmark_scores: dict[str, float] = field(default_factory=dict)
    """Of the benchmarks the model was scored on after this step (`BenchmarkConfig`), on their own scales."""


@dataclass(frozen=True)
class RunSummary:
    """How a run ended."""

    step: int
    loss: float | None
    """Loss of the last step; None if no step was left to take."""
    eval_loss: float | None
    stop_signal: int | None
    """The signal that ended it early; None = it took its last step."""


class MetricsWriter:
    """Writes one line a step. Rank 0 of a run has one, the other ranks none.

    A new run clears what the folder holds. A resumed run keeps the steps its checkpoint has seen and drops those it is
    going to take again.
    """

    def __init__(self, folder: str | Path, resume_step: int | None = None, boards: Sequence[Board] = ()) -> None:
        """Open the run folder's metrics.

        Args:
            folder: of the run.
            resume_step: last step whose line is kept; None = a new run.
            boards: where the steps are shown besides.

        Raises:
            DataError: the file of the run to resume is damaged, other than by a last line that was cut off.
        """
        self.path = Path(folder) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._keep_until(resume_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._boards = boards

    def write(self, metrics: StepMetrics) -> None:
        """Add one step. The line is with the operating system on return: a killed process loses none."""
        row = asdict(metrics)
        self._file.write(json.dumps(_valid(row), allow_nan=False) + "\n")
        self._file.flush()
        scalars, histograms = _figures(row), {"data/log2_delta": _log2_deltas(metrics.images_by_delta)}
        for board in self._boards:
            board.show_figures(metrics.step, scalars, histograms)

    def show_samples(self, step: int, samples: Sequence[ShownSample]) -> None:
        """Show some samples of a step."""
        for board in self._boards:
            board.show_samples(step, samples)

    def close(self) -> None:
        """Write out what the boards still hold; nothing can be written afterwards."""
        self._file.close()
        for board in self._boards:
            board.close()

    def _keep_until(self, resume_step: int | None) -> None:
        """Rewrite the file without later steps and without a half-written line, in one go."""
        kept = [] if resume_step is None or not self.path.exists() else read_metrics(self.path)
        kept = [row for row in kept if resume_step is not None and row["step"] <= resume_step]
        partial = self.path.with_name(f".{METRICS_FILE}.partial")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in kept)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)


def _valid(value: Any) -> Any:
    """The same without NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _valid(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    """What boards show of a step: {group/field, or group/field/part: number}."""
    shown: dict[str, float] = {}
    for group, fields in GROUPS.items():
        for name in fields:
            value, tag = row[name], f"{group}/{name.removeprefix('eval_')}"
            parts = {f"{tag}/{part}": one for part, one in value.items()} if isinstance(value, dict) else {tag: value}
            shown |= {key: float(one) for key, one in parts.items() if one is not None}
    return shown


def _log2_deltas(images_by_delta: Mapping[str, int]) -> dict[float, int]:
    """How often each binary logarithm of a delta came."""
    logarithms = {}
    for delta, count in images_by_delta.items():
        numerator, denominator = map(int, delta.split("/"))
        logarithms[math.log2(numerator / denominator)] = count
    return logarithms


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a metrics file, fields by their names in `StepMetrics`; numbers that were not finite are None.

    A last line that was cut off, by a kill or because a run is writing it now, is left out.

    Raises:
        DataError: the file cannot be read, or another line is not a step.
    """
    try:
        lines = Path(path).read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise DataError(f"{path}:{number}: is not valid JSON ({error}); remove the line") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise DataError(f"{path}:{number}: field 'step': must be a whole number; remove the line")
        rows.append(row)
    return rows
