"""Pack a run's data ahead of it: tokenized, tiled and packed rows in a zarr store, which the run then reads.

    python -m tools.pack_dataset META --output STORE --tokenizer FOLDER [--recipe NAME] [--workers N] [--parts N]
                                 [--machine I/N] [section.field=value ...]
    python -m tools.pack_dataset STORE --verify [--workers N]

Recipe and settings are those of the run. One epoch of all data sets is packed in parts, several at a time; started
again, it makes those that are missing. Images stay where they are: a row says which there are and how they are cut. A run
uses the store by data.meta=STORE/meta.json. docs/packing.md says what is fixed by packing.
"""

import argparse
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from internvl_megatron.data.dataset import Dataset, load_datasets
from internvl_megatron.data.meta import read_meta
from internvl_megatron.data.records import SampleSettings
from internvl_megatron.data.row_store import META_FILE, PartSummary, RowStore, is_row_store, part_name
from internvl_megatron.data.row_store_writer import (
    begin_store,
    check_part,
    describe,
    finish_store,
    missing_parts,
    write_part,
)
from internvl_megatron.data.stream import SampleStream
from internvl_megatron.data.tokenizer import Tokenizer, load_tokenizer
from internvl_megatron.errors import ConfigError, DataError, UserError
from tools.data_settings import data_parser, open_datasets, read_config

SAMPLES_PER_PART = 65536
LEAST_PARTS = 8
"""For small data, so that several processes have something to do."""


@dataclass(frozen=True, slots=True)
class Job:
    """What every process needs to make any part."""

    meta: str
    index_folder: Path | None
    tokenizer: str
    settings: SampleSettings
    folder: Path
    num_parts: int
    root: str | None


_opened: dict[Job, tuple[list[Dataset], Tokenizer]] = {}
"""Of this process, which makes many parts of one job."""


def make_part(job: Job, number: int) -> PartSummary:
    """Make one part of a job (in a process of its own)."""
    if job not in _opened:
        _opened[job] = load_datasets(job.meta, job.index_folder), load_tokenizer(job.tokenizer)
    datasets, tokenizer = _opened[job]
    stream = SampleStream(datasets, job.settings, tokenizer, number, job.num_parts)
    return write_part(job.folder, number, stream, job.root)


def read_part(folder: Path, number: int) -> PartSummary:
    """Read one part through and compare its checksums."""
    return check_part(folder / part_name(number))


def in_processes(
    work: Callable[[int], PartSummary], numbers: Sequence[int], num_workers: int, what: str
) -> list[PartSummary]:
    """Results of `work` for each number, in several processes, with a bar on a terminal.

    Raises:
        UserError: the first that any of them raised, or a process was killed.
    """
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(max(1, min(num_workers, len(numbers))), mp_context=context) as pool:
        futures = [pool.submit(work, number) for number in numbers]
        try:
            bar = tqdm(futures, desc=what, unit="part", disable=not sys.stderr.isatty())
            return [future.result() for future in bar]
        except BrokenProcessPool as error:
            raise UserError(f"a process was killed, perhaps for want of memory; lower --workers ({error})") from error
        except OSError as error:
            raise UserError(f"cannot be written ({error}); parts that are whole stay, run it again") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def pack(options: argparse.Namespace) -> int:
    """Make the parts that are missing, and finish the store when all are there."""
    config = read_config(options)
    data = config.data
    if data.group_weights is not None:
        raise ConfigError(
            "data.group_weights: rows are packed by an epoch of all data sets, which groups with weights do not have; pack a "
            "store of each group and give the groups to the stores' entries in the run's meta file"
        )
    settings = SampleSettings.of_run(config)
    index_folder = None if data.index_folder is None else Path(data.index_folder)
    datasets, tokenizer = open_datasets(config), load_tokenizer(data.tokenizer)
    if any(dataset.store is not None for dataset in datasets):
        raise DataError(f"{data.meta}: names a store of packed rows; pack the records it was made from")
    num_samples = sum(dataset.length for dataset in datasets)
    num_parts = options.parts or max(LEAST_PARTS, -(-num_samples // SAMPLES_PER_PART))
    folder: Path = options.output
    description = describe(datasets, settings, tokenizer, min(num_parts, num_samples))
    begin_store(folder, description)
    job = Job(data.meta, index_folder, data.tokenizer, settings, folder, description["num_parts"], description["root"])
    machine, num_machines = options.machine
    mine = [number for number in missing_parts(folder, job.num_parts) if number % num_machines == machine]
    in_processes(partial(make_part, job), mine, options.workers, "packing")
    missing = missing_parts(folder, job.num_parts)
    if missing:
        print(
            f"{folder}: {job.num_parts - len(missing)} of {job.num_parts} parts are there; the others are still made"
        )
        return 0
    print(_report(folder, finish_store(folder), settings))
    return 0


def verify(options: argparse.Namespace) -> int:
    """Read the stores of a meta file, or a store, through and compare all checksums."""
    meta = Path(options.meta)
    annotations = [Path(entry.annotation) for entry in read_meta(meta / META_FILE if meta.is_dir() else meta)]
    folders = [path for path in annotations if is_row_store(path)]
    if not folders:
        raise DataError(f"{options.meta}: names no store of packed rows; give the meta.json of a store")
    for folder in folders:
        store = RowStore(folder)
        numbers = range(store.description["num_parts"])
        summaries = in_processes(partial(read_part, folder), numbers, options.workers, "reading")
        listed = [(part["rows"], part["digest"]) for part in store.description["parts"]]
        if listed != [(summary.rows, summary.digest) for summary in summaries]:
            raise DataError(f"{folder}: its parts are not those that are listed; delete the store and pack again")
        print(f"{folder}: {len(store):,} rows in {len(numbers)} parts are whole")
    return 0


def _report(folder: Path, totals: dict[str, Any], settings: SampleSettings) -> str:
    """What is in a store, for people."""
    room = max(1, totals["rows"]) * settings.data.tokens_per_row
    skipped = ", ".join(f"{kind} {count}" for kind, count in sorted(totals["skipped"].items()))
    return (
        f"{totals['samples']:,} samples in {totals['rows']:,} rows of {settings.data.tokens_per_row} tokens, "
        f"{totals['tokens'] / room:.1%} full, {totals['tiles']:,} tiles of {totals['images']:,} images, "
        f"{totals['supervised_tokens']:,} tokens trained on"
        + (f"; left out: {skipped}" if skipped else "")
        + f"\ntrain on it with data.meta={folder / META_FILE}"
    )


def _machine(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1, like 0/4")
    return int(found[1]), int(found[2])


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Pack or verify; 2 if something is wrong that the user can mend."""
    parser = data_parser("Pack a run's data ahead of it.")
    parser.add_argument("--output", type=Path, metavar="STORE", help="folder of the store")
    parser.add_argument("--verify", action="store_true", help="read a store through and compare all checksums")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=_at_least_one, default=cores, help="processes (default: one per core)")
    parser.add_argument(
        "--parts", type=_at_least_one, help=f"default: of {SAMPLES_PER_PART} samples, {LEAST_PARTS} at least"
    )
    parser.add_argument(
        "--machine",
        type=_machine,
        default=(0, 1),
        metavar="I/N",
        help="make every N-th part, where N machines share it",
    )
    options = parser.parse_intermixed_args(arguments)
    if options.verify == (options.output is not None):
        parser.error("give --output to pack, or --verify to read what is packed")
    try:
        return verify(options) if options.verify else pack(options)
    except UserError as error:
        print(f"pack_dataset: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pack_dataset: interrupted; run it again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
