"""Training steps of a small model under many layouts on CPU ranks, to compare the cost model with: it predicts all from one rank's step.

    python -m tools.cpu_layouts [--ranks 2] [--repeats N] [--output benchmarks/results/layouts_cpu_DATE.json]

This machine becomes a "GPU kind" (`cpu_kind`): speed of products by shape and of gloo's messages are measured alone, and factors for the
language model, the vision side and the update are fitted to a step of one rank, while a second such run keeps the machine as busy as it
will be. Then steps of every layout are timed, layouts taking turns; the fastest of each counts. No layout's own time is looked at.
It takes a machine that does nothing else, and as many cores as ranks: wall-clock seconds of ranks that share a core say nothing.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

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
from internvl_megatron.data.files import write_whole
from internvl_megatron.errors import UserError
from internvl_megatron.launcher import launch
from internvl_megatron.ranks import RankInfo
from internvl_megatron.scaling.collective_time import LINK_SHARE
from internvl_megatron.scaling.counts import parameter_counts
from internvl_megatron.scaling.gpus import GpuKind, StepFactors
from internvl_megatron.scaling.kernel_time import Kernels, Product
from internvl_megatron.scaling.predicted_step import StepTime, Workload, predict_step
from tools.dry_run import DrawnRows
from tools.machine_record import machine_record

IMAGE_SHARE = 0.5
TOKENS_PER_ROW, ROWS_PER_STEP = 512, 4
TILES_PER_ROW = 96
"""Of 4 tokens each: of a row of 32K tokens at 256 a tile."""
MODEL = ModelConfig(
    vision=VisionConfig(
        hidden_size=128, num_layers=2, num_heads=4, ffn_hidden_size=512, tile_pixels=112, shuffle_factor=4
    ),
    language=LanguageConfig(
        hidden_size=384, num_layers=8, num_heads=6, num_kv_heads=2, head_size=64, ffn_hidden_size=1024, vocab_size=8192
    ),
)
"""Narrow, but with products of 0.1 to 1 GFLOP, which take a core longer than torch takes to begin them."""


@dataclass(frozen=True)
class Trial:
    """A layout to measure."""

    name: str
    num_ranks: int
    parallel: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> RunConfig:
        """Of a real run."""
        return RunConfig(
            name="cpu_layouts",
            model=MODEL,
            # Rows are drawn, not read.
            data=DataConfig(meta="none", tokenizer="none", tokens_per_row=TOKENS_PER_ROW, tiles_per_row=TILES_PER_ROW),
            parallel=ParallelConfig(prepare_ahead=False, **self.parallel),
            optimizer=OptimizerConfig(learning_rate=1e-4),
            rows_per_step=ROWS_PER_STEP,
            dtype="bf16",
            device="cpu",
        )


ALONE = Trial("one rank", 1)
_TP2 = {"tensor_size": 2, "sequence_parallel": True}
TRIALS = (
    Trial("DP2", 2),
    Trial("DP2, encoder sharded", 2, {"vision_sharding": "sharded"}),
    Trial("TP2", 2, {"tensor_size": 2}),
    Trial("TP2+SP", 2, _TP2),
    Trial("CP2", 2, {"context_size": 2}),
    Trial("PP2", 2, {"pipeline_size": 2}),
    Trial("PP2, windows of 2 rows", 2, {"pipeline_size": 2, "vision_window_rows": 2}),
    Trial("PP2, computed again", 2, {"pipeline_size": 2, "language_recompute": "full"}),
    Trial("PP2xVPP2", 2, {"pipeline_size": 2, "virtual_size": 2}),
    Trial("DP4", 4),
    Trial("TP2+SPxDP2", 4, _TP2),
    Trial("TP2+SPxPP2", 4, _TP2 | {"pipeline_size": 2}),
    Trial("PP4", 4, {"pipeline_size": 4}),
)

SHAPES = (
    Product(512, 384, 640), Product(512, 384, 384), Product(512, 384, 2048), Product(512, 1024, 384),
    Product(512, 384, 1024), Product(512, 512, 384), Product(256, 384, 2048), Product(256, 1024, 384),
    Product(256, 384, 8192), Product(1040, 128, 512),
)  # fmt: skip
"""Products of these layouts, whole and divided."""
MESSAGE_BYTES = (4096, 65536, 524288, 4194304)


def product_seconds(info: RankInfo) -> list[list[float]]:
    """Seconds of [forward, backward] of each shape, in bf16 on one core, at its fastest."""
    import torch

    del info
    torch.set_num_threads(1)
    found = []
    for shape in SHAPES:
        tokens, inputs, outputs = (int(size) for size in shape)
        x, weight, gradient = (
            torch.randn(*size, dtype=torch.bfloat16)
            for size in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
        )
        main_gradient = torch.zeros(outputs, inputs)

        def backward(x: Any = x, weight: Any = weight, gradient: Any = gradient, main: Any = main_gradient) -> None:
            torch.mm(gradient, weight)
            main.add_(torch.mm(gradient.t(), x))

        def forward(x: Any = x, weight: Any = weight) -> None:
            torch.mm(x, weight.t())

        found.append([_fastest(forward), _fastest(backward)])
    return found


def _fastest(run: Any, times: int = 15) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return min(taken)


def message_seconds(info: RankInfo) -> dict[str, list[float]]:
    """Seconds of an all-gather and of a message of `MESSAGE_BYTES` between two ranks, as rank 0 sees them."""
    import torch
    import torch.distributed as dist

    from internvl_megatron.device import open_device
    from internvl_megatron.ranks import joined

    torch.set_num_threads(1)
    found: dict[str, list[float]] = {"all-gather": [], "message": []}
    with joined(info, open_device("cpu"), 60):
        for size in MESSAGE_BYTES:
            whole, half = torch.empty(size, dtype=torch.uint8), torch.empty(size // 2, dtype=torch.uint8)

            def gather(whole: Any = whole, half: Any = half) -> None:
                dist.all_gather_into_tensor(whole, half)

            def there_and_back(whole: Any = whole) -> None:
                for sender in (0, 1):
                    if info.rank == sender:
                        dist.send(whole, 1 - info.rank)
                    else:
                        dist.recv(whole, 1 - info.rank)

            found["all-gather"].append(_fastest(gather))
            found["message"].append(_fastest(there_and_back) / 2)
    return found


def step_seconds(info: RankInfo, trials: Sequence[Trial], repeats: int) -> list[list[dict[str, float]]]:
    """Body of a rank: wall-clock seconds of phases and of whole steps, by trial and repeat; trials take turns."""
    import torch
    import torch.distributed as dist

    from internvl_megatron.device import open_device
    from internvl_megatron.model.build import build_model
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.ranks import joined
    from internvl_megatron.train.phases import total_seconds
    from internvl_megatron.train.step import Step

    torch.set_num_threads(1)
    device = open_device("cpu")
    with joined(info, device, 600):

        def prepared(trial: Trial) -> tuple[Step, Any]:
            config = trial.config
            made = plan(config, info.world_size)
            groups = make_groups(made.layout, device, 600, made.vision_layout)
            step = Step(config, build_model(config, groups, device), groups, device)
            return step, DrawnRows(config, made, IMAGE_SHARE)(made.layout.replica(info.rank), info.rank)

        def run_once(step: Step, rows: Any) -> dict[str, float]:
            dist.barrier()
            began, began_cpu = time.perf_counter(), time.process_time()
            result = step.run(rows, 0)
            dist.barrier()
            whole, cpu = time.perf_counter() - began, time.process_time() - began_cpu
            return total_seconds(result.spans) | {"step": whole, "cpu": cpu}

        all_prepared = [prepared(trial) for trial in trials]
        for one in all_prepared:
            run_once(*one)  # the first step builds what later ones find
        turns = [[run_once(*one) for one in all_prepared] for _ in range(repeats)]
    return [list(of_trial) for of_trial in zip(*turns, strict=True)]


@cache
def workload() -> Workload:
    """Of the rows that are trained on, the same in all layouts."""
    rows = DrawnRows(ALONE.config, plan(ALONE.config, 1), IMAGE_SHARE)(0, 0).rows
    count = len(rows)
    return Workload(
        tokens_per_row=sum(int(row.segment_lengths[: row.num_samples].sum()) for row in rows) / count,
        pairs_per_row=sum(int((row.segment_lengths[: row.num_samples].astype(np.int64) ** 2).sum()) for row in rows)
        / count,
        supervised_per_row=sum(int((row.weights > 0).sum()) for row in rows) / count,
        tiles_per_row=sum(row.num_tiles for row in rows) / count,
    )


def cpu_kind(measured: dict[str, Any]) -> GpuKind:
    """This machine as the cost model sees one: fitted to products, messages and a step of one rank.

    Args:
        measured: `products` [shape, (forward, backward)], `messages` by kind and size, `alone` phases of a step.
    """
    unit = GpuKind("cpu", 0.0, 1.0, None, 1.0, 1.0, 1.0, "measured by tools.cpu_layouts")
    # The seconds of a product are a sum of FLOPs over a speed and bytes over another: linear in both inverses.
    free = 1e30
    by_flops, by_bytes = (Kernels(replace(unit, **{name: free})) for name in ("memory_bandwidth", "bf16_flops"))
    table = np.array([[sum(kernels.product(shape)) for kernels in (by_flops, by_bytes)] for shape in SHAPES])
    seconds = np.array(measured["products"]).sum(axis=1)
    inverse = _fitted(table / seconds[:, None], np.ones(len(SHAPES)))
    links = {name: _line(MESSAGE_BYTES, taken) for name, taken in measured["messages"].items()}
    latency, per_byte = links["all-gather"]
    message_latency, message_per_byte = links["message"]
    kind = replace(
        unit,
        bf16_flops=1 / inverse[0],
        memory_bandwidth=1 / inverse[1],
        # Of two ranks a gather sends half of the bytes; a machine has one link for both kinds of messages.
        machine_bandwidth=1 / (LINK_SHARE * 2 * per_byte),
        network_bandwidth=1 / (LINK_SHARE * message_per_byte),
        collective_latency_seconds=latency,
        message_latency_seconds=message_latency,
        factors=StepFactors(1.0, 1.0, 1.0),
    )
    config, alone = ALONE.config, measured["alone"]
    time_ = predict_step(config, plan(config, 1), workload(), kind)
    factors = StepFactors(
        language=alone["decode"] / time_.language,
        vision=(alone["encode"] + alone["backprop"]) / time_.vision,
        update=alone["update"] / time_.update,
    )
    return replace(kind, factors=factors)


def _fitted(table: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """Two positive numbers, least squares; the second is next to nothing where it would be negative."""
    first, second = np.linalg.lstsq(table, wanted, rcond=None)[0]
    if min(first, second) > 0:
        return float(first), float(second)
    return float((table[:, 0] @ wanted) / (table[:, 0] @ table[:, 0])), 1e-15


def _line(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Seconds without bytes, and for each byte, with relative errors least."""
    x, y = np.array(sizes, dtype=float), np.array(seconds)
    latency, per_byte = np.linalg.lstsq(np.stack([1 / y, x / y], axis=1), np.ones(len(x)), rcond=None)[0]
    return max(float(latency), 0.0), float(per_byte)


