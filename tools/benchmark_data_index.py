"""The data index at scale: time and memory to build it, to open it, and to draw samples through it, as one JSON record.

    python -m tools.benchmark index [--lines N] [--folder DIR] [--output FILE]

Short lines (about 80 bytes) in one file, which is made first and removed afterwards. Building, opening and drawing each run
in a process of their own; memory is peak resident memory for building, and growth of private memory (/proc/self/smaps_rollup,
clean and dirty) for drawing, from before the data set is opened to after the last sample.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from internvl_megatron.data.dataset import Dataset
from internvl_megatron.data.jsonl_index import build_index, open_index
from internvl_megatron.data.meta import DatasetEntry
from internvl_megatron.data.mixture import Group, Mixture

NUM_DRAWS = 100_000
NUM_READS = 10_000
MANY_DATASETS, MANY_STREAMS = 300, 512
TEXTS = (b"how many?", b"which bird is it?", b"what is written in the second line of the sign?")


def write_lines(path: Path, num_lines: int) -> None:
    """A jsonl file of records with numbers of nine digits, of three lengths."""
    per_block = 30_000
    templates = [b'{"id": 000000000, "conversations": [{"from": "gpt", "value": "%s"}]}\n' % text for text in TEXTS]
    lines = [templates[number % len(templates)] for number in range(per_block)]
    block = np.frombuffer(bytearray(b"".join(lines)), dtype=np.uint8)
    starts = np.cumsum([0] + [len(line) for line in lines[:-1]]) + len(b'{"id": ')
    lengths = np.cumsum([len(line) for line in lines])
    with path.open("wb") as file:
        for first in range(0, num_lines, per_block):
            numbers = np.arange(first, first + per_block) + 100_000_000  # JSON knows no leading zeros
            for digit in range(9):
                block[starts + digit] = ord("0") + numbers // 10 ** (8 - digit) % 10
            file.write(block[: lengths[min(per_block, num_lines - first) - 1]].data)


def private_bytes() -> int:
    """Memory that belongs to this process alone."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:")))


def _entry(path: Path) -> DatasetEntry:
    return DatasetEntry("lines", path.parent, path, 1.0, False, None)


def build(path: Path) -> dict[str, Any]:
    """Make the index."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    cpu_start = time.process_time()
    index = build_index(path)
    seconds = time.perf_counter() - start
    return {
        "lines": len(index),
        "build_seconds": seconds,
        "build_cpu_seconds": time.process_time() - cpu_start,
        "build_mb_per_second": path.stat().st_size / seconds / 1e6,
        "build_peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "build_peak_growth_bytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024,
    }


def draw(path: Path) -> dict[str, Any]:
    """Open the data set and draw samples: in order of one stream, then with their records read and parsed."""
    before, start = private_bytes(), time.perf_counter()
    dataset = Dataset(_entry(path))
    open_seconds = time.perf_counter() - start
    mixture = Mixture([dataset.length], [Group("", 1, (0,))], 0, 0, 1)

    def sample() -> int:
        drawn = mixture.draw()
        return dataset.sample(0, drawn.epoch, drawn.place)[0]

    draws = _microseconds(sample, NUM_DRAWS)
    reads = _microseconds(lambda: dataset.file.read(sample()), min(NUM_READS, dataset.length))
    for _ in range(NUM_DRAWS):
        dataset.file.where(sample())
    index = open_index(path)
    looked_up = _microseconds(lambda: index.span(sample()), NUM_DRAWS)
    return {
        "open_seconds": open_seconds,
        "draw_microseconds": draws,
        "draw_and_look_up_microseconds": looked_up,
        "draw_and_read_microseconds": reads,
        "private_growth_bytes": private_bytes() - before,
    }


def mix() -> dict[str, Any]:
    """Hundreds of data sets in hundreds of streams of one process."""
    lengths = [1000 + 7919 * number % 100_003 for number in range(MANY_DATASETS)]
    groups = [Group("a", 1, tuple(range(0, MANY_DATASETS, 2))), Group("b", 3, tuple(range(1, MANY_DATASETS, 2)))]
    before, start = private_bytes(), time.perf_counter()
    mixtures = [Mixture(lengths, groups, 0, index, MANY_STREAMS) for index in range(MANY_STREAMS)]
    seconds = time.perf_counter() - start

    def next_draw(number: int) -> None:
        mixture = mixtures[number % MANY_STREAMS]
        mixture.add_tokens(mixture.draw().dataset, 100 + number % 900)

    numbers = iter(range(NUM_DRAWS))
    return {
        "datasets": MANY_DATASETS,
        "streams": MANY_STREAMS,
        "groups": len(groups),
        "open_seconds": seconds,
        "draw_microseconds": _microseconds(lambda: next_draw(next(numbers)), NUM_DRAWS),
        "private_growth_bytes": private_bytes() - before,
        "state_bytes": sum(len(json.dumps(mixture.state_dict())) for mixture in mixtures),
    }


def _microseconds(action: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        action()
    return (time.perf_counter() - start) / count * 1e6


def measure(folder: Path, num_lines: int) -> dict[str, Any]:
    """All figures of a file of so many lines, made in the folder."""
    path = folder / "lines.jsonl"
    write_lines(path, num_lines)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        built, drawn = (pool.submit(part, path).result() for part in (build, draw))
        mixed = pool.submit(mix).result()
    return {"source_bytes": path.stat().st_size, **built, **drawn, "mixture": mixed}


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command `index` of `tools.benchmark`."""
    parser = commands.add_parser("index", help="time and memory of the data index: building, opening, drawing")
    parser.add_argument("--lines", type=int, default=50_000_000)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--output", type=Path, help="JSON file to write; default: print only")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure and write one record."""
    needed = options.lines * 110
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="benchmark-index-") as name:
        free = shutil.disk_usage(name).free
        if free < needed:
            print(f"{name}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; give fewer --lines")
            return 1
        result = {
            "name": "data_index",
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
            "load_average": os.getloadavg()[0],
            "versions": {"python": platform.python_version(), "numpy": version("numpy")},
            **measure(Path(name), options.lines),
        }
    text = json.dumps(result, indent=1)
    print(text)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n")
    return 0
