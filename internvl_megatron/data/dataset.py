"""A data set of a run: its entry in the meta file, its records, and the order of an epoch."""

from collections.abc import Iterable
from pathlib import Path

from internvl_megatron.data.jsonl_index import open_index
from internvl_megatron.data.meta import DatasetEntry, JsonlFile, read_meta
from internvl_megatron.data.permutation import NUM_KEYS, Permutation
from internvl_megatron.data.row_store import RowStore, is_row_store
from internvl_megatron.data.seeds import Purpose, name_key, words
from internvl_megatron.errors import DataError

_KEPT_ORDERS = 4
"""Of a data set: streams of a leader are in different epochs of it while they go from one to the next."""


def open_annotation(entry: DatasetEntry, index_folder: Path | None = None) -> JsonlFile | RowStore:
    """What an entry's annotation is: a folder with packed rows, else a jsonl file.

    Raises:
        DataError: it cannot be used.
    """
    if not is_row_store(entry.annotation):
        return JsonlFile(entry.annotation, open_index(entry.annotation, index_folder))
    if entry.max_tiles is not None:
        raise DataError(
            f"{entry.annotation}: rows that are packed already have their tiles; remove 'max_dynamic_patch' of {entry.name!r}"
        )
    return RowStore(entry.annotation)


def files_to_index(entries: Iterable[DatasetEntry]) -> list[Path]:
    """The annotations that need an index: jsonl files."""
    return [entry.annotation for entry in entries if not is_row_store(entry.annotation)]


class Dataset:
    """A data set: its entry in the meta file and its records."""

    def __init__(self, entry: DatasetEntry, index_folder: Path | None = None) -> None:
        """Open the annotation: a store of packed rows, or a jsonl file by its index, which is made if there is none.

        Raises:
            DataError: the annotation cannot be used.
        """
        self.entry = entry
        self.key = name_key(entry.name)
        """Stands for the data set in the seeds of random numbers."""
        annotation = open_annotation(entry, index_folder)
        self.store = annotation if isinstance(annotation, RowStore) else None
        """Of a data set of packed rows: these are its records, and there is no file."""
        self._file = None if isinstance(annotation, RowStore) else annotation
        share = min(1.0, entry.repeat_time)
        self.num_records = int(len(annotation) * share)
        """Records in use: the first ones of the file."""
        if not self.num_records:
            raise DataError(
                f"{entry.annotation}: repeat_time {entry.repeat_time} leaves none of its {len(annotation)} records; "
                "raise it"
            )
        self.num_repeats = max(1, int(entry.repeat_time))
        self._orders: dict[tuple[int, int], Permutation] = {}

    @property
    def file(self) -> JsonlFile:
        """The records, of a data set that is not of packed rows."""
        assert self._file is not None, f"{self.entry.annotation} has rows, not records"
        return self._file

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
