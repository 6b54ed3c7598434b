"""Steps of narrow models on four CPU ranks, timed pass by pass in CPU seconds, for the benchmark of the schedules.

Waiting costs a thread no CPU seconds, so the passes of ranks that share a core are timed as if each rank had its own;
`scaling.step_time` puts them together. Autograd runs a CPU graph in the thread that asks for it, torch has one thread.
All ranks are bound to one core: side by side on several they slow each other down, more so in schedules that keep more
of them busy.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from internvl_megatron.config.models import INTERNVL3
from internvl_megatron.config.plan import plan
from internvl_megatron.config.schema import (
    DataConfig,
    LanguageConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    VisionConfig,
)
from internvl_megatron.data.rows import Row
from internvl_megatron.device import Device, Mark
from internvl_megatron.parallel.bubble_plan import BubblePlan
from internvl_megatron.ranks import RankInfo
from internvl_megatron.scaling.bubble_time import BubbleWork
from internvl_megatron.scaling.drawn_rows import draw_rows
from internvl_megatron.scaling.step_time import Encoders, RowSizes, WindowWork, by_stage
from tools.image_text_rows import RandomPixels, small_row

if TYPE_CHECKING:
    from internvl_megatron.train.step import Step
    from internvl_megatron.train.window_encoder import ChunkPasses

TOKENS_PER_ROW = 16384
TILES_PER_ROW = 48
"""Budgets of a row: InternVL2.5's, the nearest that were published with a tile budget."""
ROWS_PER_STEP = 8
SEED = 1


def _narrow(vision_layers: int, vision_size: int, language_size: int, vocab_size: int) -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(
            hidden_size=vision_size,
            num_layers=vision_layers,
            num_heads=4,
            ffn_hidden_size=4 * vision_size,
            # 64 patches, 1/16 of the real ones, and 4 tokens of the language model, 1/64.
            tile_pixels=112,
            shuffle_factor=4,
        ),
        language=LanguageConfig(
            hidden_size=language_size,
            num_layers=24,
            num_heads=4,
            num_kv_heads=2,
            head_size=language_size // 4,
            ffn_hidden_size=8 * language_size // 3,
            vocab_size=vocab_size,
        ),
    )


NARROW = {"1B": _narrow(4, 92, 96, 8192), "78B": _narrow(2, 72, 192, 1024)}
"""Models by the size they stand for, with the FLOPs of encoder over language model of the real ones at half image tokens:
1.35 and 0.14. In seconds it is 0.8 and 0.26, for narrow matrices are slow."""


@dataclass(frozen=True)
class Grid:
    """A layout of one replica."""

    tensor_size: int
    pipeline_size: int

    @property
    def num_ranks(self) -> int:
        """Ranks of one replica."""
        return self.tensor_size * self.pipeline_size

    def __str__(self) -> str:
        """Short form for tables."""
        return f"TP{self.tensor_size}xPP{self.pipeline_size}" if self.tensor_size > 1 else f"PP{self.pipeline_size}"


@dataclass(frozen=True)
class Trial:
    """A configuration to measure, and on what."""

    size: str
    image_share: float
    grid: Grid
    encoders: Encoders
    stage_layers: tuple[int, ...]

    @property
    def config(self) -> RunConfig:
        """Of a real run."""
        return narrow_config(self.size, self.grid, self.encoders, self.stage_layers)


