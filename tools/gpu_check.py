"""Everything worth knowing on a machine with one GPU, in parts that can be run in calls of their own.

    python -m tools.gpu_check [PART ...] [--dry] [--limit SECONDS] [--output FOLDER] [--merge FILE ...]

A part name or its beginning (`speed`, `hf-2b`); without one all. Every part has a time limit, and the end of one, good or bad, does
not stop the others; `--limit` is for all of them together, and parts it leaves no time for are said not to have run. Results go
to `gpu_check_DATE.json` and `.md` in the folder, written anew after each part; `--merge` takes over the parts of other such files,
from other calls. `--dry` runs the same on a CPU with tiny models. Exit status 1 if a part failed or did not run.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_megatron.data.files import write_whole
from tools import benchmark_gpu
from tools.machine_record import REPOSITORY, is_installed, machine_record

DEFAULT_LIMIT_SECONDS = 530.0
"""Of one call."""
NO_TESTS = 5
"""pytest's exit status where no test could run: there is none marked `gpu` that fits."""

OPTIONAL = {
    "transformer_engine": "FP8, Transformer Engine's layers and attention, and the curves and tests of these",
    "flash_attn": "flash-attn's attention; torch's own variable-length kernel takes its place",
}
"""What is left out without a package."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One check or measurement: a command with a time limit."""

    name: str
    limit_seconds: int
    command: tuple[str, ...]
    """Arguments of Python."""
    dry: tuple[str, ...] = ("--dry",)
    """What makes it dry."""
    writes: bool = True
    """Whether it takes `--output FILE` and writes a record there."""
    fine: tuple[int, ...] = (0,)
    """Exit statuses of success."""


_QUICK = ("--dry", "--steps", "1", "--warmup", "1")
_QUICK_ROWS = (*_QUICK, "--rows", "4096")


def _speed(size: str) -> Part:
    command = ("-m", "tools.benchmark", "gpu", "step", "--sizes", size)
    return Part(f"speed-{size.lower()}", 420, command, (*_QUICK_ROWS, "--precisions", "bf16", "fp8_current"))


def _huggingface(size: str) -> Part:
    return Part(f"hf-{size.lower()}", 480, ("-m", "tools.benchmark", "gpu", "hf", "--sizes", size), _QUICK_ROWS)


PARTS = (
    Part("environment", 60, ("-m", "internvl_megatron", "doctor"), dry=(), writes=False),
    Part(
        "tests",
        240,
        ("-m", "pytest", "tests/gpu", "-q", "-m", "gpu", "-rs", "-p", "no:cacheprovider"),
        dry=(),
        writes=False,
        fine=(0, NO_TESTS),
    ),
    Part("curves", 420, ("-m", "tools.gpu_curves")),
    Part("checkpoint", 240, ("-m", "tools.gpu_checkpoint")),
    Part("speed-vision", 300, ("-m", "tools.benchmark", "gpu", "vision"), _QUICK),
    *map(_speed, benchmark_gpu.SIZES),
    *map(_huggingface, benchmark_gpu.SIZES),
    Part(
        "profile",
        180,
        (
            "-m", "tools.profile_step", "--drawn-rows", "internvl3_1b_sft", "rows_per_step=2",
            "parallel.vision_window_rows=null",
        ),
        (
            "model.vision.hidden_size=128", "model.vision.num_layers=2", "model.vision.num_heads=2",
            "model.vision.ffn_hidden_size=256", "model.vision.tile_pixels=56", "model.vision.patch_pixels=7",
            "model.language.hidden_size=128", "model.language.num_layers=2", "model.language.num_heads=2",
            "model.language.num_kv_heads=1", "model.language.ffn_hidden_size=256", "model.language.vocab_size=512",
            "data.tokens_per_row=256", "data.tiles_per_row=16", "rows_per_step=1", "device=cpu", "--steps", "1",
            "--warmup", "1",
        ),
    ),
)  # fmt: skip


def chosen(names: Sequence[str]) -> list[Part]:
    """Parts by their names or how they begin, in the order above.

    Raises:
        SystemExit: no part begins like that.
    """
    for name in names:
        if not any(part.name.startswith(name) for part in PARTS):
            raise SystemExit(f"there is no part {name!r}: choose from {', '.join(part.name for part in PARTS)}")
    return [part for part in PARTS if not names or any(part.name.startswith(name) for name in names)]


