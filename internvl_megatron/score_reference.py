"""Log-probabilities of a reference model for all pairs of a run's data, ahead of the run, under any layout.

Rank 0 makes the rows and sends them to all; replicas score their share; rank 0 collects what the last stages found.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from itertools import batched
from pathlib import Path

import numpy as np
import torch

from internvl_megatron.checkpoint import save_load
from internvl_megatron.checkpoint.weight_sums import weights_id
from internvl_megatron.config.plan import plan
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.data.dataset import Dataset, load_datasets
from internvl_megatron.data.evaluation_rows import Item, eval_datasets, rows_once
from internvl_megatron.data.preference import Pair
from internvl_megatron.data.records import SampleSettings
from internvl_megatron.data.reference_file import ReferencePair, write_reference_file
from internvl_megatron.data.row_bytes import row_to_bytes, rows_from_bytes
from internvl_megatron.data.rows import Row, build_row
from internvl_megatron.data.step_rows import StepRows
from internvl_megatron.data.stream import check_stores
from internvl_megatron.data.tokenizer import Tokenizer, load_tokenizer
from internvl_megatron.device import Device, open_device
from internvl_megatron.errors import DataError
from internvl_megatron.logs import configure_logging
from internvl_megatron.model.build import build_model
from internvl_megatron.parallel.groups import Groups, make_groups
from internvl_megatron.parallel.host import broadcast_bytes, gather_integers
from internvl_megatron.ranks import RankInfo, joined
from internvl_megatron.train.step import Step

log = logging.getLogger(__name__)

_BEGIN = b"R"
"""Begins every message: that of no rows, which ends the work, is not empty either."""

_Source = tuple[list[Dataset], SampleSettings]


def score_rank(info: RankInfo, config: RunConfig, output: str) -> int:
    """Body of one rank: score all pairs of `data.meta` and `data.eval_meta`, and write the file.

    Returns:
        How many pairs there are.
    """
    configure_logging(info.rank)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // info.local_world_size))
    device = open_device(config.device, info.local_rank)
    timeout = config.parallel.collective_timeout_seconds
    with joined(info, device, timeout):
        layouts = plan(config, info.world_size)
        groups = make_groups(layouts.layout, device, timeout, layouts.vision_layout)
        assert config.checkpoint.load is not None, "the reference's weights are named"
        model = build_model(config, groups, device, initialize=False)
        step = Step(config, model, groups, device)
        save_load.load_weights(Path(config.checkpoint.load), config.model, model, groups)
        weights = weights_id(model, groups)
        pairs = list(_score(config, step, groups, device))
        if info.rank == 0:
            write_reference_file(output, weights, pairs)
        return len(pairs)


def _score(config: RunConfig, step: Step, groups: Groups, device: Device) -> Iterator[ReferencePair]:
    """All pairs on rank 0; nothing on the others."""
    settings = SampleSettings.of_run(config)
    replica = groups.layout.replica(groups.rank)
    ranks = groups.layout.replica_ranks(replica)
    batches = _batches(config, settings) if groups.rank == 0 else None
    while True:
        rows, pairs = next(batches, ([], [])) if batches is not None else (None, [])
        message = None
        if rows is not None:
            message = b"".join([_BEGIN, *(row_to_bytes(slot, row) for slot, row in enumerate(rows))])
        every = rows_from_bytes(broadcast_bytes(message, 0, groups.host_world).removeprefix(_BEGIN))
        if not every:
            return
        slots = range(replica, len(every), groups.layout.data_size)
        batch = StepRows([every[slot] for slot in slots], slots, settings, ranks.index(groups.rank), len(ranks))
        found = step.answer_logprobs(batch)
        layout, rank = groups.layout, groups.rank
        counts = layout.tensor_index(rank) == layout.context_index(rank) == 0
        own = [(slots[row], *values.double().cpu().tolist()) for row, values in found.items() if counts]
        by_slot = _gather(own, groups)
        yield from _matched(pairs, by_slot) if groups.rank == 0 else ()


def _batches(config: RunConfig, settings: SampleSettings) -> Iterator[tuple[list[Row], list[list[ReferencePair]]]]:
    """Rows, and of each row its pairs without their log-probabilities; the last ones are filled up with empty rows."""
    tokenizer, folder = (
        load_tokenizer(config.data.tokenizer),
        Path(config.data.index_folder or f"{config.folder}/index"),
    )
    empty = build_row([], settings, tokenizer.pad_id)
    known: dict[tuple[str, int], str] = {}
    for datasets, used in _sources(config, settings, tokenizer, folder):
        rows = rows_once(datasets, used, tokenizer)
        for batch in batched(rows, config.rows_per_step):
            pairs = [_pairs(items, datasets) for _, items in batch]
            for pair in (pair for row in pairs for pair in row):
                if known.setdefault((pair.dataset, pair.record), pair.digest) != pair.digest:
                    raise DataError(
                        f"{config.data.eval_meta}: data set {pair.dataset!r} has the name of another one in "
                        f"{config.data.meta}; rename it"
                    )
            yield [row for row, _ in batch] + [empty] * (config.rows_per_step - len(batch)), pairs


def _sources(config: RunConfig, settings: SampleSettings, tokenizer: Tokenizer, folder: Path) -> list[_Source]:
    """Data sets of the run and the settings they are read with. Raises `DataError`."""
    datasets = load_datasets(config.data.meta, folder)
    for dataset in datasets:
        if dataset.entry.data_augment:
            raise DataError(
                f"{config.data.meta}: {dataset.entry.name}: with data_augment no two passes see the same pictures; set it to "
                "false, or let the run ask the reference itself (no mpo.reference_file)"
            )
    sources = [(datasets, settings)]
    if config.data.eval_meta is not None:
        sources.append(eval_datasets(config.data.eval_meta, settings, folder))
    for used, how in sources:
        check_stores(used, how, tokenizer)
    return sources


def _pairs(items: Sequence[Item], datasets: Sequence[Dataset]) -> list[ReferencePair]:
    found = []
    for source, pair in items:
        assert isinstance(pair, Pair), "the data are pairs"
        found.append(ReferencePair(datasets[source.dataset].entry.name, source.record, pair.digest(), 0.0, 0.0))
    return found


def _gather(own: Sequence[tuple[float, ...]], groups: Groups) -> dict[int, list[float]]:
    """Values by slot, from (slot, values ..) of all ranks; collective."""
    values = np.array([value for entry in own for value in (float(len(entry)), *entry)], dtype=np.float64)
    by_slot: dict[int, list[float]] = {}
    for message in gather_integers(values.view(np.int64), groups.host_world):
        numbers = np.ascontiguousarray(message).view(np.float64).tolist()
        while numbers:
            end = 1 + int(numbers[0])
            by_slot[int(numbers[1])] = numbers[2:end]
            del numbers[:end]
    return by_slot


def _matched(pairs: list[list[ReferencePair]], by_slot: dict[int, list[float]]) -> Iterator[ReferencePair]:
    for slot, row in enumerate(pairs):
        values = by_slot[slot]
        assert len(values) == 2 * len(row), f"{len(values)} log-probabilities for {len(row)} pairs"
        for number, pair in enumerate(row):
            chosen, rejected = values[2 * number : 2 * number + 2]
            yield ReferencePair(pair.dataset, pair.record, pair.digest, chosen, rejected)
