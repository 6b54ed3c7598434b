"""How far the cost model is off on published Megatron runs and on this project's own: the tables of docs/scaling.md.

    python -m tools.calibrate [--output FILE.md]

Of every release line and precision each row is predicted with the factor fitted to the others; of this project's own GPU runs the
factors are fitted to the language model's and the vision side's time, so that only the whole says something. Layouts that were measured
on CPU ranks (`tools.cpu_layouts`) are predicted from one rank's step.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internvl_megatron.config.plan import plan
from internvl_megatron.data.files import write_whole
from internvl_megatron.scaling.calibration import Checked, errors_of, factor_of, leave_one_out, lines
from internvl_megatron.scaling.gpus import find_gpu
from internvl_megatron.scaling.predicted_step import Workload, predict_step
from internvl_megatron.scaling.published_runs import SURVEYED
from tools import cpu_layouts
from tools.gpu_cases import Case, Way

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks/results"
OWN_RECORD = RESULTS / "gpu_check_2026-11-28.json"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.1f}%"


def published_table() -> str:
    """Errors on published runs, as Markdown: a table for each line and precision that has several rows, worst ones last."""
    parts = []
    for (line, precision), runs in lines().items():
        checked: list[Checked] = leave_one_out(runs)
        rows = [
            f"| {one.published.group} | {one.published.gpu.name} | {one.published.layout.world_size} | {one.published.layout} | "
            f"{one.published.step_seconds:.2f} | {one.without_row:.2f} | {_percent(one.row_error)} | "
            f"{_percent(one.group_error)} |"
            for one in checked
        ]
        of_rows = errors_of([one.row_error for one in checked])
        of_groups = errors_of([one.group_error for one in checked if one.group_error is not None])
        parts.append(
            f"### {line}, {precision}\nFactor {factor_of(runs):.3f}. Median and largest error without the row: "
            f"{of_rows[0]:.1%}, {of_rows[1]:.1%}; without its model and kind: {of_groups[0]:.1%}, {of_groups[1]:.1%}.\n\n"
            "| run | GPU | GPUs | layout | step s | predicted | error | without its kind |\n"
            "|---|---|--:|---|--:|--:|--:|--:|\n" + "\n".join(rows)
        )
    return "\n\n".join(parts)


def surveyed_errors() -> str:
    """Leaving one out of the rows that the survey of peers names, in a line for each precision."""
    found = []
    for (line, precision), runs in lines().items():
        runs = [run for run in runs if (run.group, run.layout.world_size) in SURVEYED]
        if line == "dgxc 25.02":
            middle, largest = errors_of([one.row_error for one in leave_one_out(runs)])
            found.append(f"{precision}: median {middle:.1%}, largest {largest:.1%} of {len(runs)} rows")
    return "Rows of dgxc 25.02 in the survey of peers, each predicted by the others alone: " + "; ".join(found) + "."


def own_runs() -> list[tuple[str, dict[str, Any], Workload, Case]]:
    """Steps measured on one H200: name, record, rows, configuration."""
    results = json.loads(OWN_RECORD.read_text(encoding="utf-8"))["parts"]["speed-8b-4k"]["record"]["results"]
    runs = []
    for result in results:
        way = Way(result["way"]["moments"], result["way"]["vision_recompute"], result["way"]["chunk_tiles"])
        case = Case(
            result["size"], result["precision"], result["tokens_per_row"], num_layers=result["layers"], way=way
        )
        num_rows, work = case.config("auto").rows_per_step, result["work"]
        sizes = ("num_tokens", "attention_pairs", "num_supervised_tokens", "num_tiles")
        workload = Workload(*(work[name] / num_rows for name in sizes))
        runs.append((result["name"], result, workload, case))
    return runs


def own_table() -> str:
    """Parts of own steps on one GPU, measured and predicted, as Markdown."""
    lines_ = ["| run | part | s | predicted | error |", "|---|---|--:|--:|--:|"]
    for name, result, workload, case in own_runs():
        config = case.config("auto")
        time = predict_step(config, plan(config, 1), workload, find_gpu("h200-141g"))
        phases = result["phase_seconds"]
        for part, seconds, predicted in (
            ("language model", phases["decode"], time.language),
            ("vision side", phases["encode"] + phases["backprop"], time.vision),
            ("update", phases["update"], time.update),
            ("step", result["step_seconds"], time.total),
        ):
            error = _percent(predicted / seconds - 1)
            lines_.append(f"| {name} | {part} | {seconds:.3f} | {predicted:.3f} | {error} |")
    return "\n".join(lines_)


def cpu_table() -> str:
    """Own steps on ranks of one CPU, every layout predicted from a step of one rank, as Markdown; of the newest record."""
    found = max(RESULTS.glob("layouts_cpu_*.json"), default=None)
    if found is None:
        return "Not measured yet: `python -m tools.cpu_layouts`."
    record = json.loads(found.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    return (
        f"{record['date']}, {record['machine']}, Python {record['python']}, {versions}, commit {record['commit']}; load average before "
        f"{record['load_average_before']:.1f}.\n\n{cpu_layouts.table(record)}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Errors of the cost model.")
    parser.add_argument("--output", type=Path, help="Markdown to write")
    options = parser.parse_args(arguments)
    text = (
        f"## Published runs\n\n{surveyed_errors()}\n\n{published_table()}\n\n## Own runs, one H200\n\n{own_table()}\n\n"
        f"## Own runs, ranks on one CPU\n\n{cpu_table()}\n"
    )
    if options.output is not None:
        write_whole(options.output, text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
