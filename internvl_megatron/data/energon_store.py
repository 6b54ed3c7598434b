"""WebDataset stores as `energon prepare` leaves them: samples in tar shards, found by number through energon's index.

energon is imported when a store is opened, and only here: it loads torch, which processes that decode must not. It says
which shards a split has, and by its SQLite index where in a shard a sample is; the sample itself is read here, header
by header, so that media can be read in place later, and an index that does not fit its shards is noticed.
"""

import os
import sqlite3
import tarfile
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from internvl_megatron.data.files import FileError, Span, open_file
from internvl_megatron.data.json_object import parse_object
from internvl_megatron.data.members import Members, SampleRecord
from internvl_megatron.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron.energon.flavors.webdataset.indexing import SqliteIndexReader
    from megatron.energon.flavors.webdataset.metadata import WebdatasetMeta
    from megatron.energon.flavors.webdataset.thread_local_sqlite import ThreadLocalSqlite

META_FOLDER = ".nv-meta"
"""Folder of a store that `energon prepare` makes."""

INDEX_NAME = "index.sqlite"
DEFAULT_SPLIT = "train"
RECORD = "json"
"""Extension of the member that is the record."""

_TAR_ERRORS = (
    tarfile.TarError, OSError, ValueError, IndexError, KeyError, OverflowError, MemoryError, RecursionError,
)  # fmt: skip
"""What Python's reader of tar files raises on damaged or hostile ones."""


@dataclass(frozen=True, slots=True)
class _Sample:
    """Where a sample is, by the index."""

    index: int
    shard: str
    """Path."""
    key: str
    start: int
    """Byte of the shard at which the header of its first member begins."""
    end: int

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.shard}:{self.key}"


class EnergonStore:
    """Records of one split of a WebDataset store, in the order of its shards; samples that the split excludes are none.

    It holds nothing that grows with the samples and no descriptor, so processes and threads may share it; may be pickled.
    """

    def __init__(self, folder: Path, split: str = DEFAULT_SPLIT) -> None:
        """Read the metadata; shards are not opened.

        Raises:
            DataError: the folder is not a store, has no such split, or nothing in it, or metadata and index differ.
            ConfigError: energon is not installed.
        """
        self.folder = folder
        if not (folder / META_FOLDER).is_dir():
            raise DataError(
                f"{folder}: is a folder without {META_FOLDER}, no WebDataset store; run `energon prepare {folder}`, or set "
                "'annotation' to a jsonl file"
            )
        self._index_path = folder.absolute() / META_FOLDER / INDEX_NAME
        self._reader: SqliteIndexReader | None = None
        meta = _read_meta(folder, split)
        numbers = {name: number for number, name in enumerate(meta.info_shard_files)}
        self._shards = [(str(folder / shard.name), numbers[shard.name]) for shard in meta.shards]
        """Path of each shard of the split, and the number the index has for it."""
        self._ends = list(accumulate(shard.count for shard in meta.shards))
        """Samples up to the end of each shard."""
        self._check_counts()
        self._excluded = self._find_excluded({shard.name: place for place, shard in enumerate(meta.shards)}, meta)
        """Numbers of excluded samples, each less the excluded ones before it, rising."""
        if not len(self):
            raise DataError(f"{folder}: split '{split}' has no samples")
        self._last: _Sample | None = None
        """`where` and `read` of a sample come one after the other."""

    def __len__(self) -> int:
        """Number of records."""
        return (self._ends[-1] if self._ends else 0) - len(self._excluded)

    def __getstate__(self) -> dict[str, Any]:
        """Without energon's reader, which cannot be pickled and is made again."""
        return self.__dict__ | {"_reader": None}

    def where(self, index: int) -> str:
        """`shard:key` of a record. Raises `DataError` if the index of the store cannot be used any more."""
        return self._find(index).where

    def read(self, index: int) -> SampleRecord:
        """The JSON object of record `index`, with the places of its sample's members, all seen to be there.

        Raises:
            FileError: the shard is missing, cut off, or another than the index was made of.
            DataError: the sample has no JSON member, or a broken one.
        """
        sample = self._find(index)
        try:
            with open_file(sample.shard) as file:
                members = _members(file, sample)
                if RECORD not in members.spans:
                    have = ", ".join(list(members.spans)[:10])
                    raise DataError(
                        f"{sample.where}: has no member '{RECORD}' with the record, only {have}; add it and run `energon "
                        "prepare` again, or exclude the sample in split.yaml"
                    )
                span = members.spans[RECORD]
                content = os.pread(file.fileno(), span.size, span.offset)
        except FileError as error:
            if error.fault == "missing":
                raise FileError(
                    "missing", f"{sample.where}: the shard is not there; put it back or run `energon prepare` again"
                ) from error
            raise
        except _TAR_ERRORS as error:
            if isinstance(error, DataError):
                raise
            raise _changed(sample, f"cannot be read ({error})") from error
        return SampleRecord(parse_object(content, f"{sample.where}.{RECORD}", "the member"), members)

    def _find(self, index: int) -> _Sample:
        """Where record `index` is."""
        last = self._last
        if last is not None and last.index == index:
            return last
        assert 0 <= index < len(self), f"record {index} of {len(self)}"
        number = index + bisect_right(self._excluded, index)
        place = bisect_right(self._ends, number)
        shard, shard_number = self._shards[place]
        in_shard = number - (self._ends[place - 1] if place else 0)
        with self._index() as index_file:
            row = index_file.select_one(
                "SELECT sample_key, byte_offset, byte_size FROM samples WHERE tar_file_id = ? AND sample_index = ?",
                (shard_number, in_shard),
            )
            if row is None:
                raise self._unusable(f"has no sample {in_shard} of {shard}")
            key, start, size = row
            sample = self._last = _Sample(index, shard, key, start, start + size)
        return sample

    @contextmanager
    def _index(self) -> Iterator["ThreadLocalSqlite"]:
        """energon's index, open in this thread alone and for this look-up: hundreds of data sets would be many descriptors."""
        from megatron.energon.epathlib import EPath
        from megatron.energon.flavors.webdataset.indexing import SqliteIndexReader

        try:
            if not self._index_path.is_file():
                raise self._unusable("is missing")
            reader = self._reader or SqliteIndexReader(EPath(self._index_path))
            yield reader.db
            reader.db.thread_close()
            self._reader = reader
        except (sqlite3.Error, OSError, TypeError) as error:
            self._reader = None  # what is open in it goes with it
            raise self._unusable(f"cannot be used ({error})") from error

    def _check_counts(self) -> None:
        """The index has as many samples of each shard as the metadata say."""
        starts = [0, *self._ends[:-1]]
        with self._index() as index:
            for (shard, number), start, end in zip(self._shards, starts, self._ends, strict=True):
                for in_shard, expected in ((end - start - 1, 1), (end - start, 0)):
                    (found,) = index.select_one(
                        "SELECT COUNT(*) FROM samples WHERE tar_file_id = ? AND sample_index = ?", (number, in_shard)
                    )
                    if found != expected:
                        raise self._unusable(f"has not the {end - start} samples of {shard} that .info.json has")

    def _find_excluded(self, places: dict[str, int], meta: "WebdatasetMeta") -> list[int]:
        """Samples of the split that its `exclude` names as `shard/key`, as `self._excluded` has them."""
        numbers = set[int]()
        with self._index() as index:
            for name in meta.sample_excludes:
                shard = next((shard for shard in places if name.startswith(f"{shard}/")), None)
                if shard is None:
                    continue  # of another split
                place = places[shard]
                row = index.select_one(
                    "SELECT sample_index FROM samples WHERE tar_file_id = ? AND sample_key = ?",
                    (self._shards[place][1], name[len(shard) + 1 :]),
                )
                if row is not None:
                    numbers.add(row[0] + (self._ends[place - 1] if place else 0))
        return [number - before for before, number in enumerate(sorted(numbers))]

    def _unusable(self, what: str) -> DataError:
        return DataError(f"{self._index_path}: {what}; run `energon prepare` again")