def predictions(measured: dict[str, Any]) -> dict[str, StepTime]:
    """By name of the trials measured."""
    kind, found = cpu_kind(measured), {}
    for trial in TRIALS:
        if trial.name in measured["trials"]:
            config = trial.config
            found[trial.name] = predict_step(config, plan(config, trial.num_ranks), workload(), kind)
    return found


def measure(ranks: Sequence[int], repeats: int) -> dict[str, Any]:
    """Everything that `predictions` takes, and what it predicts."""
    [products] = launch(product_seconds, 1, device="cpu")
    messages = launch(message_seconds, 2, device="cpu")[0]
    # A run of its own on every core, as layouts will have them.
    beside = min(2, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(beside) as pool:
        runs = [pool.submit(launch, step_seconds, 1, [ALONE], repeats, device="cpu") for _ in range(beside)]
        alone = [run.result()[0][0] for run in runs]
    trials: dict[str, Any] = {}
    for count, chunks in product(ranks, (1, 2)):
        # Megatron Core knows one number of chunks in a process.
        together = [
            trial for trial in TRIALS if (trial.num_ranks, trial.config.parallel.virtual_size) == (count, chunks)
        ]
        found = launch(step_seconds, count, together, repeats, device="cpu") if together else []
        for index, trial in enumerate(together):
            repeats_of = [rank[index] for rank in found]
            fastest = min(range(repeats), key=lambda one: repeats_of[0][one]["step"])
            trials[trial.name] = {
                "num_ranks": count,
                "step": repeats_of[0][fastest]["step"],
                "cpu": [rank[fastest]["cpu"] for rank in repeats_of],
                "all_steps": [one["step"] for one in repeats_of[0]],
            }
    middle = {name: float(np.median([one[name] for run in alone for one in run])) for name in alone[0][0]}
    return {"products": products, "messages": messages, "alone": middle, "trials": trials}


def table(measured: dict[str, Any]) -> str:
    """Markdown: layouts from fastest to slowest, as measured."""
    predicted, trials = predictions(measured), measured["trials"]
    names = sorted(trials, key=lambda name: trials[name]["step"])
    places = {name: place for place, name in enumerate(sorted(predicted, key=lambda one: predicted[one].total), 1)}
    lines = ["| layout | ranks | s | predicted | error | place | predicted |", "|---|--:|--:|--:|--:|--:|--:|"]
    for place, name in enumerate(names, 1):
        taken, foretold = trials[name]["step"], predicted[name].total
        lines.append(
            f"| {name} | {trials[name]['num_ranks']} | {taken:.3f} | {foretold:.3f} | {100 * (foretold / taken - 1):+.1f}% | "
            f"{place} | {places[name]} |"
        )
    errors = [abs(predicted[name].total / trials[name]["step"] - 1) for name in names]
    pairs = [(one, other) for index, one in enumerate(names) for other in names[index + 1 :]]
    apart = [(one, other) for one, other in pairs if trials[other]["step"] > 1.05 * trials[one]["step"]]
    right = sum(predicted[one].total < predicted[other].total for one, other in apart)
    lines.append(
        f"\nErrors: median {float(np.median(errors)):.1%}, largest {max(errors):.1%}. Of {len(apart)} pairs of layouts more than 5 % apart, "
        f"{right} are predicted in the right order."
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; exit status 0, or 2 if the user can mend what is wrong."""
    parser = argparse.ArgumentParser(description="Steps under many layouts on CPU ranks, beside predictions.")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[2], choices=(2, 4), help="of the layouts (default: 2)"
    )
    parser.add_argument("--repeats", type=int, default=8, help="steps of each layout (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON to write")
    options = parser.parse_args(arguments)
    cores = len(os.sched_getaffinity(0))
    try:
        if options.repeats < 1:
            raise UserError(f"--repeats={options.repeats}: at least 1")
        if options.output is not None and not options.output.parent.is_dir():
            raise UserError(f"--output={options.output}: {options.output.parent} is no folder; make it first")
        if max(options.ranks) > cores:
            raise UserError(
                f"--ranks={max(options.ranks)}: this machine has {cores} cores; ranks that share one are not timed"
            )
    except UserError as error:
        print(f"cpu_layouts: {error}", file=sys.stderr)
        return 2
    load = os.getloadavg()[0]
    measured = measure(options.ranks, options.repeats)
    if options.output is not None:
        parameters = asdict(parameter_counts(MODEL))
        record = machine_record() | {"load_average_before": load, "parameters": parameters, **measured}
        write_whole(options.output, json.dumps(record, indent=1) + "\n")
    print(table(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
