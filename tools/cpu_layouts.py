"""Training steps of a small model under many layouts on CPU ranks, to compare the cost model with: it predicts all from one rank's step.

    python -m tools.cpu_layouts [--ranks 2] [--rounds N] [--output benchmarks/results/layouts_cpu_DATE.json]

This machine becomes a "GPU kind" (`cpu_kind`): kernels and gloo's messages are measured alone; from steps of one rank come factors for the
language model, the vision side and the update, and from steps of one rank whose model is as narrow as can be what a layer takes
however little it computes. One-rank steps run on as many cores as layouts do. No layout's own time is looked at.
All of it takes turns, round by round, because the machine's speed drifts, and the middle counts. It takes a machine that does nothing else,
and as many cores as ranks: wall-clock seconds of ranks that share a core say nothing. Steps that waited for a core are left out.
"""

import argparse
import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from internvl_megatron.config.plan import RunPlan, plan
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
from internvl_megatron.data.rows import Row
from internvl_megatron.errors import UserError
from internvl_megatron.launcher import launch
from internvl_megatron.ranks import RankInfo
from internvl_megatron.scaling.collective_time import LINK_SHARE
from internvl_megatron.scaling.counts import parameter_counts
from internvl_megatron.scaling.gpus import GpuKind, StepFactors
from internvl_megatron.scaling.kernel_time import Kernels, Product
from internvl_megatron.scaling.predicted_step import StepTime, Workload, predict_step
from tools.dry_run import BlackTiles, DrawnRows
from tools.machine_record import machine_record

IMAGE_SHARE = 0.25
TOKENS_PER_ROW, ROWS_PER_STEP = 512, 4
TILES_PER_ROW, CHUNK_TILES = 96, 18
"""Of 4 tokens each: of a row of 32K tokens at 256 a tile. A chunk is what each of two ranks encodes of the row that is trained on,
so that pauses can be filled."""
MODEL = ModelConfig(
    vision=VisionConfig(
        hidden_size=128, num_layers=2, num_heads=4, ffn_hidden_size=512, tile_pixels=112, shuffle_factor=4
    ),
    language=LanguageConfig(
        hidden_size=384, num_layers=4, num_heads=6, num_kv_heads=2, head_size=64, ffn_hidden_size=1024, vocab_size=4096
    ),
)
"""Narrow, but with products of 0.1 to 1 GFLOP, which take a core longer than torch takes to begin them."""
NARROW = replace(
    MODEL,
    language=replace(MODEL.language, hidden_size=64, num_heads=2, head_size=16, ffn_hidden_size=64),
)
"""Its language model has as many layers and next to no widths."""


@dataclass(frozen=True)
class Trial:
    """A layout to measure."""

    name: str
    num_ranks: int
    parallel: dict[str, Any] = field(default_factory=dict)
    model: ModelConfig = MODEL

    @property
    def config(self) -> RunConfig:
        """Of a real run."""
        return RunConfig(
            name="cpu_layouts",
            model=self.model,
            # Rows are drawn, not read.
            data=DataConfig(meta="none", tokenizer="none", tokens_per_row=TOKENS_PER_ROW, tiles_per_row=TILES_PER_ROW),
            parallel=ParallelConfig(prepare_ahead=False, vision_chunk_tiles=CHUNK_TILES, **self.parallel),
            optimizer=OptimizerConfig(learning_rate=1e-4),
            rows_per_step=ROWS_PER_STEP,
            dtype="bf16",
            device="cpu",
        )


