"""Check records as the trainer reads them, and count what is wrong by kind, with the first few of each kind."""

import re
from collections.abc import Sequence
from ctypes import c_longlong
from dataclasses import dataclass, field, replace
from itertools import pairwise

from internvl_megatron.data.dataset import Dataset
from internvl_megatron.data.decode_pool import DecodePool
from internvl_megatron.data.files import FileError
from internvl_megatron.data.images import ImageRef
from internvl_megatron.data.records import (
    Record,
    Sample,
    SampleError,
    SampleSettings,
    num_supervised,
    parse_record,
    render_sample,
)
from internvl_megatron.data.seeds import Purpose, generator
from internvl_megatron.data.stream import stored_row
from internvl_megatron.data.tokenizer import GROUNDING_TOKENS, Tokenizer
from internvl_megatron.errors import DataError
from tools.data_settings import printable

FIRST_FEW = 5
"""Records of a kind that are named, in each data set."""

CRASH = "crash"
"""Kind of fault of a record that ends the process that checks it; the others are `ErrorKind`."""
WHEN_DECODED = " (decoding)"
"""Behind the kind of a fault that only decoding shows."""

CUT = "cut"
CONTROL_TOKENS = "control tokens"
NOT_TRAINED = "nothing trained on"
"""Kinds of notices: a sample is cut to the row; a text spells names of special tokens; no token of a sample carries loss."""


@dataclass(slots=True)
class Kind:
    """Records that have something in common."""

    count: int = 0
    first: list[tuple[int, str, str]] = field(default_factory=list)
    """(record, `file:line`, reason) of the first few, by ascending record."""

    def add(self, record: int, where: str, reason: str) -> None:
        """Count a record."""
        self.merge(Kind(1, [(record, where, printable(reason.removeprefix(f"{where}: ")))]))

    def merge(self, other: "Kind") -> None:
        """Count those of another part of the file."""
        self.count += other.count
        self.first = sorted(self.first + other.first)[:FIRST_FEW]


@dataclass(slots=True)
class Tally:
    """What was found in some records of one data set."""

    num_records: int = 0
    faults: dict[str, Kind] = field(default_factory=dict)
    """By kind; a record has one fault at most, the first that is met."""
    notices: dict[str, Kind] = field(default_factory=dict)
    """By kind; of good records, which may have several."""

    @property
    def num_faulty(self) -> int:
        """Records with a fault."""
        return sum(kind.count for kind in self.faults.values())

    @property
    def num_good(self) -> int:
        """Records without a fault."""
        return self.num_records - self.num_faulty

    def merge(self, other: "Tally") -> None:
        """Add what was found in others."""
        self.num_records += other.num_records
        for mine, theirs in ((self.faults, other.faults), (self.notices, other.notices)):
            for name, kind in theirs.items():
                mine.setdefault(name, Kind()).merge(kind)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Records `start` to `stop` of a data set."""

    dataset: int
    start: int
    stop: int

    def around(self, record: int) -> "list[Chunk]":
        """The records before one of the chunk's, itself, and those after it; nothing if it is the only one."""
        if self.stop - self.start == 1:
            return []
        bounds = (self.start, record, record + 1, self.stop)
        return [Chunk(self.dataset, start, stop) for start, stop in pairwise(bounds) if start < stop]


class RecordChecker:
    """Makes samples of records as the first pass of training would, with its seeds."""

    def __init__(
        self, datasets: Sequence[Dataset], settings: SampleSettings, tokenizer: Tokenizer, decoder: DecodePool | None
    ) -> None:
        """Without a `decoder` only headers of images and videos are read.

        Raises:
            DataError: a store's rows were packed with other settings.
        """
        for dataset in datasets:
            if dataset.store is not None:
                dataset.store.check(settings, tokenizer)
        self._datasets = datasets
        self._settings = settings
        self._tokenizer = tokenizer
        self._decoder = decoder
        names = [name for name in tokenizer.special_ids() if name not in GROUNDING_TOKENS]
        self._control_token = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))

    def check(self, chunk: Chunk, at: c_longlong) -> Tally:
        """Check some records; `at` is kept at the one that is being checked.

        Raises:
            DataError: the annotation file or its index is no longer what it was.
            ConfigError: a program that reads such files is not installed.
        """
        dataset, tally = self._datasets[chunk.dataset], Tally(chunk.stop - chunk.start)
        for number in range(chunk.start, chunk.stop):
            at.value, where = number, dataset.where(number)
            try:
                notices = self._check(dataset, number, where)
            except SampleError as error:
                tally.faults.setdefault(error.kind, Kind()).add(number, where, str(error))
            except FileError as error:
                tally.faults.setdefault(error.fault + WHEN_DECODED, Kind()).add(number, where, str(error))
            else:
                for kind, text in notices.items():
                    tally.notices.setdefault(kind, Kind()).add(number, where, text)
        return tally

    def _check(self, dataset: Dataset, number: int, where: str) -> dict[str, str]:
        """Notices about a good record, by kind. Raises `SampleError`, or `FileError` for what only decoding shows."""
        if dataset.store is not None:
            self._decode(stored_row(dataset, number, self._settings).images)
            return {}
        try:
            raw = dataset.file.read(number)
        except FileError as error:
            raise SampleError(error.fault, str(error)) from error
        except DataError as error:
            raise SampleError("json", str(error)) from error
        record = parse_record(raw, where, dataset.entry, self._settings.data.max_tiles)
        sample, notices = self._render(record, dataset, number)
        self._decode(sample.images)
        found = [match[0] for turn in record.turns if (match := self._control_token.search(turn.text))]
        if found:
            effect = "stays text" if self._settings.data.special_tokens_in_text == "as_text" else "becomes a token"
            notices[CONTROL_TOKENS] = f"a text spells {found[0]}, which {effect} (data.special_tokens_in_text)"
        if not num_supervised(sample.labels[1:]):
            notices[NOT_TRAINED] = "no token of it carries loss"
        return notices

    def _decode(self, images: Sequence[ImageRef]) -> None:
        """Decode images, if that is to be checked. Raises `FileError`."""
        if self._decoder is not None:
            for image in images:
                self._decoder.submit(image).result()

    def _render(self, record: Record, dataset: Dataset, number: int) -> tuple[Sample, dict[str, str]]:
        """The sample, and whether it was cut."""
        data = self._settings.data

        def render(settings: SampleSettings) -> Sample:
            seed, key = data.seed, dataset.key
            return render_sample(
                record, settings, self._tokenizer, lambda image: generator(seed, Purpose.IMAGE, key, number, 0, image)
            )

        try:  # first without cutting, to see whether it is needed
            return render(replace(self._settings, data=replace(data, on_long_sample="stop"))), {}
        except SampleError as error:
            if error.kind != "long" or data.on_long_sample != "truncate":
                raise
        return render(self._settings), {CUT: f"is cut to data.tokens_per_row={data.tokens_per_row} tokens"}
