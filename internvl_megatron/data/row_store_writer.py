"""Writes a store of packed rows, part by part: each is the rows of one stream over one epoch, and appears when it is whole.

Parts do not depend on each other, so any number of processes on any number of machines may write them, and what is there
already need not be written again.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import LocalStore

from internvl_megatron.config.schema import DataConfig
from internvl_megatron.data.dataset import Dataset
from internvl_megatron.data.files import write_whole
from internvl_megatron.data.jsonl_file import JsonlFile
from internvl_megatron.data.records import SampleSettings
from internvl_megatron.data.row_store import (
    FORMAT,
    META_FILE,
    PADDED,
    RAGGED,
    STORE_FILE,
    VERSION,
    ListedPart,
    Part,
    PartSummary,
    StoredRow,
    common_root,
    digest_of_rows,
    fixed_settings,
    part_name,
    read_description,
)
from internvl_megatron.data.rows import Row
from internvl_megatron.data.stream import SHAPING_SETTINGS, SampleStream
from internvl_megatron.data.tokenizer import Tokenizer
from internvl_megatron.errors import DataError

ROWS_PER_FILE = 64
"""Rows of an array in one file, and held in memory while they are written: 16 MB at 16384 tokens."""
_RAGGED_CHUNK = 65536
_CODECS = (ZstdCodec(level=3), Crc32cCodec())


def describe(
    datasets: Sequence[Dataset], settings: SampleSettings, tokenizer: Tokenizer, num_parts: int
) -> dict[str, Any]:
    """What `store.json` says before there are parts: everything that decides which rows they have."""
    data: DataConfig = settings.data
    return {
        "format": FORMAT,
        "version": VERSION,
        "fixed": fixed_settings(settings, tokenizer),
        "tiles_per_row": data.tiles_per_row,
        "packed": {"seed": data.seed, **{name: getattr(data, name) for name in SHAPING_SETTINGS}},
        "num_parts": num_parts,
        # Media of a store are in its shards.
        "root": common_root(
            dataset.entry.annotation if Path(dataset.entry.annotation).is_dir() else dataset.entry.root
            for dataset in datasets
        ),
        "datasets": [
            {
                "name": dataset.entry.name,
                "annotation": str(dataset.entry.annotation),
                "annotation_bytes": dataset.file.path.stat().st_size if isinstance(dataset.file, JsonlFile) else None,
                "records": dataset.num_records,
                "repeats": dataset.num_repeats,
                "data_augment": dataset.entry.data_augment,
                "max_tiles": dataset.entry.max_tiles,
            }
            for dataset in datasets
        ],
    }


def begin_store(folder: Path, description: dict[str, Any]) -> None:
    """Make the folder, or see that what is there was begun with the same description.

    Raises:
        DataError: it holds something else.
    """
    description = json.loads(json.dumps(description))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            write_whole(folder / STORE_FILE, json.dumps(description, indent=1))
            return
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error
    there = {name: value for name, value in read_description(folder).items() if name in description}
    if there != description:
        changed = [name for name, value in description.items() if there.get(name) != value]
        details = "; ".join(_difference(name, there.get(name), description[name]) for name in changed)
        raise DataError(f"{folder}: was begun otherwise ({details}); choose another folder, or delete this one")


def _difference(name: str, before: Any, now: Any) -> str:
    """What has changed in a field of the description."""
    if isinstance(before, dict) and isinstance(now, dict):
        return "; ".join(
            _difference(key, before.get(key), value) for key, value in now.items() if before.get(key) != value
        )
    return f"{name} was {before!r}, is {now!r}"


def write_part(folder: Path, number: int, stream: SampleStream, root: str | None) -> PartSummary:
    """Write the rows of a stream's epoch as part `number`, read them back, and put the part in its place.

    Raises:
        DataError: a sample is bad and the policy says stop, or what was read back is not what was written.
        OSError: it cannot be written.
    """
    temporary = folder / f".{part_name(number)}.{secrets.token_hex(8)}.writing"
    try:
        summary = _write(temporary, stream.rows_of_epoch(), root, lambda: stream.skipped)
        check_part(temporary, summary)
        _flush(temporary)
        try:
            temporary.rename(folder / part_name(number))
        except OSError:
            if not (folder / part_name(number)).is_dir():  # else another process was faster, with the same rows
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return summary


def _write(folder: Path, rows: Iterable[Row], root: str | None, skipped: Callable[[], dict[str, int]]) -> PartSummary:
    """Write rows as they come, some at a time."""
    group = zarr.create_group(LocalStore(folder))
    waiting: list[StoredRow] = []
    ragged: dict[str, list[np.ndarray]] = {name: [] for name in RAGGED}
    digests: list[np.ndarray] = []
    arrays: dict[str, zarr.Array] = {}
    totals = dict.fromkeys(("samples", "tokens", "supervised_tokens", "tiles", "images"), 0)

    def write_waiting() -> None:
        for name, array in arrays.items():
            array.resize((len(digests), array.shape[1]))
            array[len(digests) - len(waiting) :] = np.stack([row.padded[name] for row in waiting])
        waiting.clear()

    for row in rows:
        stored = StoredRow.of(row, root)
        if not arrays:
            arrays = {name: _create(group, name, len(row.token_ids)) for name in PADDED}
        waiting.append(stored)
        digests.append(stored.digest())
        for name in RAGGED:
            ragged[name].append(stored.ragged[name])
        totals["samples"] += row.num_samples
        totals["tokens"] += row.num_tokens
        totals["supervised_tokens"] += int((row.weights > 0).sum())
        totals["tiles"] += row.num_tiles
        totals["images"] += len(row.images)
        if len(waiting) == ROWS_PER_FILE:
            write_waiting()
    if not arrays:
        arrays = {name: _create(group, name, 1) for name in PADDED}
    elif waiting:
        write_waiting()
    bounds = np.zeros((len(digests) + 1, len(RAGGED)), dtype=np.int64)
    for column, (name, kind) in enumerate(RAGGED.items()):
        bounds[1:, column] = np.cumsum([len(array) for array in ragged[name]])
        empty = np.zeros((0, 3) if name == "sources" else 0, dtype=kind)
        _put(group, name, np.concatenate([empty, *ragged[name]]))
    _put(group, "bounds", bounds)
    _put(group, "digests", np.stack(digests) if digests else np.zeros((0, 16), dtype=np.uint8))
    summary = PartSummary(rows=len(digests), **totals, skipped=skipped(), digest=digest_of_rows(digests))
    group.attrs.update(asdict(summary))
    return summary


def _create(group: zarr.Group, name: str, num_tokens: int) -> zarr.Array:
    """An array for rows to come."""
    return group.create_array(
        name,
        shape=(0, num_tokens),
        chunks=(1, num_tokens),
        shards=(ROWS_PER_FILE, num_tokens),
        dtype=PADDED[name],
        compressors=_CODECS,
    )


def _put(group: zarr.Group, name: str, values: np.ndarray) -> None:
    """An array as it is."""
    chunks = (min(_RAGGED_CHUNK, max(1, len(values))), *values.shape[1:])
    array = group.create_array(name, shape=values.shape, chunks=chunks, dtype=values.dtype, compressors=_CODECS)
    if len(values):
        array[:] = values


def check_part(folder: Path, expected: PartSummary | None = None) -> PartSummary:
    """Read a part through and compare all checksums.

    Args:
        folder: of the part.
        expected: what must be in it; None = what it says itself.

    Raises:
        DataError: it is not whole.
    """
    part = Part(folder)
    expected = expected or part.summary
    for index in range(len(part.digests)):
        part.row(index)
    found = (len(part.digests), digest_of_rows(part.digests), part.summary)
    if found != (expected.rows, expected.digest, expected):
        raise DataError(f"{folder}: has not the rows it should have; delete it, and it is made again")
    return expected


def missing_parts(folder: Path, num_parts: int) -> list[int]:
    """Parts that are not there yet."""
    return [number for number in range(num_parts) if not (folder / part_name(number)).is_dir()]


def finish_store(folder: Path) -> dict[str, Any]:
    """List the parts in `store.json`, all of which must be there, and write the store's meta file.

    Returns:
        totals over all parts.

    Raises:
        DataError: a part cannot be read.
    """
    description = read_description(folder)
    summaries = [Part(folder / part_name(number)).summary for number in range(description["num_parts"])]
    skipped: dict[str, int] = {}
    for summary in summaries:
        for kind, count in summary.skipped.items():
            skipped[kind] = skipped.get(kind, 0) + count
    names = ("rows", "samples", "tokens", "supervised_tokens", "tiles", "images")
    totals = {name: sum(getattr(summary, name) for summary in summaries) for name in names} | {"skipped": skipped}
    entry = {
        "root": description["root"] or "/",
        "annotation": ".",
        "data_augment": any(dataset["data_augment"] for dataset in description["datasets"]),
        "repeat_time": 1,
        "length": totals["rows"],
    }
    write_whole(folder / META_FILE, json.dumps({folder.resolve().name: entry}, indent=1))
    parts = [asdict(ListedPart(summary.rows, summary.digest)) for summary in summaries]
    write_whole(folder / STORE_FILE, json.dumps(description | {"parts": parts, "totals": totals}, indent=1))
    for left in folder.glob(".part-*.writing"):  # by processes that were killed
        shutil.rmtree(left, ignore_errors=True)
    return totals


def _flush(folder: Path) -> None:
    """Have the kernel write everything in a folder to the disk."""
    for path in [folder, *folder.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
