"""Plan a training run: the fastest layout on so many GPUs, why the others lose, and the overrides that `train` takes.

    python -m tools.plan 78b --gpus 512 --gpu h100-80g --rows 32768 --image-share 0.5 [--fp8 current] [--output FILE] [--settings FILE]

Rows are drawn as `scaling/drawn_rows.py` says. Times are predictions: docs/scaling.md says how far they were off where that could be checked.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from internvl_megatron.config.models import INTERNVL3
from internvl_megatron.config.overrides import with_values
from internvl_megatron.config.recipes import find_recipe
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.data.files import write_whole
from internvl_megatron.errors import ConfigError, UserError
from internvl_megatron.scaling.counts import TrainedParts, step_flops
from internvl_megatron.scaling.drawn_rows import drawn_workload
from internvl_megatron.scaling.gpus import GPUS, GPUS_PER_MACHINE, GpuKind, find_gpu
from internvl_megatron.scaling.memory import USED_SHARE
from internvl_megatron.scaling.planner import Choice, Search, search, slower_because
from internvl_megatron.scaling.predicted_step import StepTime, Workload
from tools.hand_layouts import judged_by_hand

TOKENS_OF_RUN = 200e9
"""Of InternVL3's pre-training (paper, sec. 2.2)."""
SHOWN_LOSERS = 6


