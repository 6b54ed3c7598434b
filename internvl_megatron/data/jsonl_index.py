"""Where every record of a jsonl file begins: read through once, kept in a file, looked up by offset.

The file, in little-endian order:

    512 bytes          magic, CRC-32 of the JSON that follows, JSON (see `_Facts`), filled up with spaces
    8 bytes a record   byte offset of its line
    16 bytes a gap     blank lines are not records: at each place where some are left out, the number of the first record
                       after it, and how many blank lines there are before that record in all

A look-up reads a few bytes through the page cache, which all processes of a machine share. The file is not mapped: pages of
a mapping that one process alone has touched count as its own, and random order touches them all.
"""

import hashlib
import json
import logging
import os
import secrets
import shutil
import stat
import struct
import tempfile
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np

from internvl_megatron.errors import DataError
from internvl_megatron.typed_object import typed_object

_logger = logging.getLogger(__name__)

INDEX_END = ".index"
HEADER_BYTES = 512
BLOCK_BYTES = 4 * 2**20
"""Read at a time while indexing; bounds the memory that takes."""
PROBE_BYTES = 4096
NUM_PROBES = 8
_MAGIC = b"jsonlidx"
_VERSION = 1
_CHECKSUM = struct.Struct("<8sI")
_OFFSET_BYTES, _GAP_BYTES = 8, 16
_NEWLINE = ord("\n")
_IS_BLANK = np.zeros(256, dtype=bool)
_IS_BLANK[list(b" \t\n\r\v\f")] = True


@dataclass(frozen=True, slots=True)
class _Facts:
    """What an index says of itself and of the file it was made of."""

    version: int
    source_bytes: int
    source_mtime_ns: int
    probe: str
    """Digest of some blocks of the source, see `_probe`."""
    records: int
    gaps: int

    @property
    def index_bytes(self) -> int:
        """Size of a whole index."""
        return HEADER_BYTES + _OFFSET_BYTES * self.records + _GAP_BYTES * self.gaps


class JsonlIndex:
    """The index of one jsonl file. It holds no descriptor and nothing that grows with the records, and may be pickled."""

    def __init__(self, source: Path, path: Path | None, header: bytes, content: bytes | None = None) -> None:
        """An index that is known to be whole and to fit its source.

        Args:
            source: the jsonl file.
            path: the index; None = it is in memory.
            header: its first bytes.
            content: an index in memory.
        """
        facts = _facts_of(header)
        assert facts is not None, f"{path}: not a header of an index"
        self.source = source
        self.path = path
        self._facts = facts
        self._header = header
        self._content = content

    def __len__(self) -> int:
        """Number of records."""
        return self._facts.records

    def span(self, record: int) -> tuple[int, int]:
        """(start, end) of a record in its file, in bytes: its line, and blank lines that may follow.

        Raises:
            DataError: the index cannot be read any more, or is damaged.
        """
        is_last = record == len(self) - 1
        with self._opened() as file:
            start, *following = _numbers(file, HEADER_BYTES + _OFFSET_BYTES * record, 1 if is_last else 2)
        end = self._facts.source_bytes if is_last else following[0]
        # A record and its line break take two bytes at least: zeros where a page was lost are not offsets.
        if not 2 * record <= start < end <= self._facts.source_bytes:
            raise DataError(
                f"{self.path}: is damaged (record {record} at bytes {start} to {end} of "
                f"{self._facts.source_bytes}); delete it, and it is made again"
            )
        return start, end

    def line(self, record: int) -> int:
        """Number of the record's line in its file, counted from 1."""
        if not self._facts.gaps:
            return record + 1
        gaps = HEADER_BYTES + _OFFSET_BYTES * len(self)
        with self._opened() as file:
            before = bisect_right(
                range(self._facts.gaps), record, key=lambda gap: _numbers(file, gaps + _GAP_BYTES * gap, 1)[0]
            )
            return record + 1 + (_numbers(file, gaps + _GAP_BYTES * before - 8, 1)[0] if before else 0)

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        """The index, if it is still the one that was opened: another process may have made it anew."""
        if self._content is not None:
            yield BytesIO(self._content)
            return
        assert self.path is not None, "an index is in a file or in memory"
        try:
            with self.path.open("rb", buffering=0) as file:
                if file.read(HEADER_BYTES) != self._header:
                    raise DataError(
                        f"{self.source}: has changed while it was in use (it was indexed anew); start again"
                    )
                yield file
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be read any more ({error.strerror}); start again, and it is made anew"
            ) from error


def open_index(source: Path, folder: Path | None = None) -> JsonlIndex:
    """The index of a jsonl file: a kept one that fits it, or a new one.

    Args:
        source: the jsonl file.
        folder: where the index goes if it cannot be written beside its source.

    Raises:
        DataError: the source cannot be read, or the index cannot be written.
    """
    return find_index(source, folder) or build_index(source, folder)


