"""A stream of packed rows whose content depends on its number alone, and whose exact position can be saved.

A run has as many streams as a step has rows: row k of every step comes from stream k, whichever rank reads it. So the
data do not depend on the number of ranks or workers, and a run may go on with another layout.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np

from internvl_megatron.data.dataset import Dataset
from internvl_megatron.data.files import FileError
from internvl_megatron.data.mixture import Group, Mixture, dataset_groups
from internvl_megatron.data.packer import Pack
from internvl_megatron.data.preference import Pair, parse_pair, render_pair
from internvl_megatron.data.records import ImageRng, Sample, SampleError, SampleSettings, parse_record, render_sample
from internvl_megatron.data.reference_file import ReferenceFile
from internvl_megatron.data.row_packer import RowPacker, make_packer
from internvl_megatron.data.rows import Row, SampleSource, build_row, padded_length, segments_of
from internvl_megatron.data.seeds import Purpose, generator
from internvl_megatron.data.tokenizer import Tokenizer
from internvl_megatron.errors import DataError

_logger = logging.getLogger(__name__)

SHAPING_SETTINGS = (
    "tokens_per_row", "tiles_per_row", "packing", "packing_pool_samples", "packing_window_rows", "packing_buffer_rows",
    "min_tiles", "max_tiles", "use_thumbnail", "min_video_frames", "max_video_frames", "system_prompt", "v2pe",
    "v2pe_numerator", "on_bad_sample", "on_long_sample", "sample_multiple_tokens", "allow_outside_root",
    "special_tokens_in_text",
)  # fmt: skip
"""Settings of `DataConfig` that decide which samples a row has and what they look like."""

LOGGED_OF_A_KIND = 3
"""Messages of a stream about samples that are bad in the same way."""

ALWAYS_ALLOWED = 20
"""Bad samples a stream may leave out whatever their share."""

_Item = tuple[SampleSource, Sample | Pair | Row]
"""What is drawn: a sample, a pair of them, or a row that was packed before."""


@dataclass(frozen=True, slots=True)
class _LeftOut:
    """A bad sample of a group, and why."""

    group: int
    reason: SampleError


class SampleStream:
    """Stream `index` of `num_streams`: samples of all data sets in random order, packed into rows, without end.

    The samples of each data set are put in an order that is another one in every epoch (InternVL's `PackedDataset` goes
    through the same order again), and dealt to the streams in turn. `Mixture` says which data set is next.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        settings: SampleSettings,
        tokenizer: Tokenizer,
        index: int,
        num_streams: int,
        reference: ReferenceFile | None = None,
    ) -> None:
        """Start at the beginning; `load_state_dict` moves elsewhere. Data sets may be shared between streams.

        With `reference` every pair has its log-probabilities.

        Raises:
            DataError: data sets and group weights do not go together, or there are too few samples for so many streams.
        """
        assert 0 <= index < num_streams, f"stream {index} of {num_streams}"
        self.index = index
        self.num_streams = num_streams
        self._datasets = datasets
        self._settings = settings
        self._tokenizer = tokenizer
        self._reference = reference
        groups = dataset_groups([dataset.entry for dataset in datasets], settings.data.group_weights)
        lengths = [dataset.length for dataset in datasets]
        self._mixture = Mixture(lengths, groups, settings.data.seed, index, num_streams)
        self._identity = self._make_identity(groups)
        self._skipped: dict[str, int] = {}
        self._bad_in_a_row = [0] * len(groups)
        """Samples of each group left out since the last good one."""
        self._packer: RowPacker[_Item] = RowPacker(
            make_packer(settings.data), settings.data.packing_window_rows, self._window_order, self._attention_pairs
        )
        check_stores(datasets, settings, tokenizer)

    @property
    def skipped(self) -> dict[str, int]:
        """Samples left out so far, by kind of error."""
        return dict(self._skipped)

    def next_row(self) -> Row:
        """The next packed row.

        Raises:
            DataError: a sample is bad and the policy says stop, or a whole pass gave no good sample.
        """
        while (pack := self._packer.take()) is None:
            left_out = self._add_next()
            if left_out is not None:
                self._check_any_is_good(left_out)
        return self._row(pack)

    def rows_of_epoch(self) -> Iterator[Row]:
        """All rows of one epoch, of a stream that is at its beginning; the last ones are only as full as they get.

        Raises:
            DataError: a sample is bad and the policy says stop.
        """
        assert not sum(self._mixture.taken) and len(self._bad_in_a_row) == 1, "an epoch of one group, from its start"
        for _ in range(self._mixture.group_share(0)):
            self._add_next()
            while (pack := self._packer.take()) is not None:
                yield self._row(pack)
        for pack in self._packer.flush():
            yield self._row(pack)

    def state_dict(self) -> dict[str, Any]:
        """Position of the stream, as JSON. Buffered samples are saved as references and made again on loading."""
        return {
            "identity": self._identity,
            **self._mixture.state_dict(),
            "skipped": dict(self._skipped),
            "packing": self._packer.state_dict(lambda item: list(astuple(item[0]))),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; the rows that follow are exactly those that followed it then.

        Raises:
            DataError: the state was saved with other data, or a buffered sample cannot be made any more.
        """
        identity = self._identity
        if state["identity"] != identity:
            changed = [key for key in identity if state["identity"].get(key) != identity[key]]
            details = "; ".join(f"{key} was {state['identity'].get(key)}, is {identity[key]}" for key in changed)
            raise DataError(
                f"the saved position of data stream {self.index} is for other data ({details}); restore them"
            )
        self._mixture.load_state_dict(state)
        self._skipped = {kind: int(count) for kind, count in state["skipped"].items()}
        self._bad_in_a_row = [0] * len(self._bad_in_a_row)
        self._packer.load_state_dict(state["packing"], self._restore)

    def _make_identity(self, groups: Sequence[Group]) -> dict[str, Any]:
        """What must be the same for a saved position to mean anything."""
        data = self._settings.data
        names = {member: group.name for group in groups for member in group.members}
        datasets = [
            [
                dataset.entry.name,
                dataset.num_records,
                dataset.num_repeats,
                names[number],
                *([] if dataset.store is None else [dataset.store.digest]),
            ]
            for number, dataset in enumerate(self._datasets)
        ]
        # A state is saved for every stream: hundreds of data sets are not listed in each.
        digest = hashlib.blake2b(json.dumps(datasets).encode(), digest_size=8).hexdigest()
        num_samples = sum(dataset.length for dataset in self._datasets)
        return {
            "stream": [self.index, self.num_streams],
            "seed": data.seed,
            "datasets": f"{len(datasets)} of {num_samples} samples in an epoch, names, numbers and groups {digest}",
            "groups": [[group.name, group.weight] for group in groups],
            "vocabulary": len(self._tokenizer),
            "tile": [self._settings.tile_pixels, self._settings.tokens_per_tile],
            **{name: getattr(data, name) for name in SHAPING_SETTINGS},
        }

    def _draw(self) -> SampleSource:
        """Choose the next sample."""
        draw = self._mixture.draw()
        record, pass_number = self._datasets[draw.dataset].sample(self._settings.data.seed, draw.epoch, draw.place)
        return SampleSource(draw.dataset, record, pass_number)

    def _add_next(self) -> _LeftOut | None:
        """Draw what comes next and pack it, unless it is bad and the policy says to leave it out."""
        source = self._draw()
        group = self._mixture.group_of(source.dataset)
        try:
            made = self._make(source)
        except SampleError as error:
            apply_policy(error, self._settings, self._skipped, sum(self._mixture.taken))
            self._bad_in_a_row[group] += 1
            return _LeftOut(group, error)
        self._bad_in_a_row[group] = 0
        self._mixture.add_tokens(source.dataset, made.num_tokens)
        add = self._packer.add_row if isinstance(made, Row) else self._packer.add
        add((source, made), *self._size(made))
        return None

    def _row(self, pack: Pack[_Item]) -> Row:
        """The row of a pack."""
        samples = [(source, made) for source, made in pack.items if not isinstance(made, Row)]
        if samples:
            return build_row(samples, self._settings, self._tokenizer.pad_id)
        ((source, row),) = pack.items
        assert isinstance(row, Row), "rows that were packed before are alone"
        return replace(row, sources=(source,) * row.num_samples)

    def _make(self, source: SampleSource) -> Sample | Pair | Row:
        """What a record becomes. The same source always gives the same, in whatever stream."""
        dataset, seed = self._datasets[source.dataset], self._settings.data.seed
        if dataset.store is not None:
            return stored_row(dataset, source.record, self._settings)
        made = make_source(
            dataset,
            source.record,
            self._settings,
            self._tokenizer,
            lambda image: generator(seed, Purpose.IMAGE, dataset.key, source.record, source.pass_number, image),
        )
        return with_reference(made, self._reference, dataset, source.record)

    def _check_any_is_good(self, last: _LeftOut) -> None:
        """Raise `DataError` if all samples of a group are bad: there would never be a row."""
        # So many draws in a row hold a whole epoch, wherever they begin.
        if self._bad_in_a_row[last.group] >= 2 * self._mixture.group_share(last.group) - 1:
            raise DataError(
                f"data stream {self.index}: a whole pass over its data gave no good sample ({self._skipped} left out); the "
                f"last one: {last.reason}"
            ) from last.reason

    def _restore(self, reference: list[int]) -> tuple[_Item, int, int]:
        """What waits, with its tokens and tiles, from its reference."""
        source = SampleSource(*reference)
        made = self._make(source)
        return (source, made), *self._size(made)

    def _size(self, made: Sample | Pair | Row) -> tuple[int, int]:
        """Tokens and tiles it takes of a row."""
        tokens = len(made.token_ids) if isinstance(made, Row) else padded_length(made, self._settings)
        return tokens, made.num_tiles

    def _attention_pairs(self, item: _Item) -> int:
        """What an item costs in its row, but for its tokens, of which rows have about the same number."""
        made = item[1]
        if isinstance(made, Row):
            return int((made.segment_lengths[: made.num_samples].astype(np.int64) ** 2).sum())
        return sum(length**2 for length in segments_of(made, self._settings))

    def _window_order(self, window: int) -> list[int]:
        """The same in all streams: see `RowPacker`."""
        data = self._settings.data
        return generator(data.seed, Purpose.WINDOW, window).permutation(data.packing_window_rows).tolist()


def render_source(
    dataset: Dataset, record: int, settings: SampleSettings, tokenizer: Tokenizer, image_rng: ImageRng
) -> Sample:
    """Read record number `record` of a data set and make the sample. Raises `SampleError`."""
    raw, where = _read(dataset, record)
    parsed = parse_record(raw, where, dataset.entry, settings.data.max_tiles)
    return render_sample(parsed, settings, tokenizer, image_rng)


def make_source(
    dataset: Dataset, record: int, settings: SampleSettings, tokenizer: Tokenizer, image_rng: ImageRng
) -> Sample | Pair:
    """Read record number `record` and make what the run trains on, a sample or a pair. Raises `SampleError`."""
    if not settings.pairs:
        return render_source(dataset, record, settings, tokenizer, image_rng)
    raw, where = _read(dataset, record)
    records = parse_pair(raw, where, dataset.entry, settings.data.max_tiles)
    return render_pair(records, settings, tokenizer, image_rng)


def with_reference(
    made: Sample | Pair, reference: ReferenceFile | None, dataset: Dataset, record: int
) -> Sample | Pair:
    """A pair with its log-probabilities, if there is a file of them. Raises `DataError`."""
    if reference is None or not isinstance(made, Pair):
        return made
    return reference.added_to(made, dataset.entry.name, record, dataset.where(record))


def _read(dataset: Dataset, record: int) -> tuple[dict[str, Any], str]:
    """A record and its place."""
    try:
        return dataset.file.read(record), dataset.file.where(record)
    except FileError as error:
        raise SampleError(error.fault, str(error)) from error
    except DataError as error:
        raise SampleError("json", str(error)) from error


def check_stores(datasets: Sequence[Dataset], settings: SampleSettings, tokenizer: Tokenizer) -> None:
    """See that stores of packed rows among the data sets were made for this run.

    Raises:
        DataError: one was not, or the run trains on pairs, which stores do not hold.
    """
    for dataset in datasets:
        if dataset.store is None:
            continue
        if settings.pairs:
            raise DataError(
                f"{dataset.entry.annotation}: packed rows hold no pairs; with loss.kind=mpo give jsonl files of pairs"
            )
        dataset.store.check(settings, tokenizer)


def stored_row(dataset: Dataset, index: int, settings: SampleSettings) -> Row:
    """Row `index` of a store, without augmentation if its entry says so. Raises `SampleError`."""
    assert dataset.store is not None, f"{dataset.entry.annotation} has no packed rows"
    try:
        row = dataset.store.row(index, dataset.entry.root, settings.data.allow_outside_root)
    except FileError as error:
        raise SampleError(error.fault, str(error)) from error
    except DataError as error:
        raise SampleError("row", str(error)) from error
    if dataset.entry.data_augment:
        return row
    return replace(row, images=tuple(replace(image, jpeg_seed=None) for image in row.images))


def apply_policy(error: SampleError, settings: SampleSettings, skipped: dict[str, int], num_seen: int) -> None:
    """Stop for a bad sample, or leave it out: counted in `skipped`, and the first few of a kind logged.

    Args:
        error: what is wrong with it.
        settings: with the policies.
        skipped: samples left out so far, by kind.
        num_seen: samples drawn so far, this one included.

    Raises:
        SampleError: `error` itself, if the policy for its kind is to stop.
        DataError: more samples were left out for being bad than `max_skipped_share` allows.
    """
    policy = settings.data.on_long_sample if error.kind == "long" else settings.data.on_bad_sample
    if policy == "stop":
        raise error
    skipped[error.kind] = skipped.get(error.kind, 0) + 1
    if skipped[error.kind] <= LOGGED_OF_A_KIND:
        rest = " (more of this kind are only counted)" if skipped[error.kind] == LOGGED_OF_A_KIND else ""
        _logger.warning("sample left out, %s: %s%s", error.kind, error, rest)
    limit = settings.data.max_skipped_share
    num_bad = sum(count for kind, count in skipped.items() if kind != "long")  # long ones have a policy of their own
    if limit is not None and num_bad > largest_chance_count(limit, num_seen):
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(skipped.items()))
        raise DataError(
            f"{num_bad} of {num_seen} samples are bad, more than data.max_skipped_share={limit} ({kinds}); mend the data, or "
            f"raise the limit; the last one: {error}"
        ) from error


def largest_chance_count(share: float, num_seen: int) -> float:
    """Bad samples that may be among so many if the share of bad ones is as given: 4 standard deviations over the mean.

    Never below `ALWAYS_ALLOWED`: of a few samples many may be bad.
    """
    expected = share * num_seen
    return max(ALWAYS_ALLOWED, expected + 4 * math.sqrt(expected * (1 - share)))
