"""Checksums of the files of a checkpoint: taken while they are written, compared when somebody wants to know.

CRC-32 finds every flipped bit and every cut; it is not meant against people who change files on purpose. On one core it takes 2 GB/s.
"""

import json
import operator
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from internvl_megatron.checkpoint import folders
from internvl_megatron.errors import CheckpointError

SUMS_FILE = "files.json"
"""In a checkpoint: {path of a file: [bytes, CRC-32]} for all files but itself and the marker, which has its sum."""

_CHUNK_BYTES = 2**24


@dataclass(frozen=True)
class FileSum:
    """What a file must be."""

    num_bytes: int
    crc: int


FileSums = dict[str, FileSum]
"""By path in the checkpoint's folder."""


def write_file(path: Path, content: bytes) -> FileSum:
    """Write a small file, on the disk when this returns."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return FileSum(len(content), zlib.crc32(content))


def sum_of_file(path: Path) -> FileSum:
    """Read a file for its sum."""
    num_bytes = crc = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            num_bytes += len(chunk)
            crc = zlib.crc32(chunk, crc)
    return FileSum(num_bytes, crc)


def write_sums(folder: Path, sums: FileSums) -> int:
    """Write the list of a checkpoint; returns its own sum, for the marker."""
    content = {name: [entry.num_bytes, entry.crc] for name, entry in sorted(sums.items())}
    return write_file(folder / SUMS_FILE, json.dumps(content, indent=0).encode()).crc


def read_sums(folder: Path, info: folders.CheckpointInfo) -> FileSums:
    """The list of a checkpoint; empty if it was written before there was one.

    Raises:
        CheckpointError: the list is missing or damaged.
    """
    path = folder / SUMS_FILE
    if info.files_sum is None:
        return {}
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); use another checkpoint") from error
    if zlib.crc32(content) != info.files_sum:
        raise CheckpointError(
            f"{path}: damaged (it does not have the sum in {folders.MARKER}); use another checkpoint"
        )
    try:
        sums = {str(name): FileSum(*map(operator.index, entry)) for name, entry in json.loads(content).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a list of files ({error}); use another checkpoint") from error
    for name in sums:
        folders.file_in(folder, name)
    return sums


def find_damage(folder: Path, contents: bool = True, part: int = 0, num_parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint, a line for each file; nothing if it is intact as far as has been looked.

    Args:
        folder: of the checkpoint.
        contents: read the files; otherwise only whether they are there with their lengths.
        part: of the files to look at, so that several processes can share them.
        num_parts: processes that share them.

    Raises:
        OtherVersionError: it is of a version this program does not read.
    """
    try:
        sums = read_sums(folder, folders.read_info(folder))
    except folders.OtherVersionError:
        raise
    except CheckpointError as error:
        return [str(error)]
    damage = [_damage_of(folder / name, wanted, contents) for name, wanted in _share(sums, part, num_parts)]
    return [text for text in damage if text is not None]


def _share(sums: FileSums, part: int, num_parts: int) -> Sequence[tuple[str, FileSum]]:
    """Large files first, dealt out one by one."""
    ordered = sorted(sums.items(), key=lambda entry: (-entry[1].num_bytes, entry[0]))
    return ordered[part::num_parts]


def _damage_of(path: Path, wanted: FileSum, contents: bool) -> str | None:
    try:
        num_bytes = path.stat().st_size
        if num_bytes != wanted.num_bytes:
            return f"{path}: {num_bytes} bytes, {wanted.num_bytes} were written"
        if contents and sum_of_file(path) != wanted:
            return f"{path}: its contents have changed since they were written (CRC-32)"
    except FileNotFoundError:
        return f"{path}: missing"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    return None