def index_places(source: Path, folder: Path | None) -> list[Path]:
    """Where an index may be, the preferred place first: beside its source, or in the folder."""
    beside = source.with_name(source.name + INDEX_END)
    if folder is None:
        return [beside]
    # Annotations of different folders often have the same name.
    digest = hashlib.blake2b(os.fsencode(source.absolute()), digest_size=8).hexdigest()
    return [beside, folder / f"{source.name[:100]}-{digest}{INDEX_END}"]


def find_index(source: Path, folder: Path | None = None) -> JsonlIndex | None:
    """A kept index that is whole and fits its source: its size, its time of change and probes of its content.

    Raises:
        DataError: the source cannot be read.
    """
    places = [place for place in index_places(source, folder) if place.is_file()]
    if not places:
        return None
    with _source(source) as file:
        size, changed_ns, probe = *_identity(file), _probe(file)
    for place in places:
        header, index_bytes = _read_header(place)
        facts = _facts_of(header)
        if facts is None or index_bytes != facts.index_bytes:
            _logger.warning("%s: is not a whole index and is made again", place)
        elif (facts.source_bytes, facts.source_mtime_ns, facts.probe) != (size, changed_ns, probe):
            _logger.info("%s: %s has changed since, it is indexed anew", place, source)
        else:
            return JsonlIndex(source, place, header)
    return None


def build_index(source: Path, folder: Path | None = None) -> JsonlIndex:
    """Index a jsonl file and keep the index, in the first place that can be written.

    It appears when it is whole; processes that build the same one at the same time do each other no harm.

    Raises:
        DataError: the source cannot be read or changes meanwhile, or no place can be written.
    """
    refused = []
    with _source(source) as file:
        for place in index_places(source, folder):
            temporary = place.with_name(f".{place.name[:120]}.{secrets.token_hex(8)}.writing")
            try:
                if folder is not None and place.parent == folder:
                    folder.mkdir(parents=True, exist_ok=True)
                with temporary.open("xb") as target:
                    header = _write_index(source, file, target)
                    target.flush()
                    os.fsync(target.fileno())
                temporary.replace(place)
                return JsonlIndex(source, place, header)
            except OSError as error:
                refused.append(f"{place} ({error.strerror})")
            finally:
                _remove(temporary)
    raise DataError(
        f"{source}: its index cannot be written: {'; '.join(refused)}; set data.index_folder to a folder with room for 8 "
        "bytes a record"
    )


def index_in_memory(source: Path) -> JsonlIndex:
    """Index a small jsonl file and keep nothing.

    Raises:
        DataError: the source cannot be read or changes meanwhile.
    """
    target = BytesIO()
    with _source(source) as file:
        header = _write_index(source, file, target)
    return JsonlIndex(source, None, header, target.getvalue())


def index_all(sources: Sequence[Path], folder: Path | None, num_threads: int) -> None:
    """Make those indices of some jsonl files that are missing.

    Raises:
        DataError: with one line for every file that cannot be indexed.
    """

    def problem(source: Path) -> str | None:
        try:
            open_index(source, folder)
        except DataError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(num_threads, thread_name_prefix="index") as pool:
        problems = [text for text in pool.map(problem, dict.fromkeys(sources)) if text is not None]
    if problems:
        raise DataError("\n".join(problems))


def _remove(temporary: Path) -> None:
    """Remove what is left of an index that was not finished, if its folder lets us."""
    try:
        temporary.unlink(missing_ok=True)
    except OSError as error:
        _logger.debug("%s: cannot be removed (%s)", temporary, error)


@contextmanager
def _source(path: Path) -> Iterator[BinaryIO]:
    """A jsonl file opened for reading."""
    try:
        # A pipe has no offsets, and opening one would wait for its writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path}: is not a file; check 'annotation' in the meta file")
        file = path.open("rb", buffering=0)
    except OSError as error:
        raise _unreadable(path, error) from error
    with file:
        yield file


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror}); check 'annotation' in the meta file")


def _identity(file: BinaryIO) -> tuple[int, int]:
    """Size in bytes and time of change in ns."""
    facts = os.fstat(file.fileno())
    return facts.st_size, facts.st_mtime_ns


