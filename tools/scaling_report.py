"""The scaling study as a report: Markdown and figures under benchmarks/scaling/, all numbers predictions of the cost model.

    python -m tools.scaling_report [--folder benchmarks/scaling]

It searches all layouts of four cases (`planner.search`) and judges the layouts found again for other rows, formats and GPUs. Takes
minutes.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

from matplotlib.figure import Figure

from internvl_megatron.config.overrides import with_values
from internvl_megatron.config.plan import plan
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.data.files import write_whole
from internvl_megatron.errors import ConfigError
from internvl_megatron.scaling.drawn_rows import drawn_workload
from internvl_megatron.scaling.gpus import GPUS
from internvl_megatron.scaling.memory import USED_SHARE
from internvl_megatron.scaling.planner import Search, judge, search
from internvl_megatron.scaling.predicted_step import StepTime, Workload
from tools.judged_layouts import H100, fastest
from tools.plan import figures, planned_config
from tools.schedule_comparison import HEAD, WAYS, cells, compared, speed

TOKENS_PER_ROW = 32768
IMAGE_SHARE = 0.5
SIZES = ("8b", "38b", "78b")
COMPARED_GPUS, COMPARED_SHARES = 1024, (0.25, 0.5, 0.75)
WEAK_SCALING_GPUS = (64, 128, 256, 512, 1024, 2048, 4096)
STRONG_SCALING_GPUS = (64, 128, 256, 512, 1024)
ROW_TOKENS = (8192, 16384, 32768, 65536, 131072)
TOKENS_PER_STEP = 512 * TOKENS_PER_ROW
LARGEST_WORLD = 98304
INTERRUPTIONS = (419, 54, 16384)
"""Unexpected ones, days and GPUs of Llama 3 405B's pre-training (arXiv 2407.21783, Tab. 5)."""


def configured(size: str, num_gpus: int) -> RunConfig:
    """Pre-training with 512 rows of 32K, before a layout is chosen."""
    return planned_config(size, num_gpus, TOKENS_PER_ROW, None, "none")


@cache
def searched(size: str, num_gpus: int) -> Search:
    """All its layouts, for half image tokens, on H100."""
    config = configured(size, num_gpus)
    workload = drawn_workload(TOKENS_PER_ROW, config.data.tiles_per_row, IMAGE_SHARE)
    print(f"searching {size} on {num_gpus} GPUs", file=sys.stderr)
    return search(config, num_gpus, H100, workload)


def of(config: RunConfig, image_share: float = IMAGE_SHARE) -> Workload:
    """Rows of a configuration."""
    return drawn_workload(config.data.tokens_per_row, config.data.tiles_per_row, image_share)


