"""Everything worth knowing on a machine with one GPU, in parts that can be run in calls of their own.

    python -m tools.gpu_check [PART ...] [--dry] [--limit SECONDS] [--output FOLDER] [--merge FILE ...]

A part name or its beginning (`speed`, `hf-2b`); without one all. Parts that measure no time run side by side, first; the others
one after the other. Every part has a time limit, and the end of one, good or bad, does not stop the others; `--limit` is for all
of them together, and parts it leaves no time for are said not to have run. Results go
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
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from internvl_megatron.data.files import write_whole
from tools import benchmark_gpu
from tools.gpu_cases import KEPT_TILES
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
    is_timed: bool = True
    """Whether it must have the machine for itself."""


_QUICK = ("--dry", "--steps", "1", "--warmup", "1")
_DRY_PROFILE = (
    "model.vision.hidden_size=128", "model.vision.num_layers=2", "model.vision.num_heads=2",
    "model.vision.ffn_hidden_size=256", "model.vision.tile_pixels=56", "model.vision.patch_pixels=7",
    "model.language.hidden_size=128", "model.language.num_layers=2", "model.language.num_heads=2",
    "model.language.num_kv_heads=1", "model.language.ffn_hidden_size=256", "model.language.vocab_size=512",
    "data.tokens_per_row=256", "data.tiles_per_row=16", "rows_per_step=1", "device=cpu", "--steps", "1", "--warmup", "1",
)  # fmt: skip


def _parts_of(size: str, tokens_per_row: int) -> list[Part]:
    """Ours in all number formats, and Hugging Face's."""
    name = f"{size.lower()}-{tokens_per_row // 1024}k"
    rows = ("--sizes", size, "--rows", str(tokens_per_row))
    step = ("-m", "tools.benchmark", "gpu", "step", *rows)
    # A case of the 8B took 46 s with rows of 4K and takes about 70 with 16K, of which four would be too long.
    speed = step if tokens_per_row == 4096 else (*step, "--precisions", "bf16", "fp8_current", "fp8_blockwise")
    # Up to seven processes, each of which loads a model.
    huggingface = ("-m", "tools.benchmark", "gpu", "hf", *rows, "--steps", "3", "--warmup", "2")
    parts = [
        Part(f"speed-{name}", 240, speed, (*_QUICK, "--precisions", "bf16", "fp8_current")),
        Part(f"hf-{name}", 300, huggingface, _QUICK),
    ]
    if name == "8b-4k":  # the way that `best_way` does not take, for a few layers
        kept = (*step, "--way", KEPT_TILES.name, "--precisions", "bf16", "fp8_current")
        parts.append(Part(f"kept-{name}", 180, kept, _QUICK))
    return parts


def _profile(name: str, *overrides: str) -> Part:
    """Of the 8B's step, its language model cut to a part that fits any GPU with 80 GB."""
    command = (
        "-m", "tools.profile_step", "internvl3_8b_sft", "parallel.tensor_size=1", "parallel.sequence_parallel=false",
        "parallel.vision_window_rows=null", "parallel.vision_chunk_tiles=32", "model.language.num_layers=8",
        "data.tokens_per_row=4096", "data.tiles_per_row=16", "rows_per_step=8", "dtype=bf16", *overrides,
    )  # fmt: skip
    return Part(f"profile-{name}", 180, (*command, "--drawn-rows"), _DRY_PROFILE)


_TESTS = ("-m", "pytest", "tests/gpu", "-q", "-m", "gpu", "-rs", "-p", "no:cacheprovider")
PARTS = (
    Part("environment", 60, ("-m", "internvl_megatron", "doctor"), dry=(), writes=False, is_timed=False),
    Part("tests", 300, _TESTS, dry=(), writes=False, fine=(0, NO_TESTS), is_timed=False),
    Part("curves", 420, ("-m", "tools.gpu_curves"), is_timed=False),
    Part("checkpoint", 300, ("-m", "tools.gpu_checkpoint"), is_timed=False),
    Part("speed-vision", 300, ("-m", "tools.benchmark", "gpu", "vision"), _QUICK),
    *(part for size in benchmark_gpu.SIZES for rows in benchmark_gpu.ROW_LENGTHS for part in _parts_of(size, rows)),
    _profile("bf16"),
    _profile("fp8", "fp8.language=current"),
)


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
        is_profile = part.name.startswith("profile")
        output = folder / part.name if is_profile else Path(temporary) / "record.json"
        command = [sys.executable, *part.command, *(part.dry if is_dry else ())]
        command += ["--output", str(output)] if part.writes else []
        process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True)
        try:
            code = process.wait(limit)
            status = "passed" if code in part.fine else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code, status = process.wait(), "out of time"
        written = output / "profile.json" if is_profile else output
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

    def run(part: Part) -> tuple[str, Record]:
        left = end - time.monotonic()
        ran = run_part(part, options.dry, left, options.output) if left > 0 else not_run(options.limit)
        return part.name, ran

    with ThreadPoolExecutor(max_workers=1 if options.dry else len(PARTS)) as pool:
        untimed = [pool.submit(run, part) for part in mine if not part.is_timed]
        side_by_side = (future.result() for future in as_completed(untimed))
        for name, ran in chain(side_by_side, (run(part) for part in mine if part.is_timed)):
            parts[name] = ran
            write_whole(report, json.dumps({"name": "gpu_check", "parts": parts}, indent=1) + "\n")
            write_whole(report.with_suffix(".md"), markdown(parts))
    print(f"\n{report} and .md")
    for part in mine:
        print(f"{parts[part.name]['status']:12s} {part.name}")
    return int(any(parts[part.name]["status"] != "passed" for part in mine))


if __name__ == "__main__":
    sys.exit(main())