def _probe(file: BinaryIO) -> str:
    """Digest of blocks evenly spread over a file, its first and last bytes among them; of a small file, of all of it.

    For a file whose content changed and whose size and time of change did not.
    """
    size, digest = os.fstat(file.fileno()).st_size, hashlib.blake2b(digest_size=16)
    last = max(0, size - PROBE_BYTES)
    for place in range(NUM_PROBES):
        digest.update(os.pread(file.fileno(), PROBE_BYTES, last * place // (NUM_PROBES - 1)))
    return digest.hexdigest()


def _read_header(path: Path) -> tuple[bytes, int]:
    """The first bytes of an index, and its size; nothing if it cannot be read."""
    try:
        with path.open("rb", buffering=0) as file:
            return file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size
    except OSError as error:
        _logger.warning("%s: cannot be read (%s) and is made again", path, error.strerror)
        return b"", 0


def _header_of(facts: _Facts) -> bytes:
    text = json.dumps(asdict(facts)).encode()
    header = (_CHECKSUM.pack(_MAGIC, zlib.crc32(text)) + text).ljust(HEADER_BYTES)
    assert len(header) == HEADER_BYTES, f"{len(header)} bytes of facts do not fit the header"
    return header


def _facts_of(header: bytes) -> _Facts | None:
    """What a header says; None if it is not one, damaged, or of another version."""
    text = header[_CHECKSUM.size :].rstrip(b" ")
    if len(header) != HEADER_BYTES or header[: _CHECKSUM.size] != _CHECKSUM.pack(_MAGIC, zlib.crc32(text)):
        return None
    try:
        facts = typed_object(_Facts, json.loads(text))
    except (ValueError, RecursionError):
        return None
    return facts if facts.version == _VERSION and min(facts.records, facts.gaps) >= 0 else None


def _numbers(file: BinaryIO, position: int, count: int) -> tuple[int, ...]:
    """`count` numbers of an index. Raises `OSError` if it ends before them."""
    file.seek(position)
    content = file.read(8 * count)
    if len(content) != 8 * count:
        raise OSError(None, f"it ends before byte {position + 8 * count}")
    return struct.unpack(f"<{count}q", content)


def _write_index(source: Path, file: BinaryIO, target: BinaryIO) -> bytes:
    """Write the index of an open file and return its header. Raises `OSError` if the target cannot be written."""
    before = _identity(file)
    target.write(bytes(HEADER_BYTES))
    num_records = num_gaps = 0
    with tempfile.TemporaryFile() as gaps_file:
        for offsets, gaps in _scan(source, file):
            target.write(offsets.astype("<i8", copy=False).data)
            gaps_file.write(gaps.astype("<i8", copy=False).data)
            num_records += len(offsets)
            num_gaps += len(gaps)
        gaps_file.seek(0)
        shutil.copyfileobj(gaps_file, target)
    probe = _probe(file)
    if _identity(file) != before:
        raise DataError(f"{source}: changes while it is indexed; start again when it is written")
    header = _header_of(_Facts(_VERSION, *before, probe, num_records, num_gaps))
    target.seek(0)
    target.write(header)
    return header


def _scan(source: Path, file: BinaryIO) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Read a file from its beginning, block by block.

    Yields:
        For each block, of the lines that end in it: int64 [n], offsets of those that are not blank; and int64 [gaps, 2],
        (record, blank lines before it) where blank lines are left out.
    """
    num_lines = num_records = num_blank = 0
    line_start, line_has_content = 0, False
    """Where the line that a block ends in begins, and whether it is known not to be blank."""
    for base, block in _blocks(source, file):
        line_ends = np.flatnonzero(block == _NEWLINE)
        if not len(line_ends):
            line_has_content = line_has_content or not _IS_BLANK[block].all()
            continue
        starts = np.concatenate([[0], line_ends[:-1] + 1])
        is_record = ~_IS_BLANK[block[starts]]
        if not is_record.all():  # some begin with a space: all their bytes are looked at
            is_record = np.logical_or.reduceat(~_IS_BLANK[block[: line_ends[-1] + 1]], starts)
        is_record[0] |= line_has_content
        starts += base
        starts[0] = line_start
        offsets, lines = starts[is_record], np.flatnonzero(is_record)
        blank_before = num_lines + lines - num_records - np.arange(len(lines))
        new_gaps = np.flatnonzero(np.diff(blank_before, prepend=num_blank))
        yield offsets, np.stack([num_records + new_gaps, blank_before[new_gaps]], axis=1)
        num_lines += len(line_ends)
        num_records += len(offsets)
        num_blank = int(blank_before[-1]) if len(lines) else num_blank
        rest = block[line_ends[-1] + 1 :]
        line_start, line_has_content = base + len(block) - len(rest), not _IS_BLANK[rest].all()
    if line_has_content:  # the last line has no line break
        blank_before = num_lines - num_records
        gaps = [[num_records, blank_before]] if blank_before != num_blank else []
        yield np.array([line_start]), np.array(gaps, dtype=np.int64).reshape(-1, 2)


def _blocks(source: Path, file: BinaryIO) -> Iterator[tuple[int, np.ndarray]]:
    """(offset, uint8 bytes) of a file's blocks; the bytes last until the next is asked for."""
    buffer, base = bytearray(BLOCK_BYTES), 0
    view = memoryview(buffer)
    file.seek(0)
    while True:
        try:
            size = file.readinto(view)  # pyright: ignore[reportAttributeAccessIssue]
        except OSError as error:
            raise _unreadable(source, error) from error
        if not size:
            return
        yield base, np.frombuffer(buffer, dtype=np.uint8, count=size)
        base += size