def layout(config: RunConfig, num_gpus: int) -> str:
    """In words."""
    return str(plan(config, num_gpus).layout)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """As Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def save(figure: Figure, file: Path) -> str:
    """Write a figure and say how Markdown shows it."""
    figure.savefig(file, dpi=90, bbox_inches="tight", metadata={"Software": None})
    return f"![{file.stem.replace('_', ' ')}]({file.name})"


def lines_figure(x: Sequence[float], curves: Mapping[str, Sequence[float]], x_label: str, y_label: str) -> Figure:
    """Curves over a logarithmic axis."""
    figure = Figure(figsize=(6, 3.2))
    axes = figure.add_subplot()
    for name, y in curves.items():
        axes.plot(x[: len(y)], y, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.set_ylim(bottom=0)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def parts_figure(times: dict[str, StepTime]) -> Figure:
    """What steps are made of, one bar each."""
    figure = Figure(figsize=(6.5, 0.5 * len(times) + 1.4))
    axes = figure.add_subplot()
    left = dict.fromkeys(times, 0.0)
    for part in asdict(next(iter(times.values()))):
        widths = [asdict(time)[part] / time.total for time in times.values()]
        if any(widths):
            axes.barh(list(times), widths, left=list(left.values()), label=part.replace("_", " "))
        left = {name: left[name] + width for name, width in zip(times, widths, strict=True)}
    axes.invert_yaxis()
    axes.set_xlabel("share of the step")
    axes.legend(fontsize=7, ncol=4, loc="upper center", bbox_to_anchor=(0.4, -0.25))
    return figure


def does_it_fit(folder: Path) -> str:
    """Question 1 and 2."""
    rows, times = [], {}
    for size, num_gpus in (("8b", 1024), ("38b", 1024), ("78b", 64), ("78b", 1024)):
        best = searched(size, num_gpus).choices[0]
        speed = figures(best.time, best.config, of(best.config), num_gpus, H100)
        times[f"{size.upper()} on {num_gpus}"] = best.time
        parallel = best.config.parallel
        rows.append([
            size.upper(), str(num_gpus), best.layout,
            f"encoder {parallel.vision_sharding}" + (f" over {parallel.vision_shard_ranks}" if parallel.vision_shard_ranks else "")
            + f", window {parallel.vision_window_rows or 'of all rows'}, computed again: language {parallel.language_recompute}, "
            f"encoder {parallel.vision_recompute}",
            f"{best.memory.total / 1e9:.0f}", f"{best.time.total:.1f}", f"{speed['tokens_per_second_and_gpu']:.0f}",
            f"{speed['mfu']:.1%}", f"{speed['days_of_200b_tokens']:.1f}", f"{speed['gpu_hours_of_200b_tokens']:,.0f}",
        ])  # fmt: skip
    head = (
        "size",
        "H100",
        "layout",
        "way",
        "GB",
        "step s",
        "tokens/s/GPU",
        "MFU",
        "days of 200 B tokens",
        "GPU-hours",
    )
    return table(head, rows) + "\n\n" + save(parts_figure(times), folder / "parts_of_a_step.png")


def decoupled() -> str:
    """Question 4: what all ranks' encoding costs."""
    rows = []
    for size in SIZES:
        found = searched(size, COMPARED_GPUS)
        best = found.choices[0]
        phases = fastest(found, COMPARED_GPUS, of(best.config), parallel__vision_in_bubbles=False)
        text = fastest(found, COMPARED_GPUS, of(best.config, 0.0))
        assert phases is not None and text is not None, "layouts that fit with images fit without"
        rates = [
            of(best.config, share).tokens_per_row / time.total for share, time in ((0.5, best.time), (0.0, text[1]))
        ]
        rows.append([
            size.upper(), f"{best.layout}: {best.time.total:.2f} s", f"{phases[1].total:.2f} s", f"{rates[0] / rates[1]:.0%}",
        ])  # fmt: skip
    return table(("size", "decoupled", "phases apart", "tokens/s over text alone"), rows)


def other_ways() -> str:
    """Question 4: against the encoder in the first stage, and on GPUs of its own."""
    rows, by_share = [], []
    for size in SIZES:
        found, config = searched(size, COMPARED_GPUS), configured(size, COMPARED_GPUS)
        for share in COMPARED_SHARES:
            ways = compared(config, found, COMPARED_GPUS, of(config, share))
            best = ways["decoupled"]
            assert best is not None, "the layouts were found to fit"
            tokens = of(config, share).tokens_per_row
            if share == IMAGE_SHARE:
                rows += [[size.upper(), *cells(name, way, best, tokens)] for name, way in ways.items()]
            apart = ways["disaggregated"]
            by_share.append([
                size.upper(), f"{share:.0%}", *(speed(way, best, tokens) for way in ways.values()),
                str(apart.num_encoding) if apart else "",
            ])  # fmt: skip
    head = ("size", "image tokens", *WAYS, "encoder ranks")
    return table(("size", *HEAD), rows) + "\n\nTokens/s/GPU (decoupled over it):\n\n" + table(head, by_share)


def weak_scaling(folder: Path) -> str:
    """A row a GPU, the layout of 64 GPUs' best, from 64 to 4096 GPUs, and far more."""
    curves: dict[str, list[float]] = {}
    rows = []
    best = searched("78b", 64).choices[0]
    for precision in ("bf16", "fp8"):
        speeds = []
        for num_gpus in (*WEAK_SCALING_GPUS, LARGEST_WORLD):
            values = {"rows_per_step": num_gpus, "fp8.language": "none" if precision == "bf16" else "current"}
            config = with_values(best.config, values)
            _, time = judge(config, num_gpus, of(config), H100)
            speeds.append(figures(time, config, of(config), num_gpus, H100)["tokens_per_second_and_gpu"])
        rows.append([precision, *(f"{speed:.0f} ({speed / speeds[0]:.1%})" for speed in speeds)])
        curves[precision] = speeds[:-1]
    head = ("tokens/s/GPU", *map(str, WEAK_SCALING_GPUS), str(LARGEST_WORLD))
    figure = lines_figure(WEAK_SCALING_GPUS, curves, "H100", "tokens/s/GPU")
    said = (
        f"Layout {best.layout} on 64 and copies of it, a row a GPU. Published rows lose more: from 64 to 2048 H100 the Llama 70B keeps "
        "98.4 % in bf16 and 95.2 % in FP8 (dgxc-benchmarking v25.02). Slow ranks and busy switches are not in this model."
    )
    return f"{said}\n\n{table(head, rows)}\n\n{save(figure, folder / 'weak_scaling.png')}"


