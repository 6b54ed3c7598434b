"""Speed of the training step: tokens per second, step time, MFU, memory, as one JSON record.

    python -m tools.benchmark step [--model 1b|demo] [--device auto|cpu|cuda] [--steps N] [--output FILE]
    python -m tools.benchmark gpu ...          see tools/benchmark_gpu.py
    python -m tools.benchmark schedule ...     see tools/benchmark_schedule.py
    python -m tools.benchmark checkpoint ...   see tools/benchmark_checkpoint.py
    python -m tools.benchmark index ...        see tools/benchmark_data_index.py
    python -m tools.benchmark loader ...       see tools/benchmark_loader.py
    python -m tools.benchmark packing ...      see tools/benchmark_packing.py
    python -m tools.benchmark generation ...   see tools/benchmark_generation.py

`step`: one rank, fresh weights, synthetic packed rows (one picture and its text per sample), real step: vision encoder, projector,
language model, loss, backward, clipping, AdamW. The record names machine, versions and date.
"""

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from internvl_megatron.config.models import INTERNVL3
from internvl_megatron.config.recipes import demo_digits
from internvl_megatron.config.schema import DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from internvl_megatron.data.images import ImageRef
from internvl_megatron.data.rows import Row, SampleSource
from internvl_megatron.data.step_rows import DecodedTiles
from internvl_megatron.launcher import launch
from internvl_megatron.ranks import RankInfo
from tools import (
    benchmark_checkpoint,
    benchmark_data_index,
    benchmark_generation,
    benchmark_gpu,
    benchmark_loader,
    benchmark_packing,
    benchmark_schedule,
)

TEXT_TOKENS_PER_SAMPLE = 128
ANSWER_TOKENS_PER_SAMPLE = 48


class SyntheticStep:
    """Rows and tiles of one step, made from a seed; has what `Step` asks of `StepRows`."""

    def __init__(
        self, model: ModelConfig, num_rows: int, tokens_per_row: int, tiles_per_image: int, seed: int
    ) -> None:
        self.rows = [synthetic_row(model, tokens_per_row, tiles_per_image, seed + row) for row in range(num_rows)]
        self.slots = list(range(num_rows))
        self.image_owner = [[0] * len(row.images) for row in self.rows]
        rng = np.random.default_rng(seed)
        shape = (tiles_per_image, 3, model.vision.tile_pixels, model.vision.tile_pixels)
        self._tiles = DecodedTiles(
            {
                (row, image): rng.integers(0, 256, shape, dtype=np.uint8)
                for row, owners in enumerate(self.image_owner)
                for image in range(len(owners))
            }
        )

    def tiles(self) -> DecodedTiles:
        """All tiles; one rank decodes everything."""
        return self._tiles


def synthetic_row(model: ModelConfig, tokens_per_row: int, tiles_per_image: int, seed: int) -> Row:
    """A row full of samples of one image and some text, square weights, ordinary positions."""
    rng = np.random.default_rng(seed)
    image_tokens = tiles_per_image * model.vision.tokens_per_tile
    length = image_tokens + TEXT_TOKENS_PER_SAMPLE
    count = tokens_per_row // length
    assert count > 0, f"a row of {tokens_per_row} tokens is shorter than one sample of {length}"
    starts = np.arange(count) * length
    targets = np.full(tokens_per_row, -100, np.int32)
    token_ids = rng.integers(0, model.language.vocab_size, tokens_per_row, dtype=np.int32)
    for start in starts:
        answer = slice(start + length - 1 - ANSWER_TOKENS_PER_SAMPLE, start + length - 1)
        targets[answer] = token_ids[answer.start + 1 : answer.stop + 1]
    padding = tokens_per_row - count * length
    positions = np.concatenate([np.tile(np.arange(length), count), np.zeros(padding)]) * 256
    tile_offsets = 1 + np.arange(tiles_per_image) * model.vision.tokens_per_tile
    return Row(
        token_ids=token_ids,
        targets=targets,
        weights=np.where(targets >= 0, ANSWER_TOKENS_PER_SAMPLE**-0.5, 0.0).astype(np.float32),
        positions=positions.astype(np.int32),
        segment_lengths=np.array([length] * count + ([padding] if padding else []), np.int32),
        sources=tuple(SampleSource(0, index, index) for index in range(count)),
        images=tuple(
            ImageRef(f"synthetic-{index}", (tiles_per_image, 1), tiles_per_image, None) for index in range(count)
        ),
        image_starts=(starts + 1).astype(np.int32),
        tile_starts=(starts[:, None] + tile_offsets).ravel().astype(np.int32),
    )