def _read_meta(folder: Path, split: str) -> "WebdatasetMeta":
    """Shards of a split, by energon."""
    try:
        from megatron.energon.epathlib import EPath
        from megatron.energon.flavors.webdataset.metadata import WebdatasetMeta
    except ImportError as error:
        raise ConfigError(
            f"{folder}: WebDataset stores need energon ({error}); `pip install 'internvl_megatron[energon]'`"
        ) from error
    try:
        return WebdatasetMeta.from_config(EPath(folder.absolute()), split_part=split)
    except Exception as error:  # of YAML, of energon's checks, of files
        raise DataError(
            f"{folder / META_FOLDER}: split '{split}' cannot be used ({type(error).__name__}: {error}); correct split.yaml "
            "or 'split' in the meta file, or run `energon prepare` again"
        ) from error


def _members(file: BinaryIO, sample: _Sample) -> Members:
    """The members of a sample, by their headers in the shard. Raises `FileError` if they are not those of the index."""
    from megatron.energon.flavors.webdataset.config import skip_meta_re, split_name_re

    size = os.fstat(file.fileno()).st_size
    spans: dict[str, Span] = {}
    file.seek(sample.start)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            parts = split_name_re.match(member.name)
            if member.isreg() and parts is not None and not skip_meta_re.match(member.name):
                key, extension = parts.groups()
                if key != sample.key:
                    raise _changed(sample, f"has {member.name!r} there")
                if extension in spans or member.issparse():
                    raise FileError(
                        "unreadable",
                        f"{sample.where}: has the member {member.name!r} twice or in pieces; write the shard again",
                    )
                if member.offset_data + member.size > size:
                    raise _changed(sample, f"is cut off inside {member.name!r}")
                spans[extension] = Span(member.offset_data, member.size, member.name)
            if tar.offset >= sample.end:
                break
        if tar.offset != sample.end or not spans:
            raise _changed(sample, f"ends or has no header at byte {tar.offset}")
    return Members(sample.shard, sample.key, spans)


def _changed(sample: _Sample, what: str) -> FileError:
    return FileError(
        "unreadable",
        f"{sample.where}: is not where energon's index has it, bytes {sample.start} to {sample.end}: the shard {what}; if it "
        "was written again or is compressed, run `energon prepare` on plain tar files",
    )
