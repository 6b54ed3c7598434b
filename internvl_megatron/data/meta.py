"""InternVL's data files: the meta JSON that lists the data sets, and their records: jsonl files, read by byte offset, or stores."""

import difflib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from internvl_megatron.data.energon_store import DEFAULT_SPLIT, EnergonStore
from internvl_megatron.data.files import is_folder, is_url
from internvl_megatron.data.json_object import parse_object
from internvl_megatron.data.jsonl_index import JsonlIndex, index_all, index_in_memory, open_index
from internvl_megatron.data.permutation import NUM_KEYS, Permutation
from internvl_megatron.data.seeds import Purpose, name_key, words
from internvl_megatron.errors import DataError

_REQUIRED_KEYS = ("root", "annotation", "data_augment", "repeat_time")
_OPTIONAL_KEYS = ("length", "max_dynamic_patch", "group", "split")
_KEPT_ORDERS = 4
"""Of a data set: streams of a leader are in different epochs of it while they go from one to the next."""


@dataclass(frozen=True, slots=True)
class DatasetEntry:
    """One data set of a meta file, checked."""

    name: str
    root: Path | str
    """Folder image paths are relative to, or its URL; not used of a store, whose media are in it."""
    annotation: Path
    """The jsonl file, or the folder of a store."""
    repeat_time: float
    """Below 1: only the first such share of the lines is used. Otherwise whole: the lines are used so many times."""
    data_augment: bool
    """JPEG augmentation of the images."""
    max_tiles: int | None
    """Replaces `DataConfig.max_tiles` (`max_dynamic_patch` in the file); None = it does not."""
    group: str | None = None
    """Data sets that share a weight of `DataConfig.group_weights`."""
    split: str | None = None
    """Of a WebDataset store, the split to use; None = 'train'."""


class Records(Protocol):
    """Records of a data set, by number. Processes and threads may share them, and they may be pickled."""

    def __len__(self) -> int:
        """Number of records."""
        ...

    def where(self, index: int) -> str:
        """Place of a record, for messages."""
        ...

    def read(self, index: int) -> dict[str, Any]:
        """The JSON object of record `index`; a `SampleRecord` if its media are not files of their own.

        Raises:
            DataError: it is broken; a `FileError` if a file of it is.
        """
        ...


class JsonlFile:
    """Records of a jsonl file, found by byte offset and read one at a time. Blank lines are not records.

    It holds no descriptor, so processes and threads may share it, and may be pickled.
    """

    def __init__(self, path: Path, index: JsonlIndex | None = None) -> None:
        """Use an index, or make one in memory, which is for small files. Raises `DataError` if there is no record."""
        self.path = path
        self._index = index_in_memory(path) if index is None else index
        if not len(self._index):
            raise DataError(f"{path}: has no records")

    def __len__(self) -> int:
        """Number of records."""
        return len(self._index)

    def where(self, index: int) -> str:
        """`file:line` of a record, line counted from 1."""
        return f"{self.path}:{self._index.line(index)}"

    def read(self, index: int) -> dict[str, Any]:
        """The JSON object of record `index`.

        Raises:
            DataError: the line is not one, or the file is not the one that was indexed.
        """
        return parse_object(self._line(index), self.where(index), "each line")

    def _line(self, index: int) -> bytes:
        """The bytes of a record's line."""
        start, end = self._index.span(index)
        before = min(start, 1)  # the line break before it is read as well, to see that it is there
        try:
            with self.path.open("rb", buffering=0) as file:
                content = os.pread(file.fileno(), end - start + before, start - before)
        except OSError as error:
            raise DataError(f"{self.where(index)}: cannot be read ({error.strerror})") from error
        is_last = index == len(self) - 1
        if (
            len(content) < end - start + before
            or content[:before].strip(b"\n")
            or not (is_last or content[-1:] == b"\n")
        ):
            raise DataError(
                f"{self.where(index)}: is not where it was when the file was indexed; put the file back as it was, or start "
                "again, and it is indexed anew"
            )
        return content[before:].partition(b"\n")[0]


class Dataset:
    """A data set: its entry in the meta file and its records."""

    def __init__(self, entry: DatasetEntry, index_folder: Path | None = None) -> None:
        """Open the annotation, a jsonl file by its index, which is made if there is none (`jsonl_index.open_index`).

        Raises:
            DataError: the annotation cannot be used.
            ConfigError: a program that reads it is not installed.
        """
        self.entry = entry
        self.key = name_key(entry.name)
        """Stands for the data set in the seeds of random numbers."""
        self.file = open_records(entry, index_folder)
        share = min(1.0, entry.repeat_time)
        self.num_records = int(len(self.file) * share)
        """Records in use: the first ones."""
        if not self.num_records:
            raise DataError(
                f"{entry.annotation}: repeat_time {entry.repeat_time} leaves none of its {len(self.file)} records; "
                "raise it"
            )
        self.num_repeats = max(1, int(entry.repeat_time))
        self._orders: dict[tuple[int, int], Permutation] = {}

    @property
    def length(self) -> int:
        """Samples of one epoch, repeats counted."""
        return self.num_records * self.num_repeats

    def sample(self, seed: int, epoch: int, place: int) -> tuple[int, int]:
        """(record, pass over it) at a place of an epoch's order, `length` places.

        Every record in use is at `num_repeats` places, each time for another pass, which counts on from epoch to epoch.
        """
        order = self._orders.get((seed, epoch))
        if order is None:
            if len(self._orders) == _KEPT_ORDERS:
                del self._orders[next(iter(self._orders))]
            order = Permutation(self.length, words(NUM_KEYS, seed, Purpose.SHUFFLE, self.key, epoch))
            self._orders[seed, epoch] = order
        repeat, record = divmod(order(place), self.num_records)
        return record, epoch * self.num_repeats + repeat


