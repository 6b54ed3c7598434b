"""The decoupled schedule beside the best first-stage layout: critical paths of a step in CPU seconds and in FLOPs.

    python -m tools.benchmark schedule [--quick] [--shares S ...] [--steps N] [--repeats N] [--output FILE]

FLOPs are counted for the real sizes; CPU seconds are measured on four ranks (PP4 and TP2 x PP2) with narrow models in
which encoder and language model take the real share of the time. Both run on packed rows like InternVL's, and
`scaling.step_time` puts both together. docs/schedule.md tells what that leaves out.
"""

import argparse
import datetime
import json
import os
import platform
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from internvl_megatron.config.models import INTERNVL3
from internvl_megatron.config.plan import plan
from internvl_megatron.config.schema import ModelConfig
from internvl_megatron.launcher import launch
from internvl_megatron.scaling.bubble_time import BubbleWork
from internvl_megatron.scaling.counts import layer_flops, output_layer_flops, tile_flops
from internvl_megatron.scaling.drawn_rows import TILE_TOKENS, PackedRow, draw_rows
from internvl_megatron.scaling.step_time import (
    Encoders,
    RowSizes,
    StepCase,
    WindowWork,
    best_split,
    counted_steps,
    counted_window,
    critical_paths,
)
from tools.schedule_trials import (
    NARROW,
    ROWS_PER_STEP,
    SEED,
    TILES_PER_ROW,
    TOKENS_PER_ROW,
    Grid,
    Measured,
    Trial,
    measure_trials,
    narrow_config,
    narrow_steps,
    sizes_of_narrow,
)

IMAGE_SHARES = (0.0, 0.25, 0.5, 0.75)
GRIDS = (Grid(1, 4), Grid(2, 2))
COUNTED_STEPS = 256
"""Steps of the FLOPs figures, which cost nothing but counting: at 64 they still depend on the rows in the third digit."""
RATIO_SHARE = 0.5
"""Share of image tokens at which the narrow models have the ratio of the real ones."""


@dataclass(frozen=True)
class Setting:
    """What FLOPs are counted for: a real size, a layout, and rows."""

    size: str
    grid: Grid
    image_share: float
    rows_per_step: int = ROWS_PER_STEP
    """Of one replica."""
    num_replicas: int = 1
    tokens_per_row: int = TOKENS_PER_ROW
    tiles_per_row: int = TILES_PER_ROW
    padded: bool = True
    """Rows are computed at their token budget, not at their length."""


MAIN_SETTINGS = [
    Setting(size, grid, share)
    for size, grids in (("1B", GRIDS), ("78B", (*GRIDS, Grid(8, 4))))
    for grid in grids
    for share in IMAGE_SHARES
]
OTHER_SETTINGS = [
    replace(Setting(size, Grid(1, 4), 0.5), **changes)
    for size in ("1B", "78B")
    for changes in (
        {"rows_per_step": 16},
        {"rows_per_step": 32},
        {"num_replicas": 8},
        {"tokens_per_row": 2 * TOKENS_PER_ROW, "tiles_per_row": 2 * TILES_PER_ROW},
        {"padded": False},
    )
]


@cache
def drawn(image_share: float, num_rows: int, tokens_per_row: int, tiles_per_row: int) -> list[PackedRow]:
    """The benchmark's rows; measured steps run on the first of them."""
    return draw_rows(image_share, num_rows, tokens_per_row, tiles_per_row, SEED)


def row_sizes(rows: list[PackedRow], setting: Setting) -> RowSizes:
    """Rows of a step, replicas, steps."""

    def length(row: PackedRow) -> int:
        return setting.tokens_per_row if setting.padded else sum(sample.num_tokens for sample in row)

    def each(measure: Callable[[PackedRow], int]) -> np.ndarray:
        values = np.array([measure(row) for row in rows], dtype=np.int64)
        return values.reshape(-1, setting.num_replicas, setting.rows_per_step).T

    return RowSizes(
        tokens=each(length),
        attention_pairs=each(lambda row: sum(sample.num_tokens**2 for sample in row)),
        supervised=each(lambda row: sum(sample.num_supervised_tokens for sample in row)),
        tiles=each(lambda row: sum(sample.num_tiles for sample in row)),
    )


def describe_rows(rows: list[PackedRow], tokens_per_row: int) -> dict[str, float]:
    """What rows are like."""
    tiles = np.array([sum(sample.num_tiles for sample in row) for row in rows])
    tokens = np.array([sum(sample.num_tokens for sample in row) for row in rows])
    return {
        "image_share": float(TILE_TOKENS * tiles.sum() / tokens.sum()),
        "filled_share": float(tokens.mean() / tokens_per_row),
        "tiles_mean": float(tiles.mean()),
        "tiles_std": float(tiles.std()),
        "tiles_most": int(tiles.max()),
        "samples_mean": float(np.mean([len(row) for row in rows])),
    }