def run_steps(info: RankInfo, config: RunConfig, num_steps: int, tiles_per_image: int) -> dict[str, Any]:
    """Body of the rank: losses of all steps, and their times without the first three."""
    import torch

    from internvl_megatron.device import open_device
    from internvl_megatron.logs import configure_logging
    from internvl_megatron.model.build import build_model, torch_dtype
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.parallel.layout import Layout
    from internvl_megatron.ranks import joined
    from internvl_megatron.scaling.counts import step_flops
    from internvl_megatron.train.step import Step

    configure_logging(info.rank)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    device = open_device(config.device, info.local_rank)
    losses, seconds, agreement = [], [], None
    with joined(info, device, 600):
        groups = make_groups(Layout(1, 1, 1), device, 600)
        step = Step(config, build_model(config, groups, device), groups, device)
        # The same batch again and again: its loss must fall, which random ones would not show.
        batch = SyntheticStep(config.model, config.rows_per_step, config.data.tokens_per_row, tiles_per_image, seed=0)
        for number in range(num_steps):
            device.synchronize()
            start = time.perf_counter()
            result = step.run(batch, number)  # pyright: ignore[reportArgumentType]
            device.synchronize()
            seconds.append(time.perf_counter() - start)
            losses.append(result.loss)
            agreement = result.agreement
        assert agreement is not None, "at least one step was run"
        flops = step_flops(
            config.model,
            num_tokens=agreement.num_tokens,
            num_tiles=len(agreement.table),
            attention_pairs=agreement.attention_pairs,
            num_supervised_tokens=agreement.num_supervised_tokens,
        ).total
        step_seconds = statistics.median(seconds[3:] or seconds)
        return {
            "device": device.name(),
            "attention": device.kernels(config).attention,
            "losses": losses,
            "step_seconds": step_seconds,
            "tokens_per_second": agreement.num_tokens / step_seconds,
            "tiles_per_second": len(agreement.table) / step_seconds,
            "model_tflops_per_second": flops / step_seconds / 1e12,
            "mfu": flops / step_seconds / device.peak_flops(torch_dtype(config.dtype)),
            "peak_memory_bytes": device.peak_memory_bytes(),
        }


def benchmark_config(model: str, device: str, dtype: str, num_steps: int) -> tuple[RunConfig, int]:
    """Configuration and tiles per image of a benchmark."""
    if model == "demo":
        base = replace(demo_digits(), dtype=dtype, device=device, num_steps=num_steps)
        return replace(
            base, parallel=replace(base.parallel, tensor_size=1, pipeline_size=1, sequence_parallel=False)
        ), 4
    data = DataConfig(tokens_per_row=16384, tiles_per_row=48)
    optimizer = OptimizerConfig(learning_rate=1e-5)
    config = RunConfig(
        name="benchmark_1b",
        model=INTERNVL3["1B"],
        data=data,
        optimizer=optimizer,
        parallel=ParallelConfig(vision_recompute="full"),
        rows_per_step=2,
        num_steps=num_steps,
    )
    return replace(config, dtype=dtype, device=device), 5


def record(name: str, config: RunConfig, measured: dict[str, Any]) -> dict[str, Any]:
    """A result with all that is needed to judge it."""
    return {
        "name": name,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "dtype": config.dtype,
        "rows_per_step": config.rows_per_step,
        "tokens_per_row": config.data.tokens_per_row,
        "cores": len(os.sched_getaffinity(0)),
        "versions": {package: version(package) for package in ("torch", "megatron-core")},
        **measured,
    }


def measure_step(options: argparse.Namespace) -> int:
    """Measure and write one record."""
    config, tiles_per_image = benchmark_config(options.model, options.device, options.dtype, options.steps)
    measured = launch(run_steps, 1, config, options.steps, tiles_per_image, device=config.device)[0]
    text = json.dumps(record(f"step_{options.model}", config, measured), indent=1)
    print(text)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(description="Benchmarks of the training step.")
    commands = parser.add_subparsers(required=True)
    step = commands.add_parser("step", help="speed of the training step on one rank")
    step.add_argument("--model", choices=("1b", "demo"), default="1b")
    step.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    step.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    step.add_argument("--steps", type=int, default=13)
    step.add_argument("--output", type=Path, help="JSON file to write; default: print only")
    step.set_defaults(run=measure_step)
    benchmark_gpu.add_command(commands)
    benchmark_loader.add_command(commands)
    benchmark_schedule.add_command(commands)
    benchmark_data_index.add_command(commands)
    benchmark_packing.add_command(commands)
    benchmark_checkpoint.add_command(commands)
    benchmark_generation.add_command(commands)
    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
