"""Ranks that compute slower than their peers: a hot GPU, a shared core, a slow link inside a tensor-parallel group.

In a step everybody waits for the slowest, so phases take all ranks equally long. Compared is what a rank does by itself: forward passes of the
vision encoder, per tile, over all ranks; and of the language model, per row, over the ranks of a stage, which have the same layers. Ranks that
compute a layer together (tensor and context parallelism, a sharded encoder) wait for each other inside it and are slow together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist

from internvl_megatron.parallel.host import gather_integers
from internvl_megatron.train.phases import Work

KINDS = ("vision", "language")
SMALLEST_SHARE = 0.05
"""Of the step: what a slow rank takes longer is worth a word from here on."""


@dataclass(frozen=True)
class Straggler:
    """A slow rank."""

    rank: int
    kind: str
    """Of work."""
    factor: float
    """Times as long as the median of its peers."""

    @property
    def name(self) -> str:
        """What messages and metrics call it."""
        return f"rank {self.rank} {self.kind}"


def gather_work(own: Mapping[str, Work], group: dist.ProcessGroup) -> np.ndarray:
    """What every rank has done in a step, fp64 [ranks, kinds, 2]: seconds, and tiles or rows; one small message."""
    done = [own.get(kind, Work(0.0, 0)) for kind in KINDS]
    numbers = [number for work in done for number in (round(1e9 * work.seconds), work.units)]
    found = np.array(gather_integers(np.array(numbers), group), dtype=np.float64)
    return found.reshape(len(found), len(KINDS), 2) / [1e9, 1]


def find_stragglers(work: np.ndarray, stages: Sequence[int], factor: float, step_seconds: float) -> list[Straggler]:
    """Ranks that take longer than their peers, the slowest first.

    Args:
        work: as `gather_work` gives it.
        stages: of the pipeline, by rank.
        factor: on the median of the peers, from which on a rank is slow.
        step_seconds: of the step.
    """
    found = []
    for kind, name in enumerate(KINDS):
        groups = [0] * len(stages) if name == "vision" else stages
        seconds, units = work[:, kind].T
        for rank, group in enumerate(groups):
            peers = [other for other, its in enumerate(groups) if its == group and other != rank and units[other]]
            if not peers or not units[rank]:
                continue
            median = float(np.median(seconds[peers] / units[peers]))
            excess = seconds[rank] - median * units[rank]
            if seconds[rank] > factor * median * units[rank] and excess > SMALLEST_SHARE * step_seconds:
                found.append(Straggler(rank, name, float(seconds[rank] / units[rank] / median)))
    return sorted(found, key=lambda straggler: -straggler.factor)
