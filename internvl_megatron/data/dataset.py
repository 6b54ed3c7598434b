"""A data set of a run: its entry in the meta file, its records, and the order of an epoch."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from internvl_megatron.data.energon_store import DEFAULT_SPLIT, EnergonStore
from internvl_megatron.data.files import is_folder, local_copy
from internvl_megatron.data.jsonl_file import JsonlFile
from internvl_megatron.data.jsonl_index import index_all, open_index
from internvl_megatron.data.meta import DatasetEntry, read_meta
from internvl_megatron.data.permutation import NUM_KEYS, Permutation
from internvl_megatron.data.row_store import RowStore, is_row_store
from internvl_megatron.data.seeds import Purpose, name_key, words
from internvl_megatron.errors import DataError
from internvl_megatron.object_store import is_url

COPIES_FOLDER = "annotations"
"""In the folder of indices: copies of annotations that are behind URLs."""
_KEPT_ORDERS = 4
"""Of a data set: streams of a leader are in different epochs of it while they go from one to the next."""


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


def open_records(entry: DatasetEntry, index_folder: Path | None = None) -> Records | RowStore:
    """What an entry's annotation is: a store of packed rows, a WebDataset store (any other folder), or a jsonl file.

    Raises:
        DataError: the annotation cannot be used.
        ConfigError: a program that reads it is not installed.
    """
    folder = Path(entry.annotation)
    if is_row_store(folder):
        for key, value in (("max_dynamic_patch", entry.max_tiles), ("split", entry.split)):
            if value is not None:
                raise DataError(f"{entry.annotation}: its rows are packed already; remove {key!r} of {entry.name!r}")
        return RowStore(folder)
    if is_folder(str(entry.annotation)):
        if is_url(str(entry.annotation)):
            raise DataError(f"{entry.annotation}: stores must be local folders; copy it")
        return EnergonStore(folder, entry.split or DEFAULT_SPLIT)
    if entry.split is not None:
        raise DataError(f"{entry.annotation}: is not a folder; 'split' is for WebDataset stores, leave it out")
    path = _local_file(entry, index_folder)
    return JsonlFile(path, open_index(path, index_folder), str(entry.annotation))


def _local_file(entry: DatasetEntry, index_folder: Path | None) -> Path:
    """An entry's jsonl file, or a copy of it if it is behind a URL: records are read in any order, a few hundred bytes each."""
    if not is_url(str(entry.annotation)):
        return Path(entry.annotation)
    if index_folder is None:
        raise DataError(
            f"{entry.annotation}: is a URL; set data.index_folder to a local folder that can hold a copy of it"
        )
    return local_copy(str(entry.annotation), index_folder / COPIES_FOLDER)


def jsonl_files(entries: Iterable[DatasetEntry], index_folder: Path | None) -> list[Path]:
    """The jsonl files among the annotations, which are those that need an index, each once; those behind URLs are copied.

    Raises:
        DataError: a URL cannot be read, or there is no folder for its copy.
        ConfigError: a program that reads such URLs is not installed.
    """
    files = [_local_file(entry, index_folder) for entry in entries if not is_folder(str(entry.annotation))]
    return list(dict.fromkeys(files))


def prepare_records(entries: Sequence[DatasetEntry], index_folder: Path | None, num_threads: int) -> None:
    """Make those indices of jsonl files that are missing, and open the stores once to see what is wrong with them.

    Raises:
        DataError: an annotation cannot be used.
        ConfigError: a program that reads it is not installed.
    """
    index_all(jsonl_files(entries, index_folder), index_folder, num_threads)
    for entry in entries:
        if is_folder(str(entry.annotation)):
            open_records(entry)


class Dataset:
    """A data set: its entry in the meta file and its records."""

    def __init__(self, entry: DatasetEntry, index_folder: Path | None = None) -> None:
        """Open the annotation; the index of a jsonl file is made if there is none (`jsonl_index.open_index`).

        Raises:
            DataError: the annotation cannot be used.
            ConfigError: a program that reads it is not installed.
        """
        self.entry = entry
        self.key = name_key(entry.name)
        """Stands for the data set in the seeds of random numbers."""
        annotation = open_records(entry, index_folder)
        self.store = annotation if isinstance(annotation, RowStore) else None
        """Of a data set of packed rows: these are its records, and there is no file."""
        self._file = None if isinstance(annotation, RowStore) else annotation
        self.num_in_all = len(annotation)
        """Records there are, in use or not."""
        share = min(1.0, entry.repeat_time)
        self.num_records = int(self.num_in_all * share)
        """Records in use: the first ones."""
        if not self.num_records:
            raise DataError(
                f"{entry.annotation}: repeat_time {entry.repeat_time} leaves none of its {self.num_in_all} records; "
                "raise it"
            )
        self.num_repeats = max(1, int(entry.repeat_time))
        self._orders: dict[tuple[int, int], Permutation] = {}

    @property
    def file(self) -> Records:
        """The records, of a data set that is not of packed rows."""
        assert self._file is not None, f"{self.entry.annotation} has rows, not records"
        return self._file

    def where(self, index: int) -> str:
        """Place of a record or a packed row, for messages."""
        return self.file.where(index) if self.store is None else self.store.where(index)

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


def load_datasets(meta_path: str | Path, index_folder: Path | None = None) -> list[Dataset]:
    """All data sets of a meta file, by their indices, which are made if there are none. Raises `DataError`."""
    return [Dataset(entry, index_folder) for entry in read_meta(meta_path)]