ALONE = Trial("one rank", 1)
ALONE_NARROW = Trial("one rank, narrow", 1, model=NARROW)
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
    Product(256, 384, 4096), Product(1170, 128, 512),
)  # fmt: skip
"""Products of these layouts, whole and divided."""
ELEMENTWISE_BYTES = {"norm": 4 * 512 * 384, "sum": 6 * 512 * 384, "swiglu": 6 * 512 * 1024}
"""Read and written, as the cost model counts them; two norms and two sums are in a layer, and one SwiGLU."""
PHASES = ("encode", "decode", "backprop", "update", "step")
KINDS_OF_MESSAGES = ("all-gather", "reduce-scatter", "message")
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Of malloc.h."""
MESSAGE_BYTES = (4096, 65536, 524288, 4194304, 33554432)
STEPS_OF_A_TURN = 2
DISTURBED_SHARE = 0.03
"""Of a step: longer a rank must not have waited for its core, or the step does not count."""
TRIALS_BETWEEN = 5
"""Layouts between two turns of one rank."""


def kernel_seconds(info: RankInfo) -> dict[str, Any]:
    """On one core in bf16: `products`, [forward, backward] of each shape, and `elementwise` by name."""
    import torch
    import torch.nn.functional as F

    del info
    torch.set_num_threads(1)
    keep_freed_memory()

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=torch.bfloat16)

    products = []
    for shape in SHAPES:
        tokens, inputs, outputs = (int(size) for size in shape)
        x, weight, gradient = random(tokens, inputs), random(outputs, inputs), random(tokens, outputs)
        main_gradient = torch.zeros(outputs, inputs)

        def backward(x: Any = x, weight: Any = weight, gradient: Any = gradient, main: Any = main_gradient) -> None:
            torch.mm(gradient, weight)
            main.add_(torch.mm(gradient.t(), x))

        def forward(x: Any = x, weight: Any = weight) -> None:
            torch.mm(x, weight.t())

        products.append([_fastest(forward), _fastest(backward)])
    between, scale, gate, up = random(512, 384), random(384), random(512, 1024), random(512, 1024)
    elementwise = {
        "norm": _fastest(lambda: F.rms_norm(between, (384,), scale)),
        "sum": _fastest(lambda: between + between),
        "swiglu": _fastest(lambda: F.silu(gate) * up),
    }
    return {"products": products, "elementwise": elementwise}


def _fastest(run: Callable[[], Any], times: int = 10) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return min(taken)


def message_seconds(info: RankInfo) -> dict[str, list[float]]:
    """Seconds of each kind of message between two ranks, by `MESSAGE_BYTES`, as rank 0 sees them."""
    import torch
    import torch.distributed as dist

    from internvl_megatron.device import open_device
    from internvl_megatron.ranks import joined

    torch.set_num_threads(1)
    keep_freed_memory()
    found: dict[str, list[float]] = {kind: [] for kind in KINDS_OF_MESSAGES}
    with joined(info, open_device("cpu"), 60):
        for size in MESSAGE_BYTES:
            whole = torch.zeros(size // 2, dtype=torch.bfloat16)
            half = torch.zeros(size // 4, dtype=torch.bfloat16)

            def there_and_back(whole: Any = whole) -> None:
                for sender in (0, 1):
                    if info.rank == sender:
                        dist.send(whole, 1 - info.rank)
                    else:
                        dist.recv(whole, 1 - info.rank)

            found["all-gather"].append(_fastest(partial(dist.all_gather_into_tensor, whole, half)))
            found["reduce-scatter"].append(_fastest(partial(dist.reduce_scatter_tensor, half, whole)))
            found["message"].append(_fastest(there_and_back) / 2)
    return found


def keep_freed_memory() -> None:
    """Let this process take freed memory again instead of giving it back: finding new pages takes longer than what is done with them."""
    libc = ctypes.CDLL(None)
    for parameter, size in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, 1 << 30), (M_TOP_PAD, 1 << 28)):
        assert libc.mallopt(parameter, size) == 1, "glibc's malloc takes these"


def _waited_seconds() -> float:
    """Of this thread, ready to run while its core ran others, so far."""
    return int(Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()[1]) / 1e9


def step_seconds(info: RankInfo, trial: Trial, steps: int) -> list[dict[str, float]]:
    """Body of a rank: wall-clock seconds of phases and of whole steps. Ranks of `ALONE` have a run each, side by side."""
    import torch
    import torch.distributed as dist

    from internvl_megatron.device import open_device
    from internvl_megatron.model.build import build_model
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.ranks import joined
    from internvl_megatron.train.phases import total_seconds
    from internvl_megatron.train.step import Step

    keep_freed_memory()
    if trial.num_ranks == 1:
        info = RankInfo(0, 1, 0, 1, f"{info.init_method}{info.rank}")
    torch.set_num_threads(1)
    device = open_device("cpu")
    with joined(info, device, 600):
        config = trial.config
        made = plan(config, info.world_size)
        groups = make_groups(made.layout, device, 600, made.vision_layout)
        step = Step(config, build_model(config, groups, device), groups, device)
        rows: Any = rows_of(trial, made, info.rank)
        found = []
        for _ in range(1 + steps):  # the first builds what later ones find
            dist.barrier()
            began, waited = time.perf_counter(), _waited_seconds()
            result = step.run(rows, 0)
            dist.barrier()
            whole = {"step": time.perf_counter() - began, "waited": _waited_seconds() - waited}
            found.append(total_seconds(result.spans) | whole)
    return found[1:]


@cache
def a_row() -> Row:
    """All rows are this one: the cost model's are alike too, and a layout whose ranks have unlike ones is another question."""
    return DrawnRows(ALONE.config, plan(ALONE.config, 1), IMAGE_SHARE)(0, 0).rows[0]


