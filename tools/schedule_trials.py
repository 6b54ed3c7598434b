"""Steps of narrow models on four CPU ranks, timed pass by pass in CPU seconds, for the benchmark of the schedules.

Waiting costs a thread no CPU seconds, so the passes of ranks that share two cores are timed as if each rank had its own;
`scaling.step_time` puts them together. Autograd runs a CPU graph in the thread that asks for it, torch has one thread.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

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
from internvl_megatron.data.packing import Row
from internvl_megatron.ranks import RankInfo
from internvl_megatron.scaling.step_time import Encoders, RowSizes, WindowWork
from tools.image_text_rows import RandomPixels, draw_rows, small_row

TOKENS_PER_ROW = 16384
TILES_PER_ROW = 48
"""Budgets of a row: InternVL2.5's, the nearest that were published with a tile budget."""
ROWS_PER_STEP = 8
SEED = 1


def _narrow(vision_layers: int, vision_size: int, vision_ffn_size: int, vocab_size: int) -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(
            hidden_size=vision_size,
            num_layers=vision_layers,
            num_heads=4,
            ffn_hidden_size=vision_ffn_size,
            tile_pixels=56,  # 16 patches and 4 tokens for the language model, 1/64 of the real ones
        ),
        language=LanguageConfig(
            hidden_size=96,
            num_layers=24,
            num_heads=4,
            num_kv_heads=2,
            head_size=24,
            ffn_hidden_size=256,
            vocab_size=vocab_size,
        ),
    )


NARROW = {"1B": _narrow(11, 192, 768, 8192), "78B": _narrow(2, 72, 288, 512)}
"""Models with the work ratios of the real ones, by the size they stand for."""


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
            vision_placement=encoders,
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
    """[M]."""
    backward: np.ndarray
    """[M]."""
    phases: dict[str, float]
    """All phases but the pipeline's."""
    whole: float
    """Of the whole step, what is in neither included."""
    most_tiles_per_rank: int
    sent_bytes: int


def measure_trials(info: RankInfo, trials: list[Trial], num_steps: int, repeats: int) -> list[list[RankSeconds]]:
    """Body of a rank: every trial's steps, each several times; the least seconds of every pass. All of one layout."""
    import torch
    from megatron.core.pipeline_parallel import schedules

    from internvl_megatron.device import open_device
    from internvl_megatron.logs import configure_logging
    from internvl_megatron.model.build import build_model
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.ranks import joined
    from internvl_megatron.train.phases import PhaseClock
    from internvl_megatron.train.step import Step

    class CpuClock(PhaseClock):
        """Counts the CPU seconds of this thread in every phase."""

        def __init__(self) -> None:
            super().__init__(device)
            self.seconds: dict[str, float] = defaultdict(float)

        @contextmanager
        def phase(self, name: str) -> Iterator[None]:
            start = time.thread_time()
            with super().phase(name):
                yield
            self.seconds[name] += time.thread_time() - start

    passes: dict[str, list[float]] = {"forward": [], "backward": []}

    def timed(kind: str, run_pass: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            result = run_pass(*args, **kwargs)
            passes[kind].append(time.thread_time() - start)
            return result

        return run

    def run_once(step: Step, batch: Any, number: int) -> RankSeconds:
        clock = CpuClock()
        step.clock = clock
        for seconds in passes.values():
            seconds.clear()
        start = time.thread_time()
        result = step.run(batch, number)
        whole = time.thread_time() - start
        phases = {name: seconds for name, seconds in clock.seconds.items() if name != "decode"}
        forward, backward = (np.array(passes[kind]) for kind in ("forward", "backward"))
        return RankSeconds(forward, backward, phases, whole, result.most_tiles_per_rank, result.sent_bytes)

    configure_logging(info.rank)
    torch.set_num_threads(1)
    device = open_device("cpu")
    # Megatron Core's schedule looks both up in its module each time.
    schedules.forward_step = timed("forward", schedules.forward_step)
    schedules.backward_step = timed("backward", schedules.backward_step)
    measured = []
    with joined(info, device, 600):
        run_plan = plan(trials[0].config, info.world_size)
        groups = make_groups(run_plan.layout, device, 600, run_plan.vision_layout)
        for trial in trials:
            config = trial.config
            step = Step(config, build_model(config, groups, device), groups, device)
            steps = narrow_steps(trial.size, trial.image_share, num_steps)
            batches = [RandomPixels(rows, config.model, info.rank, info.world_size) for rows in steps]
            run_once(step, batches[0], 0)  # the first step builds what later ones find
            runs = [[run_once(step, batch, 0) for batch in batches] for _ in range(repeats)]
            measured.append([least(list(same_step)) for same_step in zip(*runs, strict=True)])
    return measured


def least(runs: list[RankSeconds]) -> RankSeconds:
    """Every pass at its fastest: what slowed it down in the other runs was something else on the machine."""
    return replace(
        runs[0],
        forward=np.min([run.forward for run in runs], axis=0),
        backward=np.min([run.backward for run in runs], axis=0),
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
        """The seconds as durations of a window, one case per step."""
        pipeline, tensor = self.trial.grid.pipeline_size, self.trial.grid.tensor_size

        def passes(kind: Literal["forward", "backward"]) -> np.ndarray:
            values = np.array([[getattr(step, kind) for step in steps] for steps in self.ranks])  # [R, steps, M]
            stages = values.reshape(pipeline, tensor, *values.shape[1:]).max(axis=1)
            return stages.transpose(0, 2, 1)[:, :, None]

        return WindowWork(self.phase("encode"), passes("forward"), passes("backward"), self.phase("backprop"))

    def phase(self, name: str) -> np.ndarray:
        """Seconds of a phase, [R, steps]."""
        return np.array([[step.phases[name] for step in steps] for steps in self.ranks])

    @property
    def critical_path(self) -> np.ndarray:
        """Seconds of every step."""
        return self.phase("plan").max(axis=0) + self.window.critical_path + self.phase("update").max(axis=0)

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
