"""Rows drawn as training draws them, and figures about them: lengths, shares, fill, waiting, mixture, broken records."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from internvl_megatron.config.schema import DataConfig, RunConfig
from internvl_megatron.data.conversation import IGNORED_LABEL
from internvl_megatron.data.dataset import Dataset
from internvl_megatron.data.images import ImageRef
from internvl_megatron.data.mixture import dataset_groups
from internvl_megatron.data.positions import UNITS_PER_POSITION
from internvl_megatron.data.preference import Pair
from internvl_megatron.data.records import Sample, SampleError, SampleSettings
from internvl_megatron.data.rows import Row, SampleSource
from internvl_megatron.data.stream import SampleStream
from internvl_megatron.data.tokenizer import Tokenizer
from tools.check_records import Kind

ROWS_OF_A_STREAM = 16
"""Rows taken of a stream before another one is opened: the first rows of a stream are no fair picture of waiting."""
MOST_BARS = 20


@dataclass(frozen=True, slots=True)
class DrawnSample:
    """A sample of n tokens in its row, its padding left out."""

    source: SampleSource
    step: int
    slot: int
    """Where training would meet it: row `slot` of step `step`, both from 0."""
    token_ids: np.ndarray
    """int32 [n]."""
    weights: np.ndarray
    """float32 [n], loss weight with which each token is predicted; 0 where it is not trained on."""
    is_trained: np.ndarray
    """bool [n], whether each token is predicted with loss."""
    positions: np.ndarray
    """int32 [n], in units of 1/256."""
    images: tuple[ImageRef, ...]
    rows_waited: int
    """Rows of its stream that went out after it was drawn and before its own."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """Rows and what was seen on the way."""

    num_streams: int
    rows: list[Row]
    samples: list[DrawnSample]
    """Of all rows in their order."""
    num_draws: Counter[int]
    """By data set, samples that still wait or were left out counted."""
    faults: dict[str, Kind]


class _WatchedStream(SampleStream):
    """A stream that remembers when it drew a sample, and what was wrong with those that it left out."""

    def __init__(
        self, datasets: Sequence[Dataset], settings: SampleSettings, tokenizer: Tokenizer, index: int, num_streams: int
    ) -> None:
        super().__init__(datasets, settings, tokenizer, index, num_streams)
        self.num_rows = 0
        self.rows_before: dict[SampleSource, int] = {}
        """Rows that had gone out when a sample was drawn."""
        self.faults: list[tuple[SampleSource, SampleError]] = []

    def next_row(self) -> Row:
        """See `SampleStream`."""
        row = super().next_row()
        self.num_rows += 1
        return row

    def _draw(self) -> SampleSource:
        source = super()._draw()
        self.rows_before[source] = self.num_rows
        return source

    def _make(self, source: SampleSource) -> Sample | Pair | Row:
        try:
            return super()._make(source)
        except SampleError as error:
            self.faults.append((source, error))
            raise


def tolerant(data: DataConfig) -> DataConfig:
    """The settings of a run that leaves out what is broken, and counts it, where it would have stopped."""
    on_long = "skip" if data.on_long_sample == "stop" else data.on_long_sample
    return replace(data, on_bad_sample="skip", max_skipped_share=None, on_long_sample=on_long)


def draw_rows(config: RunConfig, datasets: Sequence[Dataset], tokenizer: Tokenizer, num_rows: int) -> Drawn:
    """The rows that training has in the first slots of its first steps; progress goes to standard error.

    Raises:
        DataError: there are fewer samples than rows in a step, or no good one.
    """
    settings = SampleSettings.of_run(config)
    settings = replace(settings, data=tolerant(settings.data))
    num_streams = min(config.rows_per_step, -(-num_rows // ROWS_OF_A_STREAM))
    streams = [
        _WatchedStream(datasets, settings, tokenizer, slot, config.rows_per_step) for slot in range(num_streams)
    ]
    rows, samples = [], list[DrawnSample]()
    for number in tqdm(range(num_rows), unit=" rows", disable=None):
        step, slot = divmod(number, num_streams)
        rows.append(streams[slot].next_row())
        samples += _samples_of(rows[-1], step, slot, streams[slot].rows_before)
    faults: dict[str, Kind] = {}
    for stream in streams:
        for source, error in stream.faults:
            where = datasets[source.dataset].where(source.record)
            faults.setdefault(error.kind, Kind()).add(source.record, where, str(error))
    draws = Counter(source.dataset for stream in streams for source in stream.rows_before)
    return Drawn(num_streams, rows, samples, draws, faults)


def _samples_of(row: Row, step: int, slot: int, rows_before: dict[SampleSource, int]) -> Iterator[DrawnSample]:
    """The samples of a row, the `step`-th of its stream."""
    bounds = row.sample_bounds.tolist()
    for source, start, stop in zip(row.sources, bounds, bounds[1:], strict=False):
        positions = row.positions[start:stop]
        # Positions ascend from 0; those of padding are 0.
        end = start + 1 + int(np.flatnonzero(positions).max(initial=0))
        first, last = np.searchsorted(row.image_starts, [start, stop])
        # Targets are shifted: a token is predicted from the place before it, the first of a sample from nowhere.
        yield DrawnSample(
            source=source,
            step=step,
            slot=slot,
            token_ids=row.token_ids[start:end],
            weights=np.concatenate([[np.float32(0)], row.weights[start : end - 1]]),
            is_trained=np.concatenate([[False], row.targets[start : end - 1] != IGNORED_LABEL]),
            positions=row.positions[start:end],
            images=row.images[first:last],
            rows_waited=step - rows_before[source],
        )


def spread(values: Sequence[int]) -> dict[str, Any]:
    """How whole numbers are spread: their mean, some quantiles and a histogram with bars of equal width.

    Bar i counts the numbers from edges[i] up to, not including, edges[i + 1].
    """
    if not values:
        return {"count": 0}
    numbers = np.array(values)
    least, most = int(numbers.min()), int(numbers.max())
    width = -(-(most - least + 1) // MOST_BARS)
    counts = np.bincount((numbers - least) // width)
    return {
        "count": len(numbers),
        "mean": float(numbers.mean()),
        "least": least,
        "median": float(np.median(numbers)),
        "ninth_decile": float(np.quantile(numbers, 0.9)),
        "most": most,
        "histogram": {
            "edges": [least + width * bar for bar in range(len(counts) + 1)],
            "counts": counts.tolist(),
        },
    }


def make_report(config: RunConfig, datasets: Sequence[Dataset], drawn: Drawn, image_context_id: int) -> dict[str, Any]:
    """All figures as JSON; docs/data.md says what they are."""
    data, samples = config.data, drawn.samples
    image_tokens = [int(np.count_nonzero(sample.token_ids == image_context_id)) for sample in samples]
    trained = [int(np.count_nonzero(sample.is_trained)) for sample in samples]
    lengths = [len(sample.token_ids) for sample in samples]
    num_tokens, num_rows = sum(lengths), len(drawn.rows)
    pictures = [image for sample in samples for image in sample.images]
    token_fill = [row.num_tokens / data.tokens_per_row for row in drawn.rows]
    tile_fill = [row.num_tiles / data.tiles_per_row for row in drawn.rows]
    groups, mixture = _mixture(config, datasets, drawn, lengths)
    return {
        "meta": data.meta,
        "tokenizer": data.tokenizer,
        "rows": num_rows,
        "streams": drawn.num_streams,
        "samples": len(samples),
        "tokens": num_tokens,
        "image_token_share": sum(image_tokens) / num_tokens,
        "supervised_token_share": sum(trained) / num_tokens,
        "fill": {
            "tokens_mean": float(np.mean(token_fill)),
            "tokens_least": min(token_fill),
            "tiles_mean": float(np.mean(tile_fill)),
            "tiles_most": max(tile_fill),
        },
        "per_sample": {
            "tokens": spread(lengths),
            "supervised_tokens": spread(trained),
            "images": spread([len(sample.images) for sample in samples]),
            "tiles": spread([sum(image.num_tiles for image in sample.images) for sample in samples]),
            "last_position": spread([int(sample.positions[-1]) // UNITS_PER_POSITION for sample in samples]),
            "rows_waited": spread([sample.rows_waited for sample in samples]),
        },
        "per_image": {"tiles": spread([image.num_tiles for image in pictures if image.kind == "image"])},
        "per_video": {"frames": spread([image.num_tiles for image in pictures if image.kind == "video"])},
        "per_row": {
            "samples": spread([row.num_samples for row in drawn.rows]),
            "tiles": spread([row.num_tiles for row in drawn.rows]),
        },
        "groups": groups,
        "datasets": mixture,
        "faults": {
            name: {
                "count": kind.count,
                "share_of_draws": kind.count / drawn.num_draws.total(),
                "first": [{"where": where, "reason": reason} for _, where, reason in kind.first],
            }
            for name, kind in sorted(drawn.faults.items())
        },
    }


def _mixture(
    config: RunConfig, datasets: Sequence[Dataset], drawn: Drawn, lengths: Sequence[int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What groups and data sets have, and what the mixture asks for: of groups in tokens, within each in samples drawn."""
    groups = dataset_groups([dataset.entry for dataset in datasets], config.data.group_weights)
    tokens, num_samples = Counter[int](), Counter[int]()
    for sample, length in zip(drawn.samples, lengths, strict=True):
        tokens[sample.source.dataset] += length
        num_samples[sample.source.dataset] += 1
    total_weight = sum(group.weight for group in groups)
    of_groups, of_datasets = {}, {}
    for group in groups:
        draws = sum(drawn.num_draws[member] for member in group.members)
        places = sum(datasets[member].length for member in group.members)
        of_groups[group.name] = {
            "token_share": sum(tokens[member] for member in group.members) / tokens.total(),
            "token_share_asked": group.weight / total_weight,
        }
        for member in group.members:
            of_datasets[member] = {
                "group": group.name,
                "draws": drawn.num_draws[member],
                "samples": num_samples[member],
                "tokens": tokens[member],
                "token_share": tokens[member] / tokens.total(),
                "draw_share_in_group": drawn.num_draws[member] / draws if draws else 0.0,
                "draw_share_in_group_asked": datasets[member].length / places,
            }
    by_name = {dataset.entry.name: of_datasets[number] for number, dataset in enumerate(datasets)}
    return ({} if config.data.group_weights is None else of_groups), by_name


def choose_samples(samples: Sequence[DrawnSample], count: int) -> list[DrawnSample]:
    """Some samples to be shown: data sets take turns, each with its samples in the order of training."""
    seen, turns = Counter[int](), list[tuple[int, int, int]]()
    for place, sample in enumerate(samples):
        dataset = sample.source.dataset
        turns.append((seen[dataset], dataset, place))
        seen[dataset] += 1
    return [samples[place] for _, _, place in sorted(turns)[:count]]
