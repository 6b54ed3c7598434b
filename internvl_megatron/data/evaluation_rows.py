"""Held-out rows for the evaluation loss: always the same, whatever the run's seed and layout."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

from internvl_megatron.data.meta import Dataset, load_datasets
from internvl_megatron.data.packing import Packer, Row, SampleSource, build_row
from internvl_megatron.data.positions import UNITS_PER_POSITION
from internvl_megatron.data.records import Sample, SampleError, SampleSettings
from internvl_megatron.data.seeds import Purpose, generator
from internvl_megatron.data.stream import apply_policy, render_source
from internvl_megatron.data.tokenizer import Tokenizer
from internvl_megatron.errors import DataError


def eval_rows(meta_path: str, settings: SampleSettings, tokenizer: Tokenizer, num_rows: int) -> list[Row]:
    """The first `num_rows` packed rows of held-out data, each record at most once, data sets taking turns.

    Ordinary positions (delta 1) and no augmentation, as in InternVL3's published evaluations. If there are too few
    data the remaining rows are empty: padding only, no loss weight.

    Raises:
        DataError: the files are wrong, a sample is bad and the policy says stop, or there is no good sample.
    """
    fixed = replace(settings, data=replace(settings.data, v2pe="fixed", v2pe_numerator=UNITS_PER_POSITION))
    datasets = load_datasets(meta_path)
    for dataset in datasets:
        dataset.entry = replace(dataset.entry, data_augment=False)
    packs = _packs(datasets, fixed, tokenizer)
    rows = [build_row(items, fixed, tokenizer.pad_id) for items in islice(packs, num_rows)]
    if num_rows and not rows:
        raise DataError(f"{meta_path}: gives no good sample to evaluate on")
    return rows + [build_row([], fixed, tokenizer.pad_id) for _ in range(num_rows - len(rows))]


def _packs(
    datasets: Sequence[Dataset], settings: SampleSettings, tokenizer: Tokenizer
) -> Iterator[list[tuple[SampleSource, Sample]]]:
    """Packed samples of all data sets, made as they are asked for."""
    data = settings.data
    packer: Packer[tuple[SampleSource, Sample]] = Packer(
        data.tokens_per_row, data.tiles_per_row, data.packing_buffer_rows
    )
    skipped: dict[str, int] = {}
    for source in _in_turns(datasets):
        try:
            sample = render_source(
                datasets[source.dataset],
                source.record,
                settings,
                tokenizer,
                lambda image: generator(0, Purpose.IMAGE, image),
            )
        except SampleError as error:
            apply_policy(error, settings, skipped, source.serial + 1)
            continue
        pack = packer.add((source, sample), len(sample.token_ids), sample.num_tiles)
        if pack is not None:
            yield pack.items
    for pack in packer.flush():
        yield pack.items


def _in_turns(datasets: Sequence[Dataset]) -> Iterator[SampleSource]:
    """All records: the first of each data set, then the second of each, and so on."""
    places = range(max(dataset.num_records for dataset in datasets))
    in_turns = ((number, place) for place in places for number in range(len(datasets)))
    in_use = ((number, place) for number, place in in_turns if place < datasets[number].num_records)
    for serial, (number, record) in enumerate(in_use):
        yield SampleSource(number, record, serial)
