"""A stream of packed rows whose content depends on its number alone, and whose exact position can be saved.

A run has as many streams as a step has rows: row k of every step comes from stream k, whichever rank reads it. So the
data do not depend on the number of ranks or workers, and a run may go on with another layout.
"""

import logging
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import numpy as np

from internvl_megatron.data.meta import Dataset
from internvl_megatron.data.packing import Row, SampleSource, build_row, padded_length
from internvl_megatron.data.records import ImageRng, Sample, SampleError, SampleSettings, parse_record, render_sample
from internvl_megatron.data.row_packer import RowPacker, make_packer
from internvl_megatron.data.seeds import Purpose, generator
from internvl_megatron.data.tokenizer import Tokenizer
from internvl_megatron.errors import DataError

_logger = logging.getLogger(__name__)

_SHAPING_SETTINGS = (
    "tokens_per_row", "tiles_per_row", "packing", "packing_pool_samples", "packing_window_rows", "packing_buffer_rows",
    "min_tiles", "max_tiles", "use_thumbnail", "system_prompt", "v2pe", "v2pe_numerator", "on_bad_sample",
    "on_long_sample", "sample_multiple_tokens",
)  # fmt: skip
"""Settings of `DataConfig` that decide which samples a row has and what they look like."""

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
        self._packer: RowPacker[_Item] = RowPacker(
            make_packer(settings.data), settings.data.packing_window_rows, self._window_order
        )

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
            source = self._draw()
            sample = self._render_or_skip(source)
            if sample is not None:
                self._packer.add((source, sample), padded_length(sample, self._settings), sample.num_tiles)
        return build_row(pack.items, self._settings, self._tokenizer.pad_id)

    def state_dict(self) -> dict[str, Any]:
        """Position of the stream, as JSON. Buffered samples are saved as references and made again on loading."""
        return {
            "identity": self._identity(),
            "serial": self._serial,
            "taken": list(self._taken),
            "skipped": dict(self._skipped),
            "packing": self._packer.state_dict(lambda item: list(astuple(item[0]))),
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
        self._packer.load_state_dict(state["packing"], self._restore)

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
            apply_policy(error, self._settings, self._skipped)
            self._bad_in_a_row[source.dataset] += 1
            if all(bad >= len(share) for bad, share in zip(self._bad_in_a_row, self._shares, strict=True)):
                raise DataError(
                    f"data stream {self.index}: a whole pass over its data gave no good sample ({self._skipped} left "
                    f"out); the last one: {error}"
                ) from error
            return None
        self._bad_in_a_row = [0] * len(self._datasets)
        return sample

    def _restore(self, reference: list[int]) -> tuple[_Item, int, int]:
        """A waiting sample with its tokens and tiles, from its reference."""
        source = SampleSource(*reference)
        sample = self._render(source)
        return (source, sample), padded_length(sample, self._settings), sample.num_tiles

    def _window_order(self, window: int) -> list[int]:
        """The same in all streams: see `RowPacker`."""
        data = self._settings.data
        return generator(data.seed, Purpose.WINDOW, window).permutation(data.packing_window_rows).tolist()


def render_source(
    dataset: Dataset, record: int, settings: SampleSettings, tokenizer: Tokenizer, image_rng: ImageRng
) -> Sample:
    """Read record number `record` of a data set and make the sample. Raises `SampleError`."""
    where = dataset.file.where(record)
    try:
        raw = dataset.file.read(record)
    except DataError as error:
        raise SampleError("record", str(error)) from error
    parsed = parse_record(raw, where, dataset.entry, settings.data.max_tiles)
    return render_sample(parsed, settings, tokenizer, image_rng)


def apply_policy(error: SampleError, settings: SampleSettings, skipped: dict[str, int]) -> None:
    """Raise the error again if its policy is to stop; otherwise count it in `skipped`, logging the first of a kind."""
    policy = settings.data.on_long_sample if error.kind == "long" else settings.data.on_bad_sample
    if policy == "stop":
        raise error
    if error.kind not in skipped:
        _logger.warning("sample left out: %s (more of this kind, %r, are only counted)", error, error.kind)
    skipped[error.kind] = skipped.get(error.kind, 0) + 1
