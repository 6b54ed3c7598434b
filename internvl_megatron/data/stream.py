"""A stream of packed rows whose content depends on its number alone, and whose exact position can be saved.

A run has as many streams as a step has rows: row k of every step comes from stream k, whichever rank reads it. So the
data do not depend on the number of ranks or workers, and a run may go on with another layout.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import numpy as np

from internvl_megatron.data.meta import Dataset
from internvl_megatron.data.packing import Pack, Packer, Row, SampleSource, build_row, padded_length
from internvl_megatron.data.records import ImageRng, Sample, SampleError, SampleSettings, parse_record, render_sample
from internvl_megatron.data.seeds import Purpose, generator
from internvl_megatron.data.tokenizer import Tokenizer
from internvl_megatron.errors import DataError

_logger = logging.getLogger(__name__)

_SHAPING_SETTINGS = (
    "tokens_per_row", "tiles_per_row", "packing_buffer_rows", "min_tiles", "max_tiles", "use_thumbnail",
    "system_prompt", "v2pe", "v2pe_numerator", "on_bad_sample", "on_long_sample", "sample_multiple_tokens",
    "min_video_frames", "max_video_frames", "allow_outside_root", "special_tokens_in_text",
)  # fmt: skip
"""Settings of `DataConfig` that decide which samples a row has and what they look like."""

LOGGED_OF_A_KIND = 3
"""Messages of a stream about samples that are bad in the same way."""

ALWAYS_ALLOWED = 20
"""Bad samples a stream may leave out whatever their share."""

_Item = tuple[SampleSource, Sample]


class SampleStream:
    """Stream `index` of `num_streams`: shuffled samples of all data sets, packed into rows, without end.

    The records of each data set are shuffled once and dealt to the streams in turn; a stream that has used up its share
    goes through it again in the same order (InternVL `PackedDataset`). The next sample's data set is drawn with a
    probability proportional to its length, repeats counted.
    """

    def __init__(
        self, datasets: Sequence[Dataset], settings: SampleSettings, tokenizer: Tokenizer, index: int, num_streams: int
    ) -> None:
        """Start at the beginning; `load_state_dict` moves elsewhere. Data sets may be shared between streams."""
        assert 0 <= index < num_streams, f"stream {index} of {num_streams}"
        self.index = index
        self.num_streams = num_streams
        self._datasets = datasets
        self._settings = settings
        self._tokenizer = tokenizer
        self._shares = [self._share(number, dataset) for number, dataset in enumerate(datasets)]
        lengths = np.array([dataset.length for dataset in datasets], dtype=np.float64)
        self._choice_bounds = np.cumsum(lengths / lengths.sum())
        self._taken = [0] * len(datasets)
        """Samples drawn from each data set so far."""
        self._serial = 0
        """Samples drawn so far: the number of the next draw."""
        self._skipped: dict[str, int] = {}
        self._bad_in_a_row = [0] * len(datasets)
        data = settings.data
        self._packer: Packer[_Item] = Packer(data.tokens_per_row, data.tiles_per_row, data.packing_buffer_rows)

    @property
    def skipped(self) -> dict[str, int]:
        """Samples left out so far, by kind of error."""
        return dict(self._skipped)

    def next_row(self) -> Row:
        """The next packed row.

        Raises:
            DataError: a sample is bad and the policy says stop, or a whole pass gave no good sample.
        """
        pack = None
        while pack is None:
            source = self._draw()
            sample = self._render_or_skip(source)
            if sample is not None:
                pack = self._packer.add((source, sample), padded_length(sample, self._settings), sample.num_tiles)
        return build_row(pack.items, self._settings, self._tokenizer.pad_id)

    def state_dict(self) -> dict[str, Any]:
        """Position of the stream, as JSON. Buffered samples are saved as references and made again on loading."""
        return {
            "identity": self._identity(),
            "serial": self._serial,
            "taken": list(self._taken),
            "skipped": dict(self._skipped),
            "open_packs": [[list(astuple(source)) for source, _ in pack.items] for pack in self._packer.open_packs],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; the rows that follow are exactly those that followed it then.

        Raises:
            DataError: the state was saved with other data, or a buffered sample cannot be made any more.
        """
        identity = self._identity()
        if state["identity"] != identity:
            changed = [key for key in identity if state["identity"].get(key) != identity[key]]
            details = "; ".join(f"{key} was {state['identity'].get(key)}, is {identity[key]}" for key in changed)
            raise DataError(
                f"the saved position of data stream {self.index} is for other data ({details}); restore them"
            )
        self._serial = int(state["serial"])
        self._taken = [int(count) for count in state["taken"]]
        self._skipped = {kind: int(count) for kind, count in state["skipped"].items()}
        self._bad_in_a_row = [0] * len(self._datasets)
        self._packer.open_packs = [self._restore(pack) for pack in state["open_packs"]]

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a saved position to mean anything."""
        data = self._settings.data
        return {
            "stream": [self.index, self.num_streams],
            "seed": data.seed,
            "datasets": [[dataset.entry.name, dataset.num_records, dataset.num_repeats] for dataset in self._datasets],
            "vocabulary": len(self._tokenizer),
            "tile": [self._settings.tile_pixels, self._settings.tokens_per_tile],
            **{name: getattr(data, name) for name in _SHAPING_SETTINGS},
        }

    def _share(self, number: int, dataset: Dataset) -> np.ndarray:
        """Records of a data set this stream goes through, in order.

        A data set with fewer records than there are streams gives one of them to every stream, some to several, so that
        no stream lacks a data set.
        """
        order = dataset.shuffled_records(generator(self._settings.data.seed, Purpose.SHUFFLE, number))
        return order[self.index % len(order) :: self.num_streams].copy()

    def _draw(self) -> SampleSource:
        """Choose the next sample."""
        chosen = generator(self._settings.data.seed, Purpose.CHOOSE, self.index, self._serial).random()
        number = min(int(np.searchsorted(self._choice_bounds, chosen, side="right")), len(self._datasets) - 1)
        share = self._shares[number]
        source = SampleSource(number, int(share[self._taken[number] % len(share)]), self._serial)
        self._taken[number] += 1
        self._serial += 1
        return source

    def _render(self, source: SampleSource) -> Sample:
        """Make a sample from its record. The same source always gives the same sample."""
        seed = self._settings.data.seed
        return render_source(
            self._datasets[source.dataset],
            source.record,
            self._settings,
            self._tokenizer,
            lambda image: generator(seed, Purpose.IMAGE, self.index, source.serial, image),
        )

    def _render_or_skip(self, source: SampleSource) -> Sample | None:
        """The sample, or None if it is bad and the policy says to leave it out."""
        try:
            sample = self._render(source)
        except SampleError as error:
            apply_policy(error, self._settings, self._skipped, self._serial)
            self._bad_in_a_row[source.dataset] += 1
            if all(bad >= len(share) for bad, share in zip(self._bad_in_a_row, self._shares, strict=True)):
                raise DataError(
                    f"data stream {self.index}: a whole pass over its data gave no good sample ({self._skipped} left "
                    f"out); the last one: {error}"
                ) from error
            return None
        self._bad_in_a_row = [0] * len(self._datasets)
        return sample

    def _restore(self, pack: list[list[int]]) -> Pack[_Item]:
        """A pack from the references of its samples."""
        sources = [SampleSource(*reference) for reference in pack]
        items = [(source, self._render(source)) for source in sources]
        tokens = sum(padded_length(sample, self._settings) for _, sample in items)
        return Pack(items, tokens, sum(sample.num_tiles for _, sample in items))


def render_source(
    dataset: Dataset, record: int, settings: SampleSettings, tokenizer: Tokenizer, image_rng: ImageRng
) -> Sample:
    """Read record number `record` of a data set and make the sample. Raises `SampleError`."""
    where = dataset.file.where(record)
    try:
        raw = dataset.file.read(record)
    except DataError as error:
        raise SampleError("json", str(error)) from error
    parsed = parse_record(raw, where, dataset.entry, settings.data.max_tiles)
    return render_sample(parsed, settings, tokenizer, image_rng)


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
