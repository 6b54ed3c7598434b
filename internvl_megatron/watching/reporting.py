"""Everything that lets people watch a run, on the one rank that reports: figures, log lines, samples."""

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from internvl_megatron.config.plan import RunPlan
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.data.meta import read_meta
from internvl_megatron.data.positions import STRIDES, UNITS_PER_POSITION
from internvl_megatron.data.records import SampleSettings
from internvl_megatron.data.step_rows import StepRows
from internvl_megatron.data.tokenizer import Tokenizer
from internvl_megatron.device import Device
from internvl_megatron.preference_run import preference_metrics
from internvl_megatron.scaling.counts import TrainedParts, step_flops
from internvl_megatron.train.agreement import StepAgreement
from internvl_megatron.train.loss_parts import LossPart, LossParts
from internvl_megatron.train.objective import Outcome
from internvl_megatron.train.phases import total_seconds
from internvl_megatron.train.step import StepResult
from internvl_megatron.watching.boards import Board, TensorBoard, Wandb
from internvl_megatron.watching.metrics import MetricsWriter, StepMetrics
from internvl_megatron.watching.progress import Progress
from internvl_megatron.watching.shown_samples import shown_samples


class Reporting:
    """Of a run."""

    def __init__(self, config: RunConfig, plan: RunPlan, device: Device, peak_flops: float, first_step: int) -> None:
        """Open what steps are reported to.

        Args:
            config: of the run.
            plan: of the run.
            device: of this rank.
            peak_flops: of all ranks together.
            first_step: steps the run has taken before.

        Raises:
            DataError: the metrics of the run to resume are damaged.
            ConfigError: Weights & Biases does not let it.
        """
        self._config, self._plan, self._device, self._peak_flops = config, plan, device, peak_flops
        self._names = [entry.name for entry in read_meta(config.data.meta)]
        held_out = config.data.eval_meta if config.eval_every_steps is not None else None
        self._held_out_names = [] if held_out is None else [entry.name for entry in read_meta(held_out)]
        self._open(first_step)

    def _open(self, first_step: int) -> None:
        config, folder = self._config, Path(self._config.folder)
        boards: list[Board] = [TensorBoard(folder, first_step + 1 if first_step else 0)]
        if config.wandb_project is not None:
            boards.append(Wandb(folder, config.wandb_project, config.name, asdict(config), not first_step))
        self._metrics = MetricsWriter(folder, first_step or None, boards)
        self._progress = Progress(config.num_steps, first_step)

    def go_back(self, step: int) -> None:
        """Steps after this one were taken back: those that are taken again replace them."""
        self.close()
        self._open(step)

    def report(
        self, step: int, result: StepResult, seconds: float, held_out: Outcome | None, counts: Mapping[str, Any]
    ) -> None:
        """Report a step that has been taken, if it is its turn.

        Args:
            step: steps taken, this one counted.
            result: of the step.
            seconds: it took.
            held_out: an evaluation after it.
            counts: fields of `StepMetrics` that are about more than the step.
        """
        self._progress.advance(step, result.loss)
        is_evaluated = held_out is not None or counts.get("benchmark_scores")
        if self._is_due(step, self._config.log_every_steps) or is_evaluated:
            metrics = self._step_metrics(step, result, seconds, held_out, counts)
            self._metrics.write(metrics)
            self._progress.report(metrics)

    def show_samples(self, step: int, batch: StepRows, settings: SampleSettings, tokenizer: Tokenizer) -> None:
        """Show some of the samples of a step that has been taken, if it is its turn."""
        if self._is_due(step, self._config.sample_every_steps):
            self._metrics.show_samples(step, shown_samples(batch.rows[0], self._names, settings, tokenizer))

    def close(self) -> None:
        """Write out what is still held."""
        self._progress.close()
        self._metrics.close()

    def _is_due(self, step: int, every: int | None) -> bool:
        return every is not None and (step % every == 0 or step == self._config.num_steps)

    def _step_metrics(
        self, step: int, result: StepResult, seconds: float, held_out: Outcome | None, counts: Mapping[str, Any]
    ) -> StepMetrics:
        config, agreement = self._config, result.agreement
        num_tiles, num_rows = len(agreement.table), agreement.row_costs.size
        flops_per_second = needed_flops(config, agreement) / seconds
        deltas = zip(STRIDES, agreement.stride_counts.tolist(), strict=True)
        return StepMetrics(
            step=step,
            unix_seconds=time.time(),
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=result.learning_rate,
            updated=result.updated,
            num_rows=num_rows,
            num_tiles=num_tiles,
            num_tokens=agreement.num_tokens,
            num_samples=agreement.num_samples,
            num_supervised_tokens=agreement.num_supervised_tokens,
            step_seconds=seconds,
            tokens_per_second=agreement.num_tokens / seconds,
            image_tokens_per_second=num_tiles * config.model.vision.tokens_per_tile / seconds,
            model_tflops_per_second_per_rank=flops_per_second / self._plan.layout.world_size / 1e12,
            mfu=flops_per_second / self._peak_flops,
            peak_memory_bytes=self._device.peak_memory_bytes(),
            num_skipped_samples=result.num_skipped_samples,
            num_failed_images=agreement.num_failed_images,
            eval_loss=None if held_out is None else held_out.loss,
            most_tiles_per_rank=result.most_tiles_per_rank,
            sent_bytes=result.sent_bytes,
            row_fill=agreement.num_tokens / (num_rows * config.data.tokens_per_row),
            images_by_delta={f"{stride}/{UNITS_PER_POSITION}": count for stride, count in deltas if count},
            **{f"{name}_seconds": value for name, value in total_seconds(result.spans).items()},
            **{f"{part}_grad_norm": norm for part, norm in result.part_grad_norms.items()},
            **preference_metrics(result.preference, held_out),
            **self._parts(result.parts, held_out),
            **counts,
        )

    def _parts(self, parts: LossParts, held_out: Outcome | None) -> dict[str, Any]:
        """Fields of `StepMetrics` about data sets and kinds of samples."""
        by_dataset, by_kind = _named(parts, self._names), parts.by_kind()
        found: dict[str, Any] = {}
        for what, named in (("dataset", by_dataset), ("kind", by_kind)):
            found[f"loss_by_{what}"] = {name: part.loss for name, part in named.items()}
            found[f"loss_weight_by_{what}"] = {name: part.weight for name, part in named.items()}
            found[f"samples_by_{what}"] = {name: part.num_samples for name, part in named.items()}
        if held_out is not None:
            by_dataset, by_kind = _named(held_out.parts, self._held_out_names), held_out.parts.by_kind()
            found["eval_loss_by_dataset"] = {name: part.loss for name, part in by_dataset.items()}
            found["eval_loss_by_kind"] = {name: part.loss for name, part in by_kind.items()}
        return found


def needed_flops(config: RunConfig, agreement: StepAgreement) -> int:
    """Of a step over all ranks, as `StepMetrics.mfu` counts them."""
    return step_flops(
        config.model,
        num_tokens=agreement.num_tokens,
        num_tiles=len(agreement.table),
        attention_pairs=agreement.attention_pairs,
        num_supervised_tokens=agreement.num_supervised_tokens,
        trained=TrainedParts.of(config),
    ).total


def _named(parts: LossParts, names: list[str]) -> dict[str, LossPart]:
    return {names[number]: part for number, part in parts.by_dataset().items()}