def open_records(entry: DatasetEntry, index_folder: Path | None = None) -> Records:
    """The records of a data set: a folder is a WebDataset store, everything else a jsonl file.

    Raises:
        DataError: the annotation cannot be used.
        ConfigError: a program that reads it is not installed.
    """
    if is_folder(str(entry.annotation)):
        return EnergonStore(entry.annotation, entry.split or DEFAULT_SPLIT)
    if entry.split is not None:
        raise DataError(f"{entry.annotation}: is not a folder; 'split' is for WebDataset stores, leave it out")
    return JsonlFile(entry.annotation, open_index(entry.annotation, index_folder))


def jsonl_files(entries: Sequence[DatasetEntry]) -> list[Path]:
    """The jsonl files among the annotations, which are those that need an index; each once."""
    files = [entry.annotation for entry in entries if not is_folder(str(entry.annotation))]
    return list(dict.fromkeys(files))


def prepare_records(entries: Sequence[DatasetEntry], index_folder: Path | None, num_threads: int) -> None:
    """Make those indices of jsonl files that are missing, and open the stores once to see what is wrong with them.

    Raises:
        DataError: an annotation cannot be used.
        ConfigError: a program that reads it is not installed.
    """
    index_all(jsonl_files(entries), index_folder, num_threads)
    for entry in entries:
        if is_folder(str(entry.annotation)):
            open_records(entry)


def load_datasets(meta_path: str | Path, index_folder: Path | None = None) -> list[Dataset]:
    """All data sets of a meta file, by their indices, which are made if there are none. Raises as `Dataset`."""
    return [Dataset(entry, index_folder) for entry in read_meta(meta_path)]


def read_meta(meta_path: str | Path) -> list[DatasetEntry]:
    """Read and check a meta file. Relative paths in it are relative to its own folder.

    Raises:
        DataError: with every problem of the file, one a line.
    """
    path = Path(meta_path)
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); set data.meta to an InternVL meta file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not a valid meta file ({error})") from error
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path}: must be a JSON object with one entry per data set")
    problems = [f"{path}: {name}: {text}" for name, entry in content.items() for text in _problems(entry)]
    if problems:
        raise DataError("\n".join(problems))
    return [_entry(name, entry, path.parent) for name, entry in content.items()]


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refused if a key is there twice (JSON readers silently keep the last)."""
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} given more than once")
    return dict(pairs)


def _is_number(value: object, *kinds: type) -> bool:
    """Whether a JSON value is a number of one of the kinds; true and false are not numbers."""
    return isinstance(value, kinds) and not isinstance(value, bool)


def _problems(entry: object) -> list[str]:
    """What is wrong with one data set's entry."""
    if not isinstance(entry, dict):
        return [f"must be an object with {', '.join(_REQUIRED_KEYS)}"]
    known = (*_REQUIRED_KEYS, *_OPTIONAL_KEYS)
    problems = [f"'{key}' is missing" for key in _REQUIRED_KEYS if key not in entry]
    for key in entry:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)
            problems.append(f"'{key}' is not a known key; did you mean '{nearest[0]}'?")
    checks = {
        "root": (lambda value: isinstance(value, str), "must be a string"),
        "annotation": (
            lambda value: isinstance(value, str) and value,
            "must be the path of a jsonl file or of a WebDataset store",
        ),
        "data_augment": (lambda value: isinstance(value, bool), "must be true or false"),
        "repeat_time": (_valid_repeat_time, "must be a fraction between 0 and 1 or a whole number from 1"),
        "length": (lambda value: _is_number(value, int), "must be a whole number"),
        "max_dynamic_patch": (lambda value: _is_number(value, int) and value >= 1, "must be a whole number from 1"),
        "group": (lambda value: isinstance(value, str) and value, "must be the name of a group"),
        "split": (lambda value: isinstance(value, str) and value, "must be the name of a split"),
    }
    problems += [
        f"'{key}' {demand}, not {json.dumps(entry[key])}"
        for key, (is_valid, demand) in checks.items()
        if key in entry and not is_valid(entry[key])
    ]
    return problems


def _valid_repeat_time(value: Any) -> bool:
    """Whether a repeat_time is a fraction of the lines or a whole number of passes (NaN and infinity are neither)."""
    return _is_number(value, int, float) and (0 < value < 1 or (1 <= value < 1e6 and float(value).is_integer()))


def _entry(name: str, entry: dict[str, Any], folder: Path) -> DatasetEntry:
    """A checked entry, its paths made relative to the meta file's folder."""
    return DatasetEntry(
        name=name,
        root=entry["root"] if is_url(entry["root"]) else folder / entry["root"],
        annotation=folder / entry["annotation"],
        repeat_time=float(entry["repeat_time"]),
        data_augment=entry["data_augment"],
        max_tiles=entry.get("max_dynamic_patch"),
        group=entry.get("group"),
        split=entry.get("split"),
    )
