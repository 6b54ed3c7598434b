"""Held-out rows for the evaluation loss: always the same, whatever the run's seed and layout."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from internvl_megatron.data.dataset import Dataset, load_datasets
from internvl_megatron.data.packer import Packer
from internvl_megatron.data.positions import UNITS_PER_POSITION
from internvl_megatron.data.preference import Pair
from internvl_megatron.data.records import Sample, SampleError, SampleSettings
from internvl_megatron.data.reference_file import ReferenceFile
from internvl_megatron.data.row_packer import make_packer
from internvl_megatron.data.rows import Row, SampleSource, build_row, padded_length
from internvl_megatron.data.seeds import Purpose, generator
from internvl_megatron.data.stream import apply_policy, check_stores, make_source, stored_row, with_reference
from internvl_megatron.data.tokenizer import Tokenizer
from internvl_megatron.errors import DataError

Item = tuple[SampleSource, Sample | Pair]
"""What rows are made of."""


def eval_rows(
    meta_path: str,
    settings: SampleSettings,
    tokenizer: Tokenizer,
    num_rows: int,
    index_folder: Path | None = None,
    reference: ReferenceFile | None = None,
) -> list[Row]:
    """The first `num_rows` packed rows of held-out data, each record at most once, data sets taking turns.

    Ordinary positions (delta 1) and no augmentation, as in InternVL3's published evaluations. If there are too few
    data the remaining rows are empty: padding only, no loss weight. With `reference` every pair has its log-probabilities.

    Raises:
        DataError: the files are wrong, a sample is bad and the policy says stop, or there is no good sample.
    """
    datasets, fixed = eval_datasets(meta_path, settings, index_folder)
    check_stores(datasets, fixed, tokenizer)
    rows = [row for row, _ in islice(rows_once(datasets, fixed, tokenizer, reference), num_rows)]
    if num_rows and not rows:
        raise DataError(f"{meta_path}: gives no good sample to evaluate on")
    return rows + [build_row([], fixed, tokenizer.pad_id) for _ in range(num_rows - len(rows))]


def eval_datasets(
    meta_path: str, settings: SampleSettings, index_folder: Path | None
) -> tuple[list[Dataset], SampleSettings]:
    """Held-out data sets and settings, without anything random. Raises `DataError`."""
    datasets = load_datasets(meta_path, index_folder)
    for dataset in datasets:
        dataset.entry = replace(dataset.entry, data_augment=False)
    return datasets, replace(settings, data=replace(settings.data, v2pe="fixed", v2pe_numerator=UNITS_PER_POSITION))


def rows_once(
    datasets: Sequence[Dataset],
    settings: SampleSettings,
    tokenizer: Tokenizer,
    reference: ReferenceFile | None = None,
) -> Iterator[tuple[Row, Sequence[Item]]]:
    """Rows of all records, each once, and what they are made of, made as they are asked for; nothing for stored rows.

    Raises:
        DataError: a sample is bad and the policy says stop.
    """
    packer: Packer[Item] = make_packer(settings.data)
    skipped: dict[str, int] = {}
    for num_seen, source in enumerate(_in_turns(datasets), 1):
        try:
            if datasets[source.dataset].store is not None:
                yield stored_row(datasets[source.dataset], source.record, settings), ()
                continue
            made = make_source(
                datasets[source.dataset],
                source.record,
                settings,
                tokenizer,
                lambda image: generator(0, Purpose.IMAGE, image),
            )
        except SampleError as error:
            apply_policy(error, settings, skipped, num_seen)
            continue
        item = source, with_reference(made, reference, datasets[source.dataset], source.record)
        for pack in packer.add(item, padded_length(made, settings), made.num_tiles):
            yield build_row(pack.items, settings, tokenizer.pad_id), pack.items
    for pack in packer.flush():
        yield build_row(pack.items, settings, tokenizer.pad_id), pack.items


def _in_turns(datasets: Sequence[Dataset]) -> Iterator[SampleSource]:
    """All records: the first of each data set, then the second of each, and so on."""
    records = range(max(dataset.num_records for dataset in datasets))
    in_turns = ((number, record) for record in records for number in range(len(datasets)))
    for number, record in in_turns:
        if record < datasets[number].num_records:
            yield SampleSource(number, record, 0)