def strong_scaling() -> str:
    """512 rows a step, the layouts found for 64 and 1024 GPUs."""
    choices = {name: searched("78b", number).choices[0].config for name, number in (("64", 64), ("1024", 1024))}
    rows = []
    for name, config in choices.items():
        cells = []
        for num_gpus in STRONG_SCALING_GPUS:
            try:
                memory, time = judge(config, num_gpus, of(config), H100)
            except ConfigError:
                cells.append("")
                continue
            fits = memory.total <= USED_SHARE * H100.memory_bytes
            cells.append(f"{time.total:.1f} s" + ("" if fits else " (does not fit)"))
        rows.append([f"best of {name}", *cells])
    return table(("512 rows a step", *map(str, STRONG_SCALING_GPUS)), rows)


def sweeps(folder: Path) -> str:
    """Image share, row length, GPUs and formats, for the 78B on 1024 GPUs."""
    found = searched("78b", 1024)
    base, parts = found.choices[0].config, []
    rows, text_rate = [], 0.0
    for share in (0.0, 0.25, 0.5, 0.75):
        judged = fastest(found, 1024, of(base, share))
        assert judged is not None, "the layouts were found to fit"
        rate = figures(judged[1], judged[0], of(base, share), 1024, H100)
        text_rate = text_rate or rate["tokens_per_second_and_gpu"]
        rows.append([
            f"{share:.0%}", layout(judged[0], 1024), f"{judged[1].total:.2f}", f"{rate['tokens_per_second_and_gpu']:.0f}",
            f"{rate['tokens_per_second_and_gpu'] / text_rate:.0%}", f"{rate['mfu']:.1%}",
        ])  # fmt: skip
    parts.append(table(("image tokens", "layout", "step s", "tokens/s/GPU", "of text alone", "MFU"), rows))
    rows, speeds = [], []
    for tokens in ROW_TOKENS:
        tiles = max(13, base.data.tiles_per_row * tokens // TOKENS_PER_ROW)
        workload = drawn_workload(tokens, tiles, IMAGE_SHARE)
        judged = fastest(
            found, 1024, workload, data__tokens_per_row=tokens, data__tiles_per_row=tiles, rows_per_step=TOKENS_PER_STEP // tokens
        )  # fmt: skip
        if judged is None:
            rows.append([str(tokens), "none of the layouts fits", "", ""])
            continue
        speed = figures(judged[1], judged[0], workload, 1024, H100)["tokens_per_second_and_gpu"]
        speeds.append(speed)
        rows.append([str(tokens), layout(judged[0], 1024), f"{judged[1].total:.2f}", f"{speed:.0f}"])
    parts.append(table(("tokens a row", "layout", "step s", "tokens/s/GPU"), rows))
    parts.append(
        save(lines_figure(ROW_TOKENS, {"78B": speeds}, "tokens a row", "tokens/s/GPU"), folder / "row_length.png")
    )
    rows = []
    for gpu in GPUS.values():
        for precision in ("none", "current"):
            if precision != "none" and gpu.fp8_flops is None:
                continue
            judged = fastest(found, 1024, of(base), gpu, fp8__language=precision)
            cells = [gpu.name, "bf16" if precision == "none" else "fp8"]
            if judged is None:
                rows.append([*cells, "none of the layouts fits", "", "", ""])
                continue
            speed = figures(judged[1], judged[0], of(base), 1024, gpu)
            rows.append([
                *cells, layout(judged[0], 1024), f"{judged[1].total:.2f}", f"{speed['tokens_per_second_and_gpu']:.0f}",
                f"{speed['days_of_200b_tokens']:.1f}",
            ])  # fmt: skip
    parts.append(table(("GPU", "products", "layout", "step s", "tokens/s/GPU", "days of 200 B tokens"), rows))
    return "\n\n".join(parts)


def too_many() -> str:
    """What would break on 100,000 GPUs, as far as this model says something."""
    config = searched("78b", 64).choices[0].config
    count, days, gpus = INTERRUPTIONS
    minutes = days * 24 * 60 / count * gpus / LARGEST_WORLD
    made = plan(with_values(config, {"rows_per_step": LARGEST_WORLD}), LARGEST_WORLD)
    least = made.layout.data_size * made.layout.pipeline_size
    return (
        f"{made.layout.data_size} copies of the layout above. Rows: as many as stages for each copy are {least:,} a step, "
        f"{least * TOKENS_PER_ROW / 1e9:.1f} B tokens, {least * TOKENS_PER_ROW / TOKENS_PER_STEP:.0f} times the recipe's; "
        "fewer rows leave pipelines empty. "
        f"Failures: Llama 3 405B had {count} unexpected interruptions in {days} days on {gpus:,} GPUs (arXiv 2407.21783, Tab. 5); as "
        f"many for each GPU make one every {minutes:.0f} minutes here. Messages: sums of "
        "gradients are rings here, whose latency grows with the logarithm of the machines; the last column of weak scaling has "
        "that, and no slow card, switch or rank. Not modelled: starting up (`new_group` of every rank for every group), host "
        "agreement over all ranks in every step, one-rank gathers of checkpoints."
    )


ASSUMED = """Assumed, and not checked by a measurement of this project:
* one GPU was measured (one H200, 8B, rows of 4K): its factors on kernels are taken for all sizes, layouts and kinds of GPUs; the 6B encoder
  has the language model's;
* links reach 80 % of their bandwidth, machines have eight GPUs on rails, switches do not block; no slow rank, no failures;
* messages of tensor parallelism are not hidden at all, all-to-all of context parallelism neither, half of the interleaved schedule's
  messages are; tiles travel ahead for nothing;
* rows are drawn and packed first_fit (`internvl_megatron/scaling/drawn_rows.py`), which leaves 5 to 15 % of them empty where images are in them (tokens/s
  count what is in the rows); all are of average cost; replicas trade rows, so none waits for another;
* memory is `scaling/memory.py`'s estimate, checked against one measurement and against dry runs (`plans.md`); what Transformer Engine's layers keep is
  modelled from its source, 6 GB are a guess for what no dry run sees;
* rows are equal in the schedules that are run event by event, with as many tiles as the mean has: a replica or a first stage that encodes its own rows
  waits for none with more tiles, which favours the first stage;
* an encoder in the first stage: each of its ranks has all of it, and of a row's tiles as many as the others, rounded up; layers are divided to make
  room for it; it sends nothing;
* encoder ranks: whole machines of them, each with all of the encoder and the same part of the tiles of a row of all pipelines, fractions of tiles
  too; the other GPUs are whole replicas with as many rows each (so a step may have up to 6 % more or fewer), in any layout that fits; embeddings and
  gradients travel beside all work. Fractions, rows and messages favour them. The trainer has none;
* reading data, evaluation and checkpoints are left out.
How far the model was off where it could be checked: docs/scaling.md."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write report and figures."""
    parser = argparse.ArgumentParser(description="The scaling study.")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/scaling"))
    folder = parser.parse_args(arguments).folder
    folder.mkdir(parents=True, exist_ok=True)
    found, small = searched("78b", 64), searched("78b", 64).choices[0]
    days = figures(small.time, small.config, of(small.config), 64, H100)["days_of_200b_tokens"]
    text = f"""# Scaling study

All numbers are predictions (`python -m tools.scaling_report`); rows of 32K tokens, half of them image tokens, 512 rows a step, H100 of
80 GB and bf16, unless it says otherwise.

{ASSUMED}

## Will the 78B fit on 64 H100, in which layout, and how long do 200 B tokens take?
By the estimate of memory {len(found.choices)} layouts fit on 64 H100, {len(found.too_large)} do not. The fastest is {small.layout}: {days:.0f} days.

{does_it_fit(folder)}

## What does the decoupled schedule buy at {COMPARED_GPUS} GPUs?
{decoupled()}

A layout of one stage has no pauses, and with chunks or a sharded encoder (the 6B does not fit otherwise) they are not filled: there decoupled and
phases apart are the same.

Beside it the other ways to run the encoder, each in its best layout on as many GPUs. Layouts are ranked by the closed form of all
tables here; of the best the schedule is run event by event, with messages between stages, and to and from encoders, as events (`internvl_megatron/scaling/event_time.py`).
The number of encoder ranks is the best of those that leave whole replicas.

{other_ways()}

Bubbles: time in the pipeline in which GPUs wait and no message is the reason. Busiest over mean: work of the busiest GPU above that of the mean.
Exposed: time in which a message between ranks holds a GPU up; those of tensor and context parallelism are in the passes. All three are of the GPUs' time, encoder ranks
counted.

## Weak scaling
{weak_scaling(folder)}

## Strong scaling
{strong_scaling()}

## Image share, row length, formats and GPUs: 78B on 1024 GPUs
{sweeps(folder)}

## What would break on 100,000 GPUs
{too_many()}
"""
    write_whole(folder / "README.md", text)
    print(f"{folder / 'README.md'} and its figures are written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
