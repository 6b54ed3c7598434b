"""Index the annotation files of a meta file ahead of a run, several at a time.

    python -m tools.index_data META [--jobs N] [--index-folder DIR] [--again]

A run indexes what is missing by itself, on one rank. Indices lie beside the annotations, or in the folder where that cannot
be written; give a run the same folder then (data.index_folder). docs/data.md says what an index is.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from internvl_megatron.data.dataset import jsonl_files
from internvl_megatron.data.jsonl_index import build_index, find_index
from internvl_megatron.data.meta import read_meta
from internvl_megatron.errors import DataError


@dataclass(frozen=True, slots=True)
class Indexed:
    """What became of one file."""

    source: Path
    num_records: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    was_there: bool = False
    problem: str | None = None


def index_one(source: Path, folder: Path | None, again: bool) -> Indexed:
    """Index a file, unless an index of it is there already."""
    start = time.perf_counter()
    try:
        found = None if again else find_index(source, folder)
        index = found or build_index(source, folder)
        num_bytes = source.stat().st_size
    except (DataError, OSError) as error:
        return Indexed(source, problem=str(error))
    return Indexed(source, len(index), num_bytes, time.perf_counter() - start, found is not None)


def index_meta(meta: Path, folder: Path | None, num_jobs: int, again: bool = False) -> list[Indexed]:
    """Index all annotation files of a meta file in several processes; prints a line for each when it is done.

    Raises:
        DataError: the meta file is wrong.
    """
    sources = jsonl_files(read_meta(meta), folder)  # stores have an index already
    # Large ones first, so that none is left alone at the end.
    sources.sort(key=lambda source: source.stat().st_size if source.is_file() else 0, reverse=True)
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(max(1, min(num_jobs, len(sources))), mp_context=context) as pool:
        done = []
        for result in pool.map(index_one, sources, [folder] * len(sources), [again] * len(sources)):
            print(_line(result), flush=True)
            done.append(result)
    return done


def _line(result: Indexed) -> str:
    if result.problem is not None:
        return f"failed   {result.problem}"
    how = "there" if result.was_there else "indexed"
    return f"{how:8} {result.num_records:>12,} records {result.seconds:8.2f} s  {result.source}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Index and report; 1 if a file could not be indexed."""
    parser = argparse.ArgumentParser(description="Index the annotation files of a meta file.")
    parser.add_argument("meta", type=Path, help="InternVL's meta JSON")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="files indexed at a time")
    parser.add_argument("--index-folder", type=Path, help="for indices that cannot be written beside their file")
    parser.add_argument("--again", action="store_true", help="index files that have an index too")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    start = time.perf_counter()
    try:
        done = index_meta(options.meta, options.index_folder, options.jobs, options.again)
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    failed = [result for result in done if result.problem is not None]
    seconds, num_bytes = time.perf_counter() - start, sum(result.num_bytes for result in done)
    print(
        f"{sum(result.num_records for result in done):,} records, {num_bytes / 1e9:.2f} GB in {len(done)} files, "
        f"{seconds:.1f} s" + (f"; {len(failed)} failed" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
