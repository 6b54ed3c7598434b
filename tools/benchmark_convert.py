"""Speed and memory of the converters, as one JSON record.

    python -m tools.benchmark_convert [--size 1B] [--folder DIR] [--output FILE]

A checkpoint of a released size with random values is converted by the command line, to Megatron and back, each beside a
plain copy of the same bytes by `dd bs=16M conv=fsync`, in turn and several times; all sources are in the page cache.
Memory is what belongs to the process alone (anonymous and shared; mapped files are the system's to drop), sampled while
it runs. The same is measured for a 78B-shaped checkpoint, whose files are holes.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from checkpoint_convert.companions import write_json
from checkpoint_convert.conversion import Group, make_shards
from checkpoint_convert.hf_config import CONFIG_FILE
from checkpoint_convert.hf_config_write import ServingFacts, write_config
from checkpoint_convert.mapping import mapping
from checkpoint_convert.safetensors_writer import TensorSpec, header, write
from internvl_megatron.checkpoint.safetensors_folder import INDEX_END, write_index
from internvl_megatron.config.models import INTERNVL3
from internvl_megatron.config.schema import ModelConfig
from internvl_megatron.data.tokenizer_build import find_dashscope_ranks, qwen2_5_tokenizer

FILE_BYTES = 5 * 10**9
SAMPLE_SECONDS = 0.005


def write_source(folder: Path, model: ModelConfig, sparse: bool) -> int:
    """A bf16 checkpoint in OpenGVLab's layout; returns the size of its tensor files in bytes.

    Args:
        folder: to be made.
        model: sizes.
        sparse: leave the values out (they read as zeros and take no space), else random bits.
    """
    import torch

    specs = [
        TensorSpec(name, torch.bfloat16, shape)
        for entry in mapping(model, "internvl-chat")
        for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)
    ]
    folder.mkdir(parents=True)
    shards = make_shards([Group((spec,), list) for spec in specs], "model", FILE_BYTES, always_numbered=False)
    for shard in shards:
        path = folder / shard.name
        if sparse:
            path.write_bytes(header(shard.specs))
            os.truncate(path, shard.num_bytes)
        else:
            low, high = -(2**15), 2**15
            values = (
                torch.randint(low, high, spec.shape, dtype=torch.int16).view(torch.bfloat16) for spec in shard.specs
            )
            write(path, shard.specs, values, lambda _count: None)
    if len(shards) > 1:
        files = {spec.name: shard.name for shard in shards for spec in shard.specs}
        write_index(folder / f"model{INDEX_END}", files, sum(shard.num_bytes for shard in shards))
    facts = ServingFacts(dtype="bfloat16", image_token_id=151667)
    write_json(folder / CONFIG_FILE, write_config(model, "internvl-chat", facts, None))
    return sum(shard.num_bytes for shard in shards)


def measured(command: list[str]) -> dict[str, float]:
    """Run a command: its wall time, the time it reports itself, and the most memory of its own it had."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, own_bytes(process.pid))
        time.sleep(SAMPLE_SECONDS)
    seconds = time.perf_counter() - start
    out, err = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{err}")
    found = re.search(r"in ([0-9.]+) s", out)
    return {"wall_seconds": seconds, "seconds": float(found[1]) if found else seconds, "peak_bytes": peak}


