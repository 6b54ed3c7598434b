"""Plan every size on 8 to 1024 GPUs, and check each plan by dry runs: does what was estimated to fit, fit?

    python -m tools.check_plans [--sizes 8b 78b] [--gpus 64] [--no-dry-run] [--record FILE.json] [--output FILE.md]

A dry run (`tools.dry_run`, layers that keep what Transformer Engine's do, modelled) of the first, a middle and the last stage counts what
a rank holds and its peak; with `OTHER_BYTES` for what no dry run sees it must be within the memory that the planner may use. Dry runs
take two rows a stage, in windows of a row a stage, full of tiles: pixels and embeddings of the others are added as the estimate has them.
Cases that the record has already are not run again.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from internvl_megatron.config.models import INTERNVL3
from internvl_megatron.config.plan import plan
from internvl_megatron.data.files import write_whole
from internvl_megatron.errors import ConfigError, UserError
from internvl_megatron.launcher import launch
from internvl_megatron.scaling.drawn_rows import drawn_workload
from internvl_megatron.scaling.gpus import GPUS, GpuKind, find_gpu
from internvl_megatron.scaling.memory import OTHER_BYTES, USED_SHARE, rank_bytes
from internvl_megatron.scaling.planner import Choice, search
from tools.dry_run import DrawnRows, dry_config
from tools.hand_layouts import judged_by_hand
from tools.machine_record import machine_record
from tools.plan import overrides_of, planned_config, way_of

GPU_COUNTS = (8, 64, 512, 1024)
TOKENS_PER_ROW, IMAGE_SHARE = 32768, 0.5
FULL_IMAGE_SHARE = 0.75
"""Of the rows that run dry: the budget of tiles, which memory must be enough for, is what ends them."""
GIGA = 1e9


def checked(size: str, num_gpus: int, gpu: GpuKind, runs_dry: bool) -> dict[str, Any]:
    """One case: what is planned, how long that took, layouts made by hand, and dry runs."""
    config = planned_config(size, num_gpus, TOKENS_PER_ROW, None, "none")
    workload = drawn_workload(TOKENS_PER_ROW, config.data.tiles_per_row, IMAGE_SHARE)
    case: dict[str, Any] = {"size": size.upper(), "gpus": num_gpus, "gpu": gpu.name}
    began = time.process_time()
    try:
        found = search(config, num_gpus, gpu, workload)
    except ConfigError as error:
        return case | {"planner_seconds": time.process_time() - began, "refused": str(error)}
    best = found.choices[0]
    case |= {
        "planner_seconds": time.process_time() - began,
        "settings_tried": found.num_tried,
        "layout": best.layout,
        "way": way_of(best),
        "step_seconds": best.time.total,
        "estimated_bytes": best.memory.total,
        "by_hand": [asdict(one) for one in judged_by_hand(size.upper(), config, num_gpus, workload, gpu, best)],
    }
    return case | {"dry_runs": dry_runs(size, num_gpus, best)} if runs_dry else case


def recorded(file: Path) -> list[dict[str, Any]]:
    """Cases of a record; none if there is no such file yet. Raises UserError if it is none of ours."""
    if not file.exists():
        return []
    try:
        return json.loads(file.read_text(encoding="utf-8"))["cases"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--record={file}: not a record of this tool ({error}); name another file") from error


def dry_runs(size: str, num_gpus: int, choice: Choice) -> list[dict[str, Any]]:
    """Of a rank of the first, a middle and the last stage: bytes counted, and what the estimate has for the rows that were left out."""
    stages, window = choice.plan.layout.pipeline_size, choice.config.parallel.vision_window_rows
    overrides = overrides_of(choice, choice.config)
    if window is not None:
        overrides.append(f"parallel.vision_window_rows={min(window, stages)}")
    rows = min(choice.plan.rows_per_replica, 2 * stages)
    config = dry_config(f"internvl3_{size}_pretrain", num_gpus, overrides, rows)
    made = plan(config, num_gpus)
    estimated = rank_bytes(config, made)
    drawn, layout = DrawnRows(config, made, FULL_IMAGE_SHARE), made.layout
    last = layout.pipeline_size - 1
    ranks = [layout.rank(0, 0, stage) for stage in sorted({0, last // 2, last})]
    target = "tools.fake_step:dry_run"
    [runs] = launch(target, 1, config, num_gpus, ranks, drawn, "transformer_engine", device="cpu")
    return [
        {
            "rank": rank,
            "stage": layout.stage(rank),
            "rows_per_replica": made.rows_per_replica,
            "held_bytes": run.figures.held.staying,
            "peak_bytes": run.figures.peak_bytes,
            "of_other_rows_bytes": choice.memory.activations - estimated.activations,
            "seconds": run.seconds,
        }
        for rank, run in zip(ranks, runs, strict=True)
    ]


def counted_bytes(case: Mapping[str, Any]) -> float:
    """Of the fullest of the ranks that ran dry, with what no dry run sees."""
    return OTHER_BYTES + max(
        run["held_bytes"] + run["peak_bytes"] + run["of_other_rows_bytes"] for run in case["dry_runs"]
    )


def table(cases: Sequence[Mapping[str, Any]], gpu: GpuKind) -> str:
    """As Markdown."""
    limit = USED_SHARE * gpu.memory_bytes
    lines = [
        f"# Plans of every size, {gpu.name}, rows of {TOKENS_PER_ROW} tokens, half of them image tokens",
        "",
        "`python -m tools.check_plans`. Steps are predictions. GB: of the fullest rank, estimated by the planner, and counted by dry runs of",
        "three stages with what Transformer Engine's layers keep (modelled), 6 GB for what no dry run sees in both; "
        f"{limit / GIGA:.0f} GB may be used.",
        "",
        "| size | GPUs | layout | way | step s | GB estimated | GB counted | fullest stage | planner, CPU s |",
        "|---|--:|---|---|--:|--:|--:|--:|--:|",
    ]
    by_hand, ratios = [], []
    for case in cases:
        name, seconds = f"{case['size']} | {case['gpus']}", f"{case['planner_seconds']:.1f}"
        if "refused" in case:
            lines.append(f"| {name} | {case['refused']} | | | | | | {seconds} |")
            continue
        counted, stage = "", ""
        if "dry_runs" in case:
            num_bytes = counted_bytes(case)
            fullest = max(case["dry_runs"], key=lambda run: run["held_bytes"] + run["peak_bytes"])
            counted = f"{num_bytes / GIGA:.1f}" + ("" if num_bytes <= limit else ", **too much**")
            stage = str(fullest["stage"] + 1)
            ratios.append(case["estimated_bytes"] / num_bytes)
        lines.append(
            f"| {name} | {case['layout']} | {case['way']} | {case['step_seconds']:.2f} | {case['estimated_bytes'] / GIGA:.1f} | "
            f"{counted} | {stage} | {seconds} |"
        )
        by_hand += [f"| {name} | {one['name']} | {one['outcome']} |" for one in case["by_hand"]]
    if ratios:
        lines += [
            "",
            f"Estimated over counted: {min(ratios):.2f} to {max(ratios):.2f}, median {statistics.median(ratios):.2f}.",
        ]
    lines += ["", "## Layouts made by hand", "", "| size | GPUs | layout | |", "|---|--:|---|---|", *by_hand]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print; exit status 0, 1 if a plan does not fit by its dry runs, 2 if the user can mend what is wrong."""
    parser = argparse.ArgumentParser(description="Plan all sizes and check the plans by dry runs.")
    parser.add_argument("--sizes", nargs="+", default=[size.lower() for size in INTERNVL3], metavar="SIZE")
    parser.add_argument("--gpus", nargs="+", type=int, default=GPU_COUNTS, metavar="N")
    parser.add_argument("--gpu", default="h100-80g", help=", ".join(GPUS))
    parser.add_argument("--no-dry-run", action="store_true", help="plan alone: a minute or two")
    parser.add_argument("--record", type=Path, help="JSON to add to, and to take known cases from")
    parser.add_argument("--output", type=Path, help="Markdown to write")
    options = parser.parse_args(arguments)
    cases: list[dict[str, Any]] = []
    try:
        gpu = find_gpu(options.gpu)
        if any(number < 1 for number in options.gpus):
            raise UserError("--gpus: at least 1")
        for name, file in (("--record", options.record), ("--output", options.output)):
            if file is not None and not file.parent.is_dir():
                raise UserError(f"{name}={file}: {file.parent} is no folder; make it first")
        known = [] if options.record is None else recorded(options.record)
        for size in options.sizes:
            for num_gpus in options.gpus:
                wanted = {"size": size.upper(), "gpus": num_gpus, "gpu": gpu.name}
                case = next((one for one in known if wanted.items() <= one.items()), None)
                if case is None:
                    case = checked(size.lower(), num_gpus, gpu, not options.no_dry_run)
                    known.append(case)
                    if options.record is not None:
                        write_whole(options.record, json.dumps(machine_record() | {"cases": known}, indent=1) + "\n")
                    print(f"{case['size']} on {num_gpus}: {case.get('layout', 'refused')}", file=sys.stderr)
                cases.append(case)
    except UserError as error:
        print(f"check_plans: {error}", file=sys.stderr)
        return 2
    text = table(cases, gpu)
    if options.output is not None:
        write_whole(options.output, text)
    print(text, end="")
    limit = USED_SHARE * gpu.memory_bytes
    return int(any("dry_runs" in case and counted_bytes(case) > limit for case in cases))


if __name__ == "__main__":
    sys.exit(main())
