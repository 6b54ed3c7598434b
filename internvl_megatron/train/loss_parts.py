"""Which data sets and kinds of samples a batch's loss comes from.

Every sample has a share of the batch's loss and of its weight; both sum to those of the batch, whatever `loss.normalize` and the
layout are. A part's own loss is its share of the loss over its share of the weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from internvl_megatron.data.rows import Row

KINDS = ("text", "image", "multi_image", "video")
"""Of samples, by what they show."""
_FIGURES = 3  # share of the loss, share of the weight, samples


@dataclass(frozen=True)
class LossPart:
    """Of some samples of a batch."""

    loss_share: float
    """What they add to the batch's loss."""
    weight: float
    """Share, 0 to 1, of the batch's loss weight that they have."""
    num_samples: int

    @property
    def loss(self) -> float | None:
        """Their own loss; None where nothing carries any."""
        return self.loss_share / self.weight if self.weight > 0 else None


class PartSums:
    """What one rank has seen of a batch's parts; `values` of all ranks are to be summed."""

    def __init__(self, num_datasets: int) -> None:
        self._table = np.zeros((num_datasets * len(KINDS), _FIGURES))

    @property
    def values(self) -> list[float]:
        """Flat, as many on every rank."""
        return self._table.ravel().tolist()

    def add_losses(self, row: Row, losses: np.ndarray) -> None:
        """Add what each sample of a row, [s], adds to the batch's loss; on every rank that has computed some of it."""
        np.add.at(self._table[:, 0], _places(row), losses)

    def add_samples(self, row: Row, weights: np.ndarray) -> None:
        """Count the samples of a row, and add each one's share of the batch's weight, [s]; on one rank."""
        np.add.at(self._table[:, 1:], _places(row), np.stack([weights, np.ones(len(weights))], axis=1))


@dataclass(frozen=True)
class LossParts:
    """Of a batch, the same on every rank."""

    table: np.ndarray
    """float64 [data sets, kinds, 3]: share of the loss, share of the weight, number of samples."""

    @classmethod
    def of_sums(cls, sums: Sequence[float]) -> "LossParts":
        """From the sums of all ranks' `PartSums.values`."""
        return cls(np.array(sums, dtype=np.float64).reshape(-1, len(KINDS), _FIGURES))

    def by_dataset(self) -> dict[int, LossPart]:
        """By number of the data set; those without a sample in the batch are left out."""
        return {number: part for number, part in enumerate(_parts(self.table.sum(axis=1))) if part.num_samples}

    def by_kind(self) -> dict[str, LossPart]:
        """By kind of sample; those that the batch does not have are left out."""
        parts = zip(KINDS, _parts(self.table.sum(axis=0)), strict=True)
        return {kind: part for kind, part in parts if part.num_samples}


def _parts(figures: np.ndarray) -> list[LossPart]:
    return [LossPart(loss, weight, round(count)) for loss, weight, count in figures.tolist()]


def sample_kinds(row: Row) -> list[str]:
    """The kind of each sample of a row; both of a pair have that of the chosen one, where the images are listed."""
    of_sample = np.searchsorted(row.sample_bounds, row.image_starts, side="right") - 1
    if row.has_pairs:
        of_sample = np.concatenate([of_sample, of_sample + 1])
    counts = np.bincount(of_sample, minlength=row.num_samples)
    videos = {int(sample) for sample, image in zip(of_sample, row.images * 2, strict=False) if image.kind == "video"}
    return ["video" if sample in videos else KINDS[min(int(count), 2)] for sample, count in enumerate(counts)]


def _places(row: Row) -> np.ndarray:
    """int64 [s], the row of the table each sample belongs to."""
    kinds = zip(row.sources, sample_kinds(row), strict=True)
    return np.array([source.dataset * len(KINDS) + KINDS.index(kind) for source, kind in kinds], dtype=np.int64)