def work_ratios(model: ModelConfig, rows: RowSizes) -> dict[str, float]:
    """FLOPs of the vision side over those of the language model, and of the output layer over those of the layers."""
    tokens, pairs, supervised, tiles = (float(sizes.sum()) for sizes in vars(rows).values())
    layers = model.language.num_layers * layer_flops(model.language, np.array(tokens), np.array(pairs))
    output_layer = output_layer_flops(model.language, np.array(supervised))
    return {
        "vision_over_language": float(tiles * tile_flops(model) / (layers + output_layer)),
        "output_layer_over_layers": float(output_layer / layers),
    }


def counted_layout(case: StepCase, rows: RowSizes, stage_layers: tuple[int, ...]) -> dict[str, Any]:
    """What FLOPs say of one layout."""
    steps = steps_of_split(case, rows, stage_layers)
    tiles = rows.tiles.sum(axis=0)  # [D, steps]
    if case.encoders == "first_stage":
        # A row's tiles are kept from its forward to its backward pass; the first stage has as many rows under way.
        rows_kept = np.lib.stride_tricks.sliding_window_view(rows.tiles, case.pipeline_size, axis=0).sum(axis=-1)
        kept = -(-int(rows_kept.max()) // case.tensor_size)
        busiest = float(case.pipeline_size)
    else:
        num_ranks = case.pipeline_size * case.tensor_size * rows.tiles.shape[1]
        kept = -(-int(tiles.sum(axis=0).max()) // num_ranks)
        encode = np.stack([encode_of_ranks(work) for work in steps])
        busiest = float((encode.max(axis=1) / np.maximum(encode.mean(axis=1), 1.0)).mean())
    return {
        "stage_layers": stage_layers,
        "critical_path_flops": float(np.mean([work.critical_path for work in steps])),
        # With the tiles on these ranks and the rows in this order.
        "at_least_flops": float(np.mean([work.least for work in steps])),
        "vision_busiest_over_mean": busiest if tiles.any() else None,
        "tiles_kept_on_a_rank": kept,
    }


def steps_of_split(case: StepCase, rows: RowSizes, stage_layers: tuple[int, ...]) -> Sequence[WindowWork | BubbleWork]:
    """Work of every step with these layers on the stages; without further axes."""
    split = np.array(stage_layers)[:, None]
    if case.encoders == "in_bubbles":
        return counted_steps(case, rows, split)
    return counted_window(case, rows, split).steps()


def encode_of_ranks(work: WindowWork | BubbleWork) -> np.ndarray:
    """FLOPs of every rank's encoding in a step, dummy tiles included, [R]."""
    return work.encode.ravel() if isinstance(work, WindowWork) else work.encode.sum(axis=1).ravel()


def counted(setting: Setting, num_steps: int) -> dict[str, Any]:
    """The schedules in FLOPs, each with its best split; beside it the split that `plan` gives the first-stage layout."""
    packed = drawn(setting.image_share, num_steps * ROWS_PER_STEP, setting.tokens_per_row, setting.tiles_per_row)
    rows = row_sizes(packed, setting)
    model, grid = INTERNVL3[setting.size], setting.grid
    apart = StepCase(model, grid.pipeline_size, grid.tensor_size, "phases_apart")
    # Like the trainer, which fills nothing between rows of other lengths.
    decoupled = replace(apart, encoders="in_bubbles") if setting.padded else apart
    first_stage = replace(apart, encoders="first_stage")
    config = narrow_config(setting.size, grid, "first_stage")
    data = replace(config.data, tokens_per_row=setting.tokens_per_row, tiles_per_row=setting.tiles_per_row)
    planned = plan(replace(config, model=model, data=data), grid.num_ranks).stage_layers
    result = {
        "setting": {**asdict(setting), "grid": str(grid)},
        "rows": describe_rows(packed, setting.tokens_per_row),
        "work": work_ratios(model, rows),
        "decoupled": counted_layout(decoupled, rows, best_split(decoupled, rows)),
        "phases_apart": counted_layout(apart, rows, best_split(apart, rows)),
        "first_stage": counted_layout(first_stage, rows, best_split(first_stage, rows)),
        "first_stage_planned": counted_layout(first_stage, rows, planned),
    }
    names = ("decoupled", "phases_apart", "first_stage")
    ours, without_filling, best = (result[name]["critical_path_flops"] for name in names)
    return result | {
        "speed_up": best / ours,
        "speed_up_at_most": best / result["decoupled"]["at_least_flops"],
        "speed_up_phases_apart": best / without_filling,
    }


def measure(trials: list[Trial], num_steps: int, repeats: int) -> list[Measured]:
    """Run trials on real ranks; those of one grid take turns in the same processes."""
    result = []
    for grid in dict.fromkeys(trial.grid for trial in trials):
        together = [trial for trial in trials if trial.grid == grid]
        ranks = launch(measure_trials, grid.num_ranks, together, num_steps, repeats, device="cpu")
        result += [Measured(trial, [rank[index] for rank in ranks]) for index, trial in enumerate(together)]
    return result


def narrow_case(size: str, grid: Grid, encoders: Encoders, vision_cost: float = 1.0) -> StepCase:
    """A narrow model in a layout."""
    return StepCase(NARROW[size], grid.pipeline_size, grid.tensor_size, encoders, vision_cost)


def vision_cost(measured: Measured, rows: RowSizes) -> float:
    """Seconds of a FLOP of the vision side over those of a FLOP of the language model."""
    trial = measured.trial
    flops = counted_window(
        narrow_case(trial.size, trial.grid, "phases_apart"), rows, np.array(trial.stage_layers)[:, None]
    )
    seconds = measured.window
    language = (seconds.forward + seconds.backward).sum() / (flops.forward + flops.backward).sum()
    return float((seconds.encode + seconds.backprop).sum() / (flops.encode + flops.backprop).sum() / language)


def measured_cases(cases: list[tuple[str, Grid, float]], num_steps: int, repeats: int) -> list[dict[str, Any]]:
    """The schedules in CPU seconds, for (size, grid, image share).

    The first-stage layout is tried with `plan`'s split and with the best for the speeds of encoder and language model, which
    are measured before; the faster of the two counts.
    """
    rows = {(size, share): sizes_of_narrow(narrow_steps(size, share, num_steps)) for size, _, share in cases}
    models = dict.fromkeys((size, grid) for size, grid, _ in cases)

    def own_split(encoders: Encoders, size: str, grid: Grid, share: float) -> Trial:
        split = best_split(narrow_case(size, grid, encoders), rows[size, share])
        return Trial(size, share, grid, encoders, split)

    ratio_rows = {size: sizes_of_narrow(narrow_steps(size, RATIO_SHARE, 1)) for size, _ in models}
    costs = {
        (one.trial.size, one.trial.grid): vision_cost(one, ratio_rows[one.trial.size])
        for one in measure([own_split("phases_apart", *model, RATIO_SHARE) for model in models], 1, repeats)
    }
    trials = []
    for size, grid, share in cases:
        splits = {best_split(narrow_case(size, grid, "first_stage", costs[size, grid]), rows[size, share])}
        if share > 0:
            splits.add(plan(narrow_config(size, grid, "first_stage"), grid.num_ranks).stage_layers)
        trials += [own_split(encoders, size, grid, share) for encoders in ("in_bubbles", "phases_apart")]
        trials += [Trial(size, share, grid, "first_stage", split) for split in sorted(splits)]
    found: dict[tuple[Encoders, str, Grid, float], list[Measured]] = defaultdict(list)
    for one in measure(trials, num_steps, repeats):
        found[one.trial.encoders, one.trial.size, one.trial.grid, one.trial.image_share].append(one)
    return [
        measured_case(
            found["in_bubbles", size, grid, share][0],
            found["phases_apart", size, grid, share][0],
            found["first_stage", size, grid, share],
            rows[size, share],
            costs[size, grid],
        )
        for size, grid, share in cases
    ]


def measured_case(
    decoupled: Measured, apart: Measured, candidates: list[Measured], rows: RowSizes, cost: float
) -> dict[str, Any]:
    """What was measured of one case; the narrow model's FLOPs say how near counting comes."""
    trial = decoupled.trial
    first_stage = min(candidates, key=lambda one: one.critical_path.mean())
    by_step = first_stage.critical_path / decoupled.critical_path
    flops = [
        critical_paths(
            narrow_case(trial.size, trial.grid, one.trial.encoders, cost),
            rows,
            np.array(one.trial.stage_layers)[:, None],
        ).mean()
        for one in (decoupled, first_stage)
    ]
    language = decoupled.window.forward + decoupled.window.backward
    vision = decoupled.phase("encode") + decoupled.phase("backprop")
    return {
        "setting": {"size": trial.size, "grid": str(trial.grid), "image_share": trial.image_share},
        "seconds_vision_over_language": float(vision.sum() / (language.sum() * trial.grid.tensor_size)),
        "vision_cost": cost,
        "decoupled": measured_layout(decoupled)
        | {"vision_busiest_over_mean": decoupled.vision_busiest_over_mean if trial.image_share else None},
        "phases_apart": measured_layout(apart),
        "first_stage": measured_layout(first_stage),
        "first_stage_others": [measured_layout(one) for one in candidates if one is not first_stage],
        "speed_up": float(first_stage.critical_path.mean() / decoupled.critical_path.mean()),
        "speed_up_by_step": by_step.tolist(),
        "speed_up_phases_apart": float(first_stage.critical_path.mean() / apart.critical_path.mean()),
        "speed_up_of_counted_seconds": float(flops[1] / flops[0]),
    }


def measured_layout(measured: Measured) -> dict[str, Any]:
    """What was measured of one layout; means over the steps."""
    first, window = measured.ranks[0], measured.window
    before, after = window.encode.max(axis=0), window.backprop.max(axis=0)
    return {
        "stage_layers": measured.trial.stage_layers,
        "critical_path_seconds": float(measured.critical_path.mean()),
        "pipeline_seconds": float((window.critical_path - before - after).mean()),
        "encode_seconds": float(before.mean()),
        "backprop_seconds": float(after.mean()),
        "plan_seconds": float(measured.phase("plan").max(axis=0).mean()),
        "update_seconds": float(measured.phase("update").max(axis=0).mean()),
        "seen_share_of_seconds": measured.seen_share,
        "most_tiles_per_rank": [step.most_tiles_per_rank for step in first],
        "exchanged_bytes": [step.sent_bytes for step in first],
    }


def rounded(value: Any) -> Any:
    """Numbers of a record to four digits."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def table(record: dict[str, Any]) -> str:
    """The record's main cases as Markdown; layers are those of the real sizes."""
    measured = {tuple(case["setting"].values()): case for case in record["measured"]}
    titles = (
        "size", "layout", "image tokens", "reached", "vision busiest / mean", "layers, decoupled", "layers, first stage",
        "speed-up, FLOPs", "at most", "phases apart", "speed-up, CPU seconds", "by step", "phases apart",
        "vision / language, FLOPs", "seconds",
    )  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for case in record["counted"]:
        setting = case["setting"]
        seconds = measured.get((setting["size"], setting["grid"], setting["image_share"]))
        busiest = case["decoupled"]["vision_busiest_over_mean"]
        cells = [
            setting["size"],
            setting["grid"],
            f"{setting['image_share']:.0%}",
            f"{case['rows']['image_share']:.1%}",
            f"{busiest:.3f}" if busiest else "",
            *("-".join(map(str, case[name]["stage_layers"])) for name in ("decoupled", "first_stage")),
            f"{case['speed_up']:.3f}",
            f"{case['speed_up_at_most']:.3f}",
            f"{case['speed_up_phases_apart']:.3f}",
            f"{seconds['speed_up']:.2f}" if seconds else "",
            "{:.2f} - {:.2f}".format(*(f(seconds["speed_up_by_step"]) for f in (min, max))) if seconds else "",
            f"{seconds['speed_up_phases_apart']:.2f}" if seconds else "",
            f"{case['work']['vision_over_language']:.3f}",
            f"{seconds['seconds_vision_over_language']:.3f}" if seconds else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> int:
    """Count, measure, print a table and write the record."""
    cases = [(size, Grid(1, 4), share) for size in NARROW for share in options.shares]
    cases += [(size, Grid(2, 2), RATIO_SHARE) for size in NARROW]
    num_counted, num_steps, repeats = COUNTED_STEPS, options.steps, options.repeats
    if options.quick:
        cases, num_counted, num_steps, repeats = [("78B", Grid(1, 4), RATIO_SHARE)], 32, 1, 1
    record = {
        "name": "schedule",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "load_average": os.getloadavg()[0],
        "versions": {package: version(package) for package in ("torch", "megatron-core")},
        "steps": num_steps,
        "repeats": repeats,
        "counted_steps": num_counted,
        "counted": [counted(setting, num_counted) for setting in MAIN_SETTINGS],
        "counted_otherwise": [counted(setting, num_counted) for setting in OTHER_SETTINGS],
        "measured": measured_cases(cases, num_steps, repeats),
    }
    record = rounded(record)
    print(table(record))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command `schedule` of `tools.benchmark`."""
    parser = commands.add_parser(
        "schedule", help="the decoupled schedule beside the encoder on the first stage, on CPU ranks"
    )
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        choices=IMAGE_SHARES,
        default=IMAGE_SHARES,
        help="of image tokens to measure PP4 at",
    )
    parser.add_argument("--steps", type=int, default=4, help="global batches to measure each case on")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each; every pass counts at its fastest")
    parser.add_argument("--quick", action="store_true", help="measure one case, once: does it work?")
    parser.add_argument("--output", type=Path, help="JSON file to write; default: print a table only")
    parser.set_defaults(run=run)