def rows_of(trial: Trial, made: RunPlan, rank: int) -> BlackTiles:
    """Rows of a rank's replica."""
    layout, count = made.layout, made.rows_per_replica
    replica = layout.replica(rank)
    members, pixels = layout.replica_ranks(replica), trial.model.vision.tile_pixels
    slots = range(replica, count * layout.data_size, layout.data_size)
    return BlackTiles([a_row()] * count, slots, pixels, members.index(rank), len(members), count)


@cache
def workload() -> Workload:
    """Of every row."""
    row = a_row()
    lengths = row.segment_lengths[: row.num_samples].astype(np.int64)
    return Workload(
        tokens_per_row=float(lengths.sum()),
        pairs_per_row=float((lengths**2).sum()),
        supervised_per_row=float((row.weights > 0).sum()),
        tiles_per_row=float(row.num_tiles),
    )


def cpu_kind(measured: dict[str, Any]) -> GpuKind:
    """This machine as the cost model sees one: fitted to kernels, messages and steps of one rank.

    Args:
        measured: `kernels` as `kernel_seconds` gives them, `messages` by kind and size, `alone` and `alone_narrow`, phases of a step.
    """
    unit = GpuKind("cpu", 0.0, 1.0, None, 1.0, 1.0, 1.0, "measured by tools.cpu_layouts", factors=StepFactors(1, 1, 1))
    # Two norms, two sums and one SwiGLU of a layer, as `Kernels.elementwise` counts.
    times = {"norm": 2, "sum": 2, "swiglu": 1}
    seconds = sum(times[name] * taken for name, taken in measured["kernels"]["elementwise"].items())
    moved = sum(times[name] * size for name, size in ELEMENTWISE_BYTES.items())
    kind = replace(unit, memory_bandwidth=Kernels(unit).elementwise(moved, 0).forward / seconds)
    # The seconds of a product are FLOPs over a speed, and bytes over the bandwidth that is known by now.
    free = 1e30
    of_flops = _products(Kernels(replace(unit, memory_bandwidth=free)))
    of_bytes = _products(Kernels(replace(kind, bf16_flops=free)))
    taken = np.array(measured["kernels"]["products"]).sum(axis=1)
    weights = of_flops / taken
    inverse = float(weights @ (1 - of_bytes / taken) / (weights @ weights))
    links = {name: _line(MESSAGE_BYTES, times_) for name, times_ in measured["messages"].items()}
    latency, per_byte = links["all-gather"]
    message_latency, message_per_byte = links["message"]
    kind = replace(
        kind,
        bf16_flops=1 / inverse,
        # Of two ranks a gather sends half of the bytes; a machine has one link for both kinds of messages.
        machine_bandwidth=1 / (LINK_SHARE * 2 * per_byte),
        network_bandwidth=1 / (LINK_SHARE * message_per_byte),
        collective_latency_seconds=latency,
        message_latency_seconds=message_latency,
        sum_bandwidth=1 / max(1e-15, links["reduce-scatter"][1] - per_byte),
    )
    config, alone, narrow = ALONE.config, measured["alone"], measured["alone_narrow"]
    time_ = predict_step(config, plan(config, 1), workload(), kind)
    host = narrow["decode"] / (MODEL.language.num_layers * ROWS_PER_STEP * 3)  # a forward and two in a backward pass
    factors = StepFactors(
        language=(alone["decode"] - narrow["decode"]) / time_.language,
        vision=(alone["encode"] + alone["backprop"]) / time_.vision,
        update=alone["update"] / time_.update,
    )
    return replace(kind, factors=factors, layer_host_seconds=host)


def _products(kernels: Kernels) -> np.ndarray:
    return np.array([sum(kernels.product(shape)) for shape in SHAPES])


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


