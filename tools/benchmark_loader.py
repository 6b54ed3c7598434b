"""The loader beside Pillow alone: how much of the speed at which Pillow decodes and resizes photographs is left.

    python -m tools.benchmark loader [--images FOLDER] [--workers N] [--seconds S] [--rounds N] [--output FILE]

Both decode the same files, cut into tiles of 448 pixels, in as many processes: Pillow alone decodes, converts and resizes,
grid and thumbnail; the loader besides reads records, renders and packs samples, cuts, and hands arrays to the trainer's
process. They take turns, and the median of the rounds counts. Without `--images`: the two photographs of scikit-learn.
"""

import argparse
import datetime
import json
import mmap
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from PIL import Image

from internvl_megatron.config.schema import DataConfig
from internvl_megatron.data.dataset import load_datasets
from internvl_megatron.data.images import image_size
from internvl_megatron.data.loader import ReplicaLoader
from internvl_megatron.data.records import SampleSettings
from internvl_megatron.data.stream import SampleStream
from internvl_megatron.data.tiling import Grid, choose_grid
from internvl_megatron.data.tokenizer import load_tokenizer

TILE_PIXELS = 448
TOKENS_PER_TILE = 256
ROWS_PER_STEP = 8
ENDINGS = {".jpg", ".jpeg", ".png", ".webp"}


def photographs(folder: Path | None) -> list[Path]:
    """Image files of a folder and those below it; without one those of scikit-learn."""
    if folder is None:
        from sklearn.datasets import load_sample_images

        return [Path(name) for name in load_sample_images().filenames]
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
    if not found:
        raise SystemExit(f"{folder}: has no image file ({', '.join(sorted(ENDINGS))})")
    return found


def decode_alone(path: Path, grid: Grid) -> None:
    """What Pillow has to do for an image of several tiles."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
        image.resize((grid[0] * TILE_PIXELS, grid[1] * TILE_PIXELS), Image.Resampling.BICUBIC)
        if grid != (1, 1):
            image.resize((TILE_PIXELS, TILE_PIXELS), Image.Resampling.BICUBIC)


def run_alone(work: list[tuple[Path, Grid]], start: Event, seconds: float, results: Any) -> None:
    """Body of a process: images a second, from when all are told to start."""
    decode_alone(*work[0])
    results.put(None)  # ready
    start.wait()
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        decode_alone(*work[count % len(work)])
        count += 1
    results.put(count / (time.perf_counter() - begin))


def images_per_second_alone(work: list[tuple[Path, Grid]], num_workers: int, seconds: float) -> float:
    """Pillow in several processes."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Event(), context.Queue()
    processes = [context.Process(target=run_alone, args=(work, start, seconds, results)) for _ in range(num_workers)]
    for process in processes:
        process.start()
    for _ in processes:
        results.get()
    start.set()
    total = sum(results.get() for _ in processes)
    for process in processes:
        process.join()
    return total


def images_per_second_of_loader(loader: ReplicaLoader, seconds: float) -> float:
    """The loader's, from one step to another: what is made ahead at the start is so at the end."""
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        tiles = loader.next_step().tiles().tiles
        for array in tiles.values():
            array.reshape(-1)[:: mmap.PAGESIZE].max()  # memory that one process alone has touched counts as its own
        count += len(tiles)
    return count / (time.perf_counter() - begin)


def private_bytes(loader: ReplicaLoader) -> list[int]:
    """Memory of each process that decodes which it shares with no other."""
    found = []
    for pid in loader.decoder_pids():
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        found.append(sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private")))
    return found


def open_loader(folder: Path, files: list[Path], tokenizer_folder: Path, num_workers: int) -> ReplicaLoader:
    """A loader of one rank over records with a question and an answer about each photograph."""
    records = [
        {
            "image": str(path.resolve()),
            "conversations": [
                {"from": "human", "value": "<image>\nWhat can be seen here?"},
                {"from": "gpt", "value": f"A photograph. {'Its colours are natural. ' * (number % 5)}"},
            ],
        }
        for number, path in enumerate(files)
    ]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    entry = {"root": "/", "annotation": "records.jsonl", "data_augment": False, "repeat_time": 1}
    (folder / "meta.json").write_text(json.dumps({"photographs": entry}))
    data = replace(DataConfig(), tokens_per_row=16384, tiles_per_row=48, num_workers=num_workers)
    settings = SampleSettings(data=data, tile_pixels=TILE_PIXELS, tokens_per_tile=TOKENS_PER_TILE)
    datasets, tokenizer = load_datasets(folder / "meta.json"), load_tokenizer(tokenizer_folder)
    streams = [SampleStream(datasets, settings, tokenizer, slot, ROWS_PER_STEP) for slot in range(ROWS_PER_STEP)]
    return ReplicaLoader(streams, lambda message: message or b"", settings, 0, 1)


def measure(files: list[Path], tokenizer_folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Both in turn."""
    data = DataConfig()
    work = [(path, choose_grid(*image_size(str(path)), data.min_tiles, data.max_tiles, TILE_PIXELS)) for path in files]
    with tempfile.TemporaryDirectory() as folder:
        loader = open_loader(Path(folder), files, tokenizer_folder, options.workers)
        images_per_second_of_loader(loader, options.seconds / 2)
        rounds, at_start = [], private_bytes(loader)
        for _ in range(options.rounds):
            alone = images_per_second_alone(work, options.workers, options.seconds)
            rounds.append((alone, images_per_second_of_loader(loader, options.seconds)))
        at_end = private_bytes(loader)
        loader.close()
    return {
        "num_files": len(files),
        "megapixels": [round(width * height / 1e6, 2) for width, height in (image_size(str(path)) for path in files)],
        "tiles": [columns * rows + (columns * rows > 1) for _, (columns, rows) in work],
        "workers": options.workers,
        "pillow_images_per_second": [round(alone, 2) for alone, _ in rounds],
        "loader_images_per_second": [round(loaded, 2) for _, loaded in rounds],
        "loader_over_pillow": round(statistics.median(loaded / alone for alone, loaded in rounds), 3),
        "private_bytes_of_processes": at_end,
        "private_bytes_grown": max(end - start for start, end in zip(at_start, at_end, strict=True)),
    }


def run(options: argparse.Namespace) -> int:
    """Measure, print and write one record."""
    record = {
        "name": "loader",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "load_average": os.getloadavg()[0],
        "versions": {package: version(package) for package in ("pillow", "numpy")},
        **measure(photographs(options.images), options.tokenizer, options),
    }
    text = json.dumps(record, indent=1)
    print(text)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n")
    return 0


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command `loader` of `tools.benchmark`."""
    parser = commands.add_parser("loader", help="the loader beside Pillow alone on the same photographs")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer, as for training")
    parser.add_argument("--images", type=Path, help="folder of photographs; default: the two of scikit-learn")
    parser.add_argument("--workers", type=int, default=2, help="processes of either")
    parser.add_argument("--seconds", type=float, default=8.0, help="of either in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file to write; default: print only")
    parser.set_defaults(run=run)