def own_bytes(pid: int) -> int:
    """Anonymous and shared memory of a process now."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(found) * 1024 for found in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status, re.MULTILINE))


@contextmanager
def removed_after(folder: Path) -> Iterator[None]:
    """Remove a folder, and its unfinished form, when the block ends."""
    try:
        yield
    finally:
        for path in (folder, folder.with_name(f"{folder.name}.partial")):
            shutil.rmtree(path, ignore_errors=True)


def copy(source: Path, target: Path) -> dict[str, float]:
    """Copy the tensor files with dd, one after the other, each to the disk before the next."""
    with removed_after(target):
        target.mkdir()
        start = time.perf_counter()
        for path in sorted(source.glob("*.safetensors")):
            command = ["dd", f"if={path}", f"of={target / path.name}", "bs=16M", "conv=fsync", "status=none"]
            subprocess.run(command, check=True)
        return {"seconds": time.perf_counter() - start}


def compare_with_copy(root: Path, size: str, repeats: int) -> dict[str, Any]:
    """Both conversions of a released size, each beside a copy of its source."""
    tool = [sys.executable, "-m", "checkpoint_convert"]
    num_bytes = write_source(root / "source", INTERNVL3[size], sparse=False)
    tokenizer = root / "tokenizer"
    qwen2_5_tokenizer(find_dashscope_ranks()).save_pretrained(str(tokenizer))
    subprocess.run([*tool, "hf-to-megatron", str(root / "source"), str(root / "weights")], check=True)
    conversions = {
        "hf-to-megatron": ("source", []),
        "megatron-to-hf transformers": ("weights", ["--layout", "transformers", "--companions", str(tokenizer)]),
        "megatron-to-hf internvl-chat": ("weights", ["--layout", "internvl-chat", "--companions", str(tokenizer)]),
    }
    result: dict[str, Any] = {"size": size, "bytes": num_bytes}
    for name, (source, options) in conversions.items():
        runs = []
        for _ in range(repeats):
            plain = copy(root / source, root / "copy")
            target = root / "target"
            with removed_after(target):
                own = measured([*tool, name.split()[0], str(root / source), str(target), *options])
            runs.append(own | {"dd_seconds": plain["seconds"]})
        result[name] = {
            "seconds": statistics.median(run["seconds"] for run in runs),
            "wall_seconds": statistics.median(run["wall_seconds"] for run in runs),
            "dd_seconds": statistics.median(run["dd_seconds"] for run in runs),
            "speed_over_dd": statistics.median(run["dd_seconds"] / run["seconds"] for run in runs),
            "wall_speed_over_dd": statistics.median(run["dd_seconds"] / run["wall_seconds"] for run in runs),
            "peak_anonymous_and_shared_bytes": max(run["peak_bytes"] for run in runs),
            "runs": runs,
        }
    return result


def largest(root: Path) -> dict[str, Any]:
    """Memory at 78B: of its whole table of contents, and of converting its largest parameters.

    The second is a 78B of full width and few layers, because the whole needs a disk of 157 GB. What the whole would take is
    its sum with what the whole table of contents takes more than the short one.
    """
    tool = [sys.executable, "-m", "checkpoint_convert"]
    whole, cut = root / "source-78B", root / "source-cut"
    num_bytes = write_source(whole, INTERNVL3["78B"], sparse=True)
    converted_bytes = write_source(cut, cut_78b(), sparse=True)
    target = root / "target-78B"
    with removed_after(target), removed_after(whole), removed_after(cut):
        contents, short_contents = (measured([*tool, "inspect", str(path)])["peak_bytes"] for path in (whole, cut))
        converting = measured([*tool, "hf-to-megatron", str(cut), str(target)])["peak_bytes"]
    peak = converting + max(0, contents - short_contents)
    limit = 2 * FILE_BYTES + 10**9
    return {
        "bytes": num_bytes,
        "inspect_peak_bytes": contents,
        "converted_bytes": converted_bytes,
        "convert_peak_bytes": converting,
        "peak_anonymous_and_shared_bytes": peak,
        "limit_bytes": limit,
        "below_limit": peak < limit,
    }


def cut_78b() -> ModelConfig:
    """78B with full width and vocabulary, three layers on either side."""
    model = INTERNVL3["78B"]
    return replace(model, vision=replace(model.vision, num_layers=3), language=replace(model.language, num_layers=3))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write one record."""
    parser = argparse.ArgumentParser(description="Measure the converters.")
    parser.add_argument("--size", choices=list(INTERNVL3), default="1B")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file to write; default: print only")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="benchmark-convert-") as name:
        root = Path(name)
        result = {
            "name": f"convert_{options.size}",
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
            "versions": {package: version(package) for package in ("torch", "safetensors")},
            "largest": largest(root),
            **compare_with_copy(root, options.size, options.repeats),
        }
    text = json.dumps(result, indent=1)
    print(text)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