def measure(ranks: Sequence[int], rounds: int) -> dict[str, Any]:
    """Everything that `predictions` takes, and steps of layouts."""
    beside = min(2, len(os.sched_getaffinity(0)))  # one-rank runs and kernels keep the machine as busy as layouts will
    trials = [trial for trial in TRIALS if trial.num_ranks in ranks]
    kernels: list[dict[str, Any]] = []
    messages: list[dict[str, list[float]]] = []
    steps: dict[str, list[dict[str, Any]]] = {}

    def run(trial: Trial) -> None:
        ranks_steps = launch(step_seconds, max(beside, trial.num_ranks), trial, STEPS_OF_A_TURN, device="cpu")
        for of_ranks in zip(*ranks_steps, strict=True):
            # Whoever is slowest: ranks of a layout wait for each other, one-rank runs stand side by side.
            slowest = max(of_ranks, key=lambda one: one["step"])
            waited = max(one["waited"] for one in of_ranks)
            steps.setdefault(trial.name, []).append(slowest | {"waited": waited})

    for _ in range(rounds):
        kernels += launch(kernel_seconds, beside, device="cpu")
        messages.append(launch(message_seconds, 2, device="cpu")[0])
        run(ALONE_NARROW)
        for place, trial in enumerate(trials):
            if place % TRIALS_BETWEEN == 0:
                run(ALONE)
            run(trial)
    return {
        "kernels": {
            "products": _middle([one["products"] for one in kernels]).tolist(),
            "elementwise": {
                name: float(_middle([one["elementwise"][name] for one in kernels])) for name in ELEMENTWISE_BYTES
            },
        },
        "messages": {kind: _middle([one[kind] for one in messages]).tolist() for kind in KINDS_OF_MESSAGES},
        "alone": _middle_phases(steps.pop(ALONE.name)),
        "alone_narrow": _middle_phases(steps.pop(ALONE_NARROW.name)),
        "trials": {trial.name: _middle_phases(steps[trial.name]) | {"num_ranks": trial.num_ranks} for trial in trials},
    }


def _middle(found: Sequence[Any]) -> Any:
    return np.median(found, axis=0)


def _middle_phases(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each phase by itself, in steps that others did not disturb, if there are any; and all steps."""
    quiet = [one for one in steps if one["waited"] <= DISTURBED_SHARE * one["step"]]
    middle = {name: float(_middle([one[name] for one in quiet or steps])) for name in PHASES}
    steps_of = {name: [one["step"] for one in found] for name, found in (("all_steps", steps), ("quiet_steps", quiet))}
    return middle | steps_of


def spread(measured: dict[str, Any]) -> float:
    """Of a layout's repeated steps: the distance of their quartiles over the middle, on average."""
    repeats = [trial["quiet_steps"] or trial["all_steps"] for trial in measured["trials"].values()]
    quartiles = [np.quantile(steps, (0.25, 0.5, 0.75)) for steps in repeats]
    return float(np.mean([(upper - lower) / middle for lower, middle, upper in quartiles]))


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
    lines.append(f"\nErrors: median {float(np.median(errors)):.1%}, largest {max(errors):.1%}.")
    for least, words in ((0.05, "5 %"), (spread(measured), f"repeated steps' spread of {spread(measured):.1%}")):
        apart = [pair for pair in pairs if trials[pair[1]]["step"] > (1 + least) * trials[pair[0]]["step"]]
        right = sum(predicted[one].total < predicted[other].total for one, other in apart)
        lines[-1] += (
            f" Of {len(apart)} pairs of layouts more than {words} apart, {right} are predicted in the right order."
        )
    steps, quiet = (sum(len(trial[name]) for trial in trials.values()) for name in ("all_steps", "quiet_steps"))
    lines[-1] += f" Of {steps} steps of layouts {quiet} were not disturbed by other work."
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; exit status 0, or 2 if the user can mend what is wrong."""
    parser = argparse.ArgumentParser(description="Steps under many layouts on CPU ranks, beside predictions.")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[2], choices=(2, 4), help="of the layouts (default: 2)"
    )
    parser.add_argument("--rounds", type=int, default=4, help="turns of every layout (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON to write")
    options = parser.parse_args(arguments)
    cores = len(os.sched_getaffinity(0))
    try:
        if options.rounds < 1:
            raise UserError(f"--rounds={options.rounds}: at least 1")
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
    measured = measure(options.ranks, options.rounds)
    if options.output is not None:
        parameters = asdict(parameter_counts(MODEL))
        record = machine_record() | {"load_average_before": load, "parameters": parameters, **measured}
        write_whole(options.output, json.dumps(record, indent=1) + "\n")
    print(table(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
