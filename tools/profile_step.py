"""Where the time of a training step goes: torch's profiler over a few steps of a recipe.

    python -m tools.profile_step RECIPE [section.field=value ...] [--nproc N] [--drawn-rows] [--warmup N] [--steps N] [--output FOLDER]

Writes `profile.json` (seconds by kernel, kind of work and phase), `profile.md` (tables) and `trace.json.gz` (for
ui.perfetto.dev or chrome://tracing) of rank 0. Trains from the start in a folder that is removed. `--drawn-rows` takes rows as
`benchmark gpu` does, on one rank, instead of the recipe's data. Profiling takes time of its own: `benchmark gpu` says how fast
a step is, this how its time is shared out.
"""

import argparse
import gzip
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl_megatron.config.overrides import apply_overrides
from internvl_megatron.config.plan import plan
from internvl_megatron.config.recipes import find_recipe
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.data.files import write_whole
from internvl_megatron.launcher import launch
from internvl_megatron.ranks import RankInfo
from internvl_megatron.scaling.drawn_rows import TILE_TOKENS
from tools.gpu_cases import benchmark_rows
from tools.gpu_training import TIMEOUT_SECONDS, use_own_cores
from tools.image_text_rows import RandomPixels
from tools.machine_record import machine_record
from tools.trace_analysis import PHASE_PREFIX, WHOLE, analyse, table

if TYPE_CHECKING:
    from internvl_megatron.device import Device
    from internvl_megatron.train.phases import PhaseClock
    from internvl_megatron.train.step import Step

TRACE_FILE = "trace.json.gz"
NUM_KERNELS = 25
"""In the table; the JSON has all."""

NextBatch = Callable[[], Any]


def profile_rank(info: RankInfo, config: RunConfig, draws_rows: bool, num_warmup: int, trace: str) -> None:
    """Body of a rank: take all steps; rank 0 profiles those after the first ones and writes their trace."""
    from internvl_megatron.device import open_device
    from internvl_megatron.logs import configure_logging
    from internvl_megatron.ranks import joined

    configure_logging(info.rank)
    use_own_cores()
    device = open_device(config.device, info.local_rank)
    opened = _drawn if draws_rows else _of_recipe
    timeout = config.parallel.collective_timeout_seconds
    with joined(info, device, timeout), opened(info, config, device) as (step, next_batch):
        step.clock = _annotating_clock(device)
        for number in range(num_warmup):
            step.run(next_batch(), number)
        device.synchronize()
        with _profiler(device, trace if info.rank == 0 else None):
            for number in range(num_warmup, config.num_steps):
                step.run(next_batch(), number)
            device.synchronize()


@contextmanager
def _of_recipe(info: RankInfo, config: RunConfig, device: "Device") -> Iterator[tuple["Step", NextBatch]]:
    """The recipe's run."""
    from internvl_megatron.trainer import Trainer

    trainer = Trainer(info, config, device)
    try:
        yield trainer.trainer_step, trainer.data.loader.next_step
    finally:
        trainer.close()


@contextmanager
def _drawn(_: RankInfo, config: RunConfig, device: "Device") -> Iterator[tuple["Step", NextBatch]]:
    """The recipe's model on rows that need no data."""
    from internvl_megatron.model.build import build_model
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.train.step import Step
    from tools.gpu_training import fill_on_device

    run_plan = plan(config, 1)
    groups = make_groups(run_plan.layout, device, TIMEOUT_SECONDS, run_plan.vision_layout)
    model = build_model(config, groups, device, initialize=False)
    fill_on_device(model)
    tokens_per_row = config.data.tokens_per_row * TILE_TOKENS // config.model.vision.tokens_per_tile
    rows = benchmark_rows(config.model, config.rows_per_step, tokens_per_row, config.data.tiles_per_row)
    batch = RandomPixels(rows, config.model, 0, 1)
    yield Step(config, model, groups, device), lambda: batch


def _annotating_clock(device: "Device") -> "PhaseClock":
    """A clock whose phases are in the trace too."""
    from torch.profiler import record_function

    from internvl_megatron.train.phases import PhaseClock

    class AnnotatingClock(PhaseClock):
        """Says to the profiler what the phase is."""

        @contextmanager
        def phase(self, name: str) -> Iterator[None]:
            """As without."""
            with record_function(f"{PHASE_PREFIX}{name}"), super().phase(name):
                yield

    return AnnotatingClock(device)


@contextmanager
def _profiler(device: "Device", trace: str | None) -> Iterator[None]:
    """Profile what happens inside, and write its trace; without a place for it, do nothing."""
    from torch.profiler import ProfilerActivity, profile, record_function

    if trace is None:
        yield
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.kind == "cuda" else [])]
    with profile(activities=activities) as profiler, record_function(WHOLE):
        yield
    profiler.export_chrome_trace(trace)


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile and write all files."""
    parser = argparse.ArgumentParser(description="Where the time of a training step goes.")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--nproc", type=int, default=1, help="local ranks")
    parser.add_argument("--drawn-rows", action="store_true", help="rows that need no data, on one rank")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the profiled ones")
    parser.add_argument("--steps", type=int, default=3, help="profiled steps")
    parser.add_argument("--output", type=Path, default=Path("runs/profile"))
    options = parser.parse_args(arguments)
    if options.drawn_rows and options.nproc != 1:
        parser.error("--drawn-rows is for one rank: leave --nproc out")
    options.output.mkdir(parents=True, exist_ok=True)
    trace = options.output / TRACE_FILE
    with tempfile.TemporaryDirectory(prefix="profile-") as folder:
        overrides = list(options.overrides)
        if options.drawn_rows:
            overrides += ["data.meta=none", "data.tokenizer=none"]
        config = replace(
            apply_overrides(find_recipe(options.recipe), overrides),
            folder=folder,
            num_steps=options.warmup + options.steps,
        )
        plan(config, options.nproc)  # what is wrong with the settings is said here, before anything starts
        ranks = profile_rank, options.nproc, config, options.drawn_rows, options.warmup, str(trace)
        launch(*ranks, device=config.device)
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        result = analyse(json.load(file)["traceEvents"], options.steps)
    record = {
        "name": "profile",
        **machine_record(),
        "recipe": options.recipe,
        "overrides": options.overrides,
        "ranks": options.nproc,
        "steps": options.steps,
        **result,
    }
    write_whole(options.output / "profile.json", json.dumps(record, indent=1) + "\n")
    text = table(result, NUM_KERNELS)
    write_whole(options.output / "profile.md", text + "\n")
    print(text)
    print(f"{options.output}: profile.json, profile.md, {TRACE_FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
