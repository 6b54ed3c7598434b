"""Rows of a fixed number of tokens: samples laid one after the other, each on its own. Packers say which (`packer.py`).

A row is one micro-batch. T: tokens of a row, s: samples, i: images, t: tiles.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from internvl_megatron.data.conversation import IGNORED_LABEL
from internvl_megatron.data.images import ImageRef
from internvl_megatron.data.preference import Pair
from internvl_megatron.data.records import Sample, SampleSettings, num_supervised


@dataclass(frozen=True, slots=True)
class SampleSource:
    """Where a sample of a row came from; enough to make it again."""

    dataset: int
    """Index of the data set in the meta file."""
    record: int
    """Index of the record in its jsonl file, blank lines not counted."""
    pass_number: int
    """Which pass over the data set's records, from 0; seeds the sample's random numbers, with data set and record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One packed row: a micro-batch of one. Everything but the pixels."""

    token_ids: np.ndarray
    """int32 [T]."""
    targets: np.ndarray
    """int32 [T], the next token of the same sample where it is trained on, -100 elsewhere."""
    weights: np.ndarray
    """float32 [T], loss weight of each target; 0 where the target is -100."""
    positions: np.ndarray
    """int32 [T], in units of 1/256; restart at 0 in each sample; 0 in padding."""
    segment_lengths: np.ndarray
    """int32 [s] or [s + 1], tokens of each sample in order, then of the padding if there is any; sums to T."""
    sources: tuple[SampleSource, ...]
    """Where each of the s samples came from."""
    images: tuple[ImageRef, ...]
    """All images in the order of their tokens."""
    image_starts: np.ndarray
    """int32 [i], index in the row of each image's first context token."""
    tile_starts: np.ndarray
    """int32 [t], index in the row of each tile's first token."""
    has_pairs: bool = False
    """Samples 0 and 1, 2 and 3, .. are pairs: the same question with a chosen and with a rejected answer. Their images are
    listed once, where the chosen sample has them; see `second_tile_starts`."""
    reference_logprobs: np.ndarray = field(default_factory=lambda: np.empty(0))
    """float64 [s], log-probability of each sample's answer under a reference model; empty if it is not known beforehand."""

    @property
    def num_samples(self) -> int:
        """Samples, padding not counted."""
        return len(self.sources)

    @property
    def num_tiles(self) -> int:
        """Tiles of all images."""
        return len(self.tile_starts)

    @property
    def sample_bounds(self) -> np.ndarray:
        """int64 [s + 1]: sample j is tokens bounds[j] to bounds[j + 1]."""
        return np.concatenate([[0], np.cumsum(self.segment_lengths[: self.num_samples], dtype=np.int64)])

    @property
    def num_tokens(self) -> int:
        """Tokens of samples, padding not counted."""
        return int(self.sample_bounds[-1])

    @property
    def pair_tokens(self) -> np.ndarray:
        """int64 [s / 2, 2], tokens of both samples of every pair."""
        assert self.has_pairs, "the row's samples are single"
        return self.segment_lengths[: self.num_samples].astype(np.int64).reshape(-1, 2)

    @property
    def tile_samples(self) -> np.ndarray:
        """int64 [t], the (first) sample each tile is in."""
        return np.searchsorted(self.sample_bounds, self.tile_starts, side="right") - 1

    @property
    def second_tile_starts(self) -> np.ndarray:
        """int64 [t], index in the row of each tile's first token in the rejected sample, where the same question comes again."""
        return self.tile_starts + self.pair_tokens[self.tile_samples // 2, 0]

    @property
    def image_strides(self) -> np.ndarray:
        """int64 [i], by how much each image's tokens advance, in units of 1/256; that of its first tile's first two tokens."""
        return (self.positions[self.image_starts + 1] - self.positions[self.image_starts]).astype(np.int64)

    @property
    def sample_weights(self) -> np.ndarray:
        """float64 [s], loss weight of each sample: the sum of its tokens'."""
        before = np.concatenate([[0.0], np.cumsum(self.weights, dtype=np.float64)])
        return np.diff(before[self.sample_bounds])

    def cut_length(self, multiple: int) -> int:
        """Tokens without the padding the row can do without: the next multiple of a number, and not 0."""
        return max(1, -(-self.num_tokens // multiple)) * multiple

    def cut(self, multiple: int) -> "Row":
        """The row without the padding it can do without, see `cut_length`."""
        length = self.cut_length(multiple)
        padding = [length - self.num_tokens] if length > self.num_tokens else []
        return replace(
            self,
            token_ids=self.token_ids[:length],
            targets=self.targets[:length],
            weights=self.weights[:length],
            positions=self.positions[:length],
            segment_lengths=np.array([*self.segment_lengths[: self.num_samples], *padding], dtype=np.int32),
        )

    def without_samples_of_images(self, failed: set[int]) -> "Row":
        """The row with no loss on the samples (and pairs) that own the given images (indices into `images`), else unchanged.

        For images that turn out broken only when decoded, when every rank already has the row.
        """
        bounds, weights = self.sample_bounds, self.weights.copy()
        for image in failed:
            sample = int(np.searchsorted(bounds, self.image_starts[image], side="right")) - 1
            weights[bounds[sample] : bounds[sample + (2 if self.has_pairs else 1)]] = 0
        return replace(self, weights=weights)


def token_weight(labels: np.ndarray, weighting: Literal["token", "square", "sample"]) -> float:
    """Loss weight of each supervised token of a sample (InternVL3 paper, sec. 2.2): l^0, l^-1/2 or l^-1.

    l counts the supervised tokens of the sample, before labels are shifted; 0 if there are none.
    """
    count = num_supervised(labels)
    exponent = {"token": 0.0, "square": 0.5, "sample": 1.0}[weighting]
    return count**-exponent if count else 0.0


def segments_of(made: Sample | Pair, settings: SampleSettings) -> list[int]:
    """Tokens of each of its samples in a row: up to the next multiple they are padding that belongs to the sample."""
    multiple = settings.data.sample_multiple_tokens
    samples = made.samples if isinstance(made, Pair) else (made,)
    return [-(-len(sample.token_ids) // multiple) * multiple for sample in samples]


def padded_length(made: Sample | Pair, settings: SampleSettings) -> int:
    """Tokens a sample or a pair takes of a row."""
    return sum(segments_of(made, settings))


def build_row(
    items: Sequence[tuple[SampleSource, Sample]] | Sequence[tuple[SampleSource, Sample | Pair]],
    settings: SampleSettings,
    padding_id: int,
) -> Row:
    """Lay samples, or pairs of samples, one after the other and pad the row to `tokens_per_row` with `padding_id`.

    A target is the next token of the *same* sample: the last token of a sample predicts nothing. Targets of pairs all have
    weight 1.
    """
    pairs = [made for _, made in items if isinstance(made, Pair)]
    assert len(pairs) in (0, len(items)), f"{len(pairs)} of {len(items)} items are pairs: a row has pairs or none"
    samples = [
        (source, sample) for source, made in items for sample in (made.samples if isinstance(made, Pair) else (made,))
    ]
    weighting = "token" if pairs else settings.weighting
    tokens_per_row = settings.data.tokens_per_row
    token_ids = np.full(tokens_per_row, padding_id, dtype=np.int32)
    targets = np.full(tokens_per_row, IGNORED_LABEL, dtype=np.int32)
    weights = np.zeros(tokens_per_row, dtype=np.float32)
    positions = np.zeros(tokens_per_row, dtype=np.int32)
    images: list[ImageRef] = []
    image_starts: list[int] = []
    tile_starts: list[int] = []
    at = 0
    for _, sample in samples:
        end = at + len(sample.token_ids)
        token_ids[at:end] = sample.token_ids
        positions[at:end] = sample.positions
        targets[at : end - 1] = sample.labels[1:]
        supervised = targets[at:end] != IGNORED_LABEL
        weights[at:end][supervised] = token_weight(sample.labels, weighting)
        images.extend(sample.images)
        image_starts.extend((sample.image_starts + at).tolist())
        tile_starts.extend((sample.tile_starts + at).tolist())
        at += padded_length(sample, settings)
    segments = [length for _, made in items for length in segments_of(made, settings)]
    segments += [tokens_per_row - at] if at < tokens_per_row else []
    return Row(
        token_ids=token_ids,
        targets=targets,
        weights=weights,
        positions=positions,
        segment_lengths=np.array(segments, dtype=np.int32),
        sources=tuple(source for source, _ in samples),
        images=tuple(images),
        image_starts=np.array(image_starts, dtype=np.int32),
        tile_starts=np.array(tile_starts, dtype=np.int32),
        has_pairs=settings.pairs,
        reference_logprobs=np.array([value for pair in pairs for value in pair.reference or ()], dtype=np.float64),
    )