def planned_config(size: str, num_gpus: int, tokens_per_row: int, rows_per_step: int | None, fp8: str) -> RunConfig:
    """Pre-training of a size, before a layout is chosen. Raises ConfigError for a size there is not."""
    known = {name.lower(): name for name in INTERNVL3}
    if size.lower() not in known:
        raise ConfigError(f"there is no size {size!r}; known are {', '.join(known)}")
    config = find_recipe(f"internvl3_{size.lower()}_pretrain", num_gpus)
    tiles = max(13, config.data.tiles_per_row * tokens_per_row // config.data.tokens_per_row)
    values: dict[str, Any] = {"data.tokens_per_row": tokens_per_row, "data.tiles_per_row": tiles, "fp8.language": fp8}
    if rows_per_step is not None:
        values["rows_per_step"] = rows_per_step
    config = with_values(config, values)
    return replace(config, data=replace(config.data, meta="given later", tokenizer="given later"))


def values_of(choice: Choice, config: RunConfig) -> dict[str, Any]:
    """What was planned, by the paths of the fields."""
    return choice.settings | {
        "data.tokens_per_row": config.data.tokens_per_row,
        "data.tiles_per_row": config.data.tiles_per_row,
        "rows_per_step": config.rows_per_step,
        "fp8.language": config.fp8.language,
    }


def overrides_of(choice: Choice, config: RunConfig) -> list[str]:
    """What `train` is given beside the recipe's name."""
    return [f"{path}={_text(value)}" for path, value in values_of(choice, config).items()]


def settings_table(choice: Choice, config: RunConfig, num_gpus: int, gpu: GpuKind) -> str:
    """A settings file for `launch`, with one table."""
    lines = [
        f"# {config.name}, planned for {num_gpus} x {gpu.name}: {choice.layout}, a step of {choice.time.total:.2f} s predicted",
        f"[any.{num_gpus}]",
    ]
    for path, value in values_of(choice, config).items():
        # As JSON but for null, which TOML does not have: launch reads the word.
        lines.append(f"{path} = {json.dumps('null' if value is None else value)}")
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def figures(time: StepTime, config: RunConfig, workload: Workload, num_gpus: int, gpu: GpuKind) -> dict[str, float]:
    """Speeds that people compare."""
    rows = config.rows_per_step
    tokens = rows * workload.tokens_per_row
    work = step_flops(
        config.model,
        num_tokens=round(tokens),
        num_tiles=round(rows * workload.tiles_per_row),
        attention_pairs=round(rows * workload.pairs_per_row),
        num_supervised_tokens=round(rows * workload.supervised_per_row),
        trained=TrainedParts.of(config),
    )
    days = TOKENS_OF_RUN / tokens * time.total / 86400
    return {
        "tokens_per_second_and_gpu": tokens / time.total / num_gpus,
        "mfu": work.total / time.total / num_gpus / gpu.bf16_flops,
        "days_of_200b_tokens": days,
        "gpu_hours_of_200b_tokens": 24 * days * num_gpus,
    }


def _parts(time: StepTime) -> str:
    """Of a step, in seconds, largest first."""
    parts = sorted(asdict(time).items(), key=lambda part: -part[1])
    return ", ".join(f"{name.replace('_', ' ')} {seconds:.2f}" for name, seconds in parts if seconds >= 0.005)


def way_of(choice: Choice) -> str:
    """What is not in the layout's name."""
    parallel = choice.config.parallel
    words = [
        f"encoder sharded over {parallel.vision_shard_ranks}"
        if parallel.vision_sharding == "sharded"
        else "encoder replicated",
        f"windows of {parallel.vision_window_rows} rows" if parallel.vision_window_rows else "one window",
    ]
    if parallel.language_recompute != "none":
        words.append("layers computed again")
    if parallel.vision_recompute != "none":
        words.append(f"encoder computed again ({parallel.vision_recompute})")
    return ", ".join(words)


def _layers(choice: Choice) -> str:
    layers = choice.plan.stage_layers
    return f"layers a stage: {layers[0]}" if len(set(layers)) == 1 else f"layers {_text(layers)}"


def report(found: Search, config: RunConfig, workload: Workload, num_gpus: int, gpu: GpuKind) -> str:
    """The best layout, why it is, why others lose."""
    best = found.choices[0]
    speed = figures(best.time, config, workload, num_gpus, gpu)
    lines = [
        f"{config.name} on {num_gpus} x {gpu.name}: {config.rows_per_step} rows of {config.data.tokens_per_row} tokens a step, "
        f"{workload.tiles_per_row:.1f} tiles a row, rows {workload.tokens_per_row / config.data.tokens_per_row:.0%} full",
        "",
        f"best: {best.layout}, {_layers(best)}, {way_of(best)}",
        f"  predicted step {best.time.total:.2f} s: {_parts(best.time)}",
        f"  {speed['tokens_per_second_and_gpu']:.0f} tokens/s and GPU, MFU {speed['mfu']:.1%} (as metrics count it: causal attention, the encoder, "
        f"supervised positions in the output layer); 200 B tokens in {speed['days_of_200b_tokens']:.1f} days, {speed['gpu_hours_of_200b_tokens']:,.0f} GPU-hours",
        f"  estimated memory of the fullest rank {best.memory.total / 1e9:.0f} of {gpu.memory_bytes / 1e9:.0f} GB",
        "",
        "others:",
    ]
    for choice in found.choices[1 : 1 + SHOWN_LOSERS]:
        because = ", ".join(
            f"{part.replace('_', ' ')} +{loss:.2f} s" for part, loss in slower_because(choice, best)[:2]
        )
        lines.append(
            f"  {choice.layout}: {choice.time.total / best.time.total - 1:+.1%} ({because}; {way_of(choice)})"
        )
    smallest = sorted(found.too_large.items(), key=lambda item: item[1])[:SHOWN_LOSERS]
    if smallest:
        lines.append(f"too large for {USED_SHARE:.0%} of the memory, whatever is computed again:")
        lines += [f"  {name}: {size / 1e9:.0f} GB" for name, size in smallest]
    by_hand = judged_by_hand(_size_of(config), config, num_gpus, workload, gpu, best)
    lines += ["made by hand:", *(f"  {one.name}: {one.outcome}" for one in by_hand)]
    lines.append(
        f"tried {found.num_tried} settings; {len(found.choices)} layouts fit, {len(found.too_large)} do not; refused by plan(): "
        + ", ".join(f"{field} {count}" for field, count in found.invalid.most_common(4))
    )
    return "\n".join(lines)


def _size_of(config: RunConfig) -> str:
    return next(
        size
        for size, model in INTERNVL3.items()
        if model.language.hidden_size == config.model.language.hidden_size
        and model.language.num_layers == config.model.language.num_layers
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Search and print; exit status 0, or 2 if the user can mend what is wrong."""
    parser = argparse.ArgumentParser(description="Find the fastest layout.")
    parser.add_argument("size", help=f"{', '.join(INTERNVL3).lower()}")
    parser.add_argument("--gpus", type=int, required=True, help="all are used")
    parser.add_argument("--gpu", default="h100-80g", help=", ".join(GPUS))
    parser.add_argument("--rows", type=int, default=32768, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--rows-per-step", type=int, help="rows of a step (default: the recipe's)")
    parser.add_argument("--image-share", type=float, default=0.5, help="of the tokens (default: %(default)s)")
    parser.add_argument("--fp8", choices=("none", "current", "blockwise"), default="none")
    parser.add_argument("--output", type=Path, help="file for the overrides, one a line: train RECIPE $(cat FILE)")
    parser.add_argument(
        "--settings", type=Path, metavar="FILE.toml", help="file for launch RECIPE --settings FILE.toml"
    )
    options = parser.parse_args(arguments)
    try:
        if options.gpus < 1 or options.rows < 1 or not 0 <= options.image_share < 0.95:
            raise UserError("--gpus and --rows are at least 1, --image-share is from 0 to below 0.95")
        gpu = find_gpu(options.gpu)
        config = planned_config(options.size, options.gpus, options.rows, options.rows_per_step, options.fp8)
        workload = drawn_workload(options.rows, config.data.tiles_per_row, options.image_share)
        found = search(config, options.gpus, gpu, workload)
    except UserError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    print(report(found, config, workload, options.gpus, gpu))
    overrides = overrides_of(found.choices[0], config)
    if options.output is not None:
        write_whole(options.output, "".join(f"{override}\n" for override in overrides))
        print(f"\ninternvl-megatron train {config.name} $(cat {options.output}) data.meta=... data.tokenizer=...")
    if options.settings is not None:
        write_whole(options.settings, settings_table(found.choices[0], config, options.gpus, gpu))
        print(f"\ninternvl-megatron launch {config.name} --nodes {max(1, options.gpus // GPUS_PER_MACHINE)} ", end="")
        print(f"--gpu {gpu.name} --settings {options.settings} data.meta=... data.tokenizer=...")
    if options.output is None and options.settings is None:
        print("\n" + "\n".join(overrides))
    return 0


if __name__ == "__main__":
    sys.exit(main())