def run_part(part: Part, is_dry: bool, limit_seconds: float, folder: Path) -> Record:
    """Run it, and end it with all it has started when its time is up.

    Args:
        part: what to run.
        is_dry: on the CPU.
        limit_seconds: at most, if that is less than its own limit.
        folder: for what it writes besides its record.
    """
    limit = min(part.limit_seconds, limit_seconds)
    print(f"\n=== {part.name} (at most {limit:.0f} s) ===", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as temporary:
        output = folder / "profile" if part.name == "profile" else Path(temporary) / "record.json"
        command = [sys.executable, *part.command, *(part.dry if is_dry else ())]
        command += ["--output", str(output)] if part.writes else []
        process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True)
        try:
            code = process.wait(limit)
            status = "passed" if code in part.fine else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code, status = process.wait(), "out of time"
        written = output / "profile.json" if part.name == "profile" else output
        record = json.loads(written.read_text()) if written.is_file() else None
    seconds = time.monotonic() - start
    print(f"=== {part.name}: {status}, {seconds:.0f} s ===", flush=True)
    return {
        "status": status,
        "exit_code": code,
        "seconds": round(seconds, 1),
        "limit_seconds": limit,
        "machine": machine_record(),
        "is_dry": is_dry,
        "record": record,
    }


def not_run(limit_seconds: float) -> Record:
    """A part that no time was left for."""
    return {"status": "not run", "limit_seconds": limit_seconds, "record": None}


def markdown(parts: Mapping[str, Record]) -> str:
    """All parts: where they ran, how they ended, their tables."""
    lines = [
        "| part | outcome | seconds | GPU | driver | torch | Transformer Engine | commit | date |",
        "| --- " * 9 + "|",
    ]
    for name, part in parts.items():
        machine = part.get("machine", {})
        versions = machine.get("versions", {})
        gpu = "dry, on a CPU" if part.get("is_dry") else machine.get("gpu")
        cells = [name, part["status"], part.get("seconds"), gpu, machine.get("driver"), versions.get("torch")]
        cells += [versions.get("transformer-engine"), machine.get("commit"), machine.get("date")]
        lines.append(f"| {' | '.join('' if cell is None else str(cell) for cell in cells)} |")
    for name, part in parts.items():
        text = _table(part["record"])
        if text:
            lines += ["", f"## {name}", "", text]
    return "\n".join(lines) + "\n"


def _table(record: Record | None) -> str | None:
    """Of a part's record, as its tool prints it."""
    from tools import gpu_curves, trace_analysis

    if record is None:
        return None
    tables: dict[str, Callable[[Record], str]] = {
        "gpu_vision": benchmark_gpu.table,
        "gpu_step": benchmark_gpu.table,
        "gpu_hf": benchmark_gpu.table,
        "gpu_curves": lambda record: gpu_curves.table([gpu_curves.Verdict(**one) for one in record["verdicts"]]),
        "profile": lambda record: trace_analysis.table(record, num_kernels=15),
    }
    make = tables.get(record["name"])
    return None if make is None else make(record)


def say_what_is_missing() -> None:
    """Optional packages that are absent, and what is left out without them."""
    for module, what in OPTIONAL.items():
        if not is_installed(module):
            print(f"{module} is not installed; left out: {what}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, write the report after each."""
    parser = argparse.ArgumentParser(description="Checks and measurements on a machine with one GPU.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(part.name for part in PARTS)}")
    parser.add_argument("--dry", action="store_true", help="tiny models on the CPU: do the tools work?")
    parser.add_argument(
        "--limit", type=float, default=DEFAULT_LIMIT_SECONDS, metavar="SECONDS", help="of all parts together"
    )
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks" / "results")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], metavar="FILE", help="reports of other calls")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    report = options.output / f"gpu_check_{'dry_' if options.dry else ''}{machine_record()['date']}.json"
    parts: dict[str, Record] = {}
    for path in options.merge:
        parts |= json.loads(path.read_text())["parts"]
    say_what_is_missing()
    end, mine = time.monotonic() + options.limit, chosen(options.parts)
    for part in mine:
        left = end - time.monotonic()
        parts[part.name] = run_part(part, options.dry, left, options.output) if left > 0 else not_run(options.limit)
        write_whole(report, json.dumps({"name": "gpu_check", "parts": parts}, indent=1) + "\n")
        write_whole(report.with_suffix(".md"), markdown(parts))
    print(f"\n{report} and .md")
    for part in mine:
        print(f"{parts[part.name]['status']:12s} {part.name}")
    return int(any(parts[part.name]["status"] != "passed" for part in mine))


if __name__ == "__main__":
    sys.exit(main())