def narrow_config(size: str, grid: Grid, encoders: Encoders, stage_layers: tuple[int, ...] | None = None) -> RunConfig:
    """A real run of a narrow model; without layers of its own every stage has those `plan` gives it."""
    model = NARROW[size]
    return RunConfig(
        name="benchmark_schedule",
        model=model,
        # Rows are drawn, not read.
        data=DataConfig(
            meta="none", tokenizer="none", tokens_per_row=narrow_tokens_per_row(model), tiles_per_row=TILES_PER_ROW
        ),
        parallel=ParallelConfig(
            tensor_size=grid.tensor_size,
            pipeline_size=grid.pipeline_size,
            sequence_parallel=grid.tensor_size > 1,
            stage_layers=stage_layers,
            vision_placement="first_stage" if encoders == "first_stage" else "all_ranks",
            vision_in_bubbles=encoders == "in_bubbles",
            prepare_ahead=False,  # work in a second thread would not be seen
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        rows_per_step=ROWS_PER_STEP,
        dtype="fp32",
        device="cpu",
    )


def narrow_tokens_per_row(model: ModelConfig) -> int:
    """The row's budget in proportion to the tokens of a tile."""
    return TOKENS_PER_ROW * model.vision.tokens_per_tile // INTERNVL3["78B"].vision.tokens_per_tile


def narrow_steps(size: str, image_share: float, num_steps: int) -> list[list[Row]]:
    """Rows of some steps for a narrow model."""
    model = NARROW[size]
    rows = draw_rows(image_share, num_steps * ROWS_PER_STEP, TOKENS_PER_ROW, TILES_PER_ROW, SEED)
    small = [small_row(samples, model, TOKENS_PER_ROW, seed) for seed, samples in enumerate(rows)]
    return [small[first : first + ROWS_PER_STEP] for first in range(0, len(small), ROWS_PER_STEP)]


def sizes_of_narrow(steps: list[list[Row]]) -> RowSizes:
    """[M, 1, steps]."""

    def each(measure: Callable[[Row], int]) -> np.ndarray:
        return np.array([[measure(row) for row in rows] for rows in steps], dtype=np.int64).T[:, None]

    return RowSizes(
        tokens=each(lambda row: len(row.token_ids)),
        attention_pairs=each(lambda row: int((row.segment_lengths[: row.num_samples].astype(np.int64) ** 2).sum())),
        supervised=each(lambda row: int((row.weights > 0).sum())),
        tiles=each(lambda row: row.num_tiles),
    )


@dataclass
class RankSeconds:
    """CPU seconds of one rank in one step, and what the step says of itself."""

    forward: np.ndarray
    """[M], in the order in which the pipeline takes the rows."""
    backward: np.ndarray
    """[M]."""
    encoder: dict[str, np.ndarray]
    """Passes of the encoder over the chunks of the plan, [C] by phase; 0 for those this rank leaves out."""
    plan: BubblePlan | None
    """None where the phases are apart."""
    phases: dict[str, float]
    """All phases but the pipeline's; what interrupts the pipeline is not in its own."""
    whole: float
    """Of the whole step, what is in neither included."""
    most_tiles_per_rank: int
    sent_bytes: int


class ThreadTime(Device):
    """A CPU whose clock is the CPU time of the thread that asks."""

    def mark(self) -> Mark:
        """Seconds of CPU time."""
        return time.thread_time()


class PassTimer:
    """Seconds of every pass of this process, taken where Megatron Core's schedule and the encoder look their passes up."""

    def __init__(self) -> None:
        """From here on every pass is timed."""
        from megatron.core.pipeline_parallel import schedules

        from internvl_megatron.train import windows
        from internvl_megatron.train.window_encoder import ChunkPasses

        self.rows: dict[str, list[float]] = {"forward": [], "backward": []}
        self.chunks: dict[str, dict[int, float]] = {"encode": {}, "backprop": {}}
        self.plans: list[BubblePlan] = []
        schedules.forward_step = self._timed("forward", schedules.forward_step)
        schedules.backward_step = self._timed("backward", schedules.backward_step)
        ChunkPasses.forward = self._timed_chunk("encode", ChunkPasses.forward)
        ChunkPasses.backward = self._timed_chunk("backprop", ChunkPasses.backward)
        windows.plan_bubbles = self._kept(windows.plan_bubbles)

    def time_step(self, step: "Step", batch: Any, number: int) -> RankSeconds:
        """Run one step."""
        from internvl_megatron.train.phases import total_seconds

        for seconds in (*self.rows.values(), *self.chunks.values(), self.plans):
            seconds.clear()
        start = time.thread_time()
        result = step.run(batch, number)
        whole = time.thread_time() - start
        phases = total_seconds(result.spans)
        del phases["decode"]
        bubble_plan = self.plans[0] if self.plans else None
        num_chunks = bubble_plan.num_chunks if bubble_plan else 0
        return RankSeconds(
            forward=np.array(self.rows["forward"]),
            backward=np.array(self.rows["backward"]),
            encoder={
                phase: np.array([seconds.get(chunk, 0.0) for chunk in range(num_chunks)])
                for phase, seconds in self.chunks.items()
            },
            plan=bubble_plan,
            phases=phases,
            whole=whole,
            most_tiles_per_rank=result.most_tiles_per_rank,
            sent_bytes=result.sent_bytes,
        )

    def _timed(self, kind: str, run_pass: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            result = run_pass(*args, **kwargs)
            self.rows[kind].append(time.thread_time() - start)
            return result

        return run

    def _timed_chunk(self, phase: str, run_chunk: Callable[..., Any]) -> Callable[..., Any]:
        def run(passes_of_chunks: "ChunkPasses", chunk: int, *args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            result = run_chunk(passes_of_chunks, chunk, *args, **kwargs)
            self.chunks[phase][chunk] = time.thread_time() - start
            return result

        return run

    def _kept(self, make_plan: Callable[..., BubblePlan]) -> Callable[..., BubblePlan]:
        def make(*args: Any) -> BubblePlan:
            self.plans.append(make_plan(*args))
            return self.plans[-1]

        return make


def measure_trials(info: RankInfo, trials: list[Trial], num_steps: int, repeats: int) -> list[list[RankSeconds]]:
    """Body of a rank: every trial's steps in turn, several times over; the least seconds of every pass. All of one grid.

    A machine whose speed changes while this runs slows down all trials of a turn alike.
    """
    import torch

    from internvl_megatron.device import open_device
    from internvl_megatron.logs import configure_logging
    from internvl_megatron.model.build import build_model
    from internvl_megatron.parallel.groups import Groups, make_groups
    from internvl_megatron.ranks import joined
    from internvl_megatron.train.phases import PhaseClock
    from internvl_megatron.train.step import Step

    configure_logging(info.rank)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    device = open_device("cpu")
    timer = PassTimer()
    with joined(info, device, 600):

        @cache
        def groups_of(placement: str) -> Groups:
            config = next(trial.config for trial in trials if trial.config.parallel.vision_placement == placement)
            run_plan = plan(config, info.world_size)
            return make_groups(run_plan.layout, device, 600, run_plan.vision_layout)

        def prepared(trial: Trial) -> tuple[Step, list[Any]]:
            config = trial.config
            groups = groups_of(config.parallel.vision_placement)
            step = Step(config, build_model(config, groups, device), groups, device)
            step.clock = PhaseClock(ThreadTime(device.kind, device.index, device.attention))
            steps = narrow_steps(trial.size, trial.image_share, num_steps)
            batches = [RandomPixels(rows, config.model, info.rank, info.world_size) for rows in steps]
            timer.time_step(step, batches[0], 0)  # the first step builds what later ones find
            return step, batches

        all_prepared = [prepared(trial) for trial in trials]
        turns = [
            [[timer.time_step(step, batch, 0) for batch in batches] for step, batches in all_prepared]
            for _ in range(repeats)
        ]
    return [
        [least(list(same_step)) for same_step in zip(*same_trial, strict=True)]
        for same_trial in zip(*turns, strict=True)
    ]


def least(runs: list[RankSeconds]) -> RankSeconds:
    """Every pass at its fastest: what slowed it down in the other runs was something else on the machine."""
    return replace(
        runs[0],
        forward=np.min([run.forward for run in runs], axis=0),
        backward=np.min([run.backward for run in runs], axis=0),
        encoder={name: np.min([run.encoder[name] for run in runs], axis=0) for name in runs[0].encoder},
        phases={name: min(run.phases[name] for run in runs) for name in runs[0].phases},
        whole=min(run.whole for run in runs),
    )


@dataclass(frozen=True)
class Measured:
    """All ranks of a trial."""

    trial: Trial
    ranks: list[list[RankSeconds]]
    """By rank, then by step."""

    @property
    def window(self) -> WindowWork:
        """The seconds by pass and phase, one case per step; passes in the order in which the pipeline takes the rows."""
        pipeline, tensor = self.trial.grid.pipeline_size, self.trial.grid.tensor_size

        def passes(kind: Literal["forward", "backward"]) -> np.ndarray:
            values = np.array([[getattr(step, kind) for step in steps] for steps in self.ranks])  # [R, steps, M]
            stages = values.reshape(pipeline, tensor, *values.shape[1:]).max(axis=1)
            return stages.transpose(0, 2, 1)[:, :, None]

        return WindowWork(self.phase("encode"), passes("forward"), passes("backward"), self.phase("backprop"))

    def phase(self, name: str) -> np.ndarray:
        """Seconds of a phase, [R, steps]."""
        return np.array([[step.phases[name] for step in steps] for steps in self.ranks])

    def _chunks(self, phase: str, step: int) -> np.ndarray:
        """Seconds of a step's chunks, [P, C, 1, T]; messages and whatever else the phase does are shared out over them."""
        values = np.array([steps[step].encoder[phase] for steps in self.ranks])
        values *= (self.phase(phase)[:, step] / values.sum(axis=1))[:, None]
        return by_stage(values, self.trial.grid.pipeline_size, self.trial.grid.tensor_size)

    def _path_without_update(self, step: int) -> float:
        window = WindowWork(*(part[..., step] for part in vars(self.window).values()))
        bubble_plan = self.ranks[0][step].plan
        if bubble_plan is None:
            return float(window.critical_path)
        encode, backprop = (self._chunks(phase, step) for phase in ("encode", "backprop"))
        return float(BubbleWork(bubble_plan, window.forward, window.backward, encode, backprop).critical_path)

    @property
    def critical_path(self) -> np.ndarray:
        """Seconds of every step."""
        steps = np.array([self._path_without_update(step) for step in range(len(self.ranks[0]))])
        return self.phase("plan").max(axis=0) + steps + self.phase("update").max(axis=0)

    @property
    def seen_share(self) -> float:
        """Of the CPU seconds of whole steps, those in passes and phases."""
        seen = sum(
            step.forward.sum() + step.backward.sum() + sum(step.phases.values())
            for steps in self.ranks
            for step in steps
        )
        return float(seen / sum(step.whole for steps in self.ranks for step in steps))

    @property
    def vision_busiest_over_mean(self) -> float:
        """CPU seconds of the busiest rank's vision work in a step over all ranks' mean, averaged over the steps."""
        work = self.phase("encode") + self.phase("backprop")
        return float((work.max(axis=0) / work.mean(axis=0)).mean())
