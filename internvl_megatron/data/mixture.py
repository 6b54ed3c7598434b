"""Which data set a stream takes its next sample from: exact shares without random draws.

An epoch of a stream is its share of the samples of all data sets. Where no weights are given, all data sets are one group
and take turns so that an epoch has every sample of the share once; a data set's draws are evenly spread over it. Groups
with weights each have epochs of their own, and the one that is furthest behind its share of the tokens goes next.
"""

import heapq
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from internvl_megatron.config.group_weights import parse_group_weights
from internvl_megatron.data.meta import DatasetEntry
from internvl_megatron.data.seeds import Purpose, words
from internvl_megatron.errors import DataError

_logger = logging.getLogger(__name__)

_PHASES = 2**20
"""Places in the distance between two draws of a data set at which a stream may begin."""


@dataclass(frozen=True, slots=True)
class Group:
    """Data sets that share a weight."""

    name: str
    weight: int
    """Share of the tokens, in units that all groups have in common."""
    members: tuple[int, ...]
    """Numbers of its data sets in the meta file."""


@dataclass(frozen=True, slots=True)
class Draw:
    """A sample to be taken."""

    dataset: int
    epoch: int
    place: int
    """In the order of that data set in that epoch."""


def dataset_groups(entries: Sequence[DatasetEntry], group_weights: Sequence[str] | None) -> list[Group]:
    """The groups of a run's data sets by ascending name; all data sets are one group without weights.

    Args:
        entries: of the meta file.
        group_weights: see `DataConfig.group_weights`.

    Raises:
        ConfigError: the weights are not written as they should be.
        DataError: a data set has no group or one without a weight, or a weight is for a group without data sets.
    """
    if group_weights is None:
        return [Group("", 1, tuple(range(len(entries))))]
    weights = parse_group_weights(group_weights)
    names = [entry.group for entry in entries]
    problems = [
        f"data set {entry.name!r} has "
        + ("no 'group' in the meta file" if entry.group is None else f"group {entry.group!r}, which has no weight")
        for entry in entries
        if entry.group not in weights
    ]
    problems += [f"group {name!r} has a weight and no data set" for name in weights if name not in names]
    if problems:
        raise DataError(f"data.group_weights: {'; '.join(problems)} (weights are given for {', '.join(weights)})")
    unit = math.lcm(*(weight.denominator for weight in weights.values()))
    whole = {name: int(weight * unit) for name, weight in sorted(weights.items())}
    divisor = math.gcd(*whole.values())
    return [
        Group(group, weight // divisor, tuple(number for number, name in enumerate(names) if name == group))
        for group, weight in whole.items()
    ]


class Mixture:
    """The draws of stream `index` of `num_streams`, one after the other.

    Attributes:
        taken: draws from each data set so far.
        tokens: of the samples drawn from each group so far.
    """

    def __init__(
        self, lengths: Sequence[int], groups: Sequence[Group], seed: int, index: int, num_streams: int
    ) -> None:
        """Start at the beginning.

        Args:
            lengths: samples of one epoch of each data set, repeats counted.
            groups: every data set is in one.
            seed: of the run's data.
            index: of the stream; streams of the same seed share out the samples.
            num_streams: of the run.

        Raises:
            DataError: there are fewer samples than streams, and this one has none.
        """
        self._groups = groups
        self._num_streams = num_streams
        self._first, self._shares = _deal(lengths, groups, index, num_streams)
        self._group_of = {member: number for number, group in enumerate(groups) for member in group.members}
        self._group_shares = [int(self._shares[list(group.members)].sum()) for group in groups]
        if not any(self._group_shares):
            raise DataError(
                f"data stream {index}: {sum(lengths)} samples are too few for {num_streams} streams; lower rows_per_step to "
                "at most that, or add data"
            )
        empty = [group.name for group, share in zip(groups, self._group_shares, strict=True) if not share]
        if empty:
            _logger.warning(
                "data stream %d has no sample of %s: too few for %d streams, so their part of the tokens is below their weight",
                index,
                ", ".join(empty),
                num_streams,
            )
        start, *self._phases = [word >> 44 for word in words(1 + len(lengths), seed, Purpose.PHASE, index)]
        self._first_group = self._choose_first(start / _PHASES)
        self.taken = [0] * len(lengths)
        self.tokens = [0] * len(groups)
        self._queues = self._make_queues()

    def group_of(self, dataset: int) -> int:
        """Number of a data set's group."""
        return self._group_of[dataset]

    def group_share(self, group: int) -> int:
        """Samples of one epoch of a group that are this stream's."""
        return self._group_shares[group]

    def draw(self) -> Draw:
        """Take the next sample. Its tokens, once known, are to be told by `add_tokens` before the next draw."""
        queue = self._queues[self._next_group()]
        epoch, _, dataset = queue[0]
        turn = self.taken[dataset] % int(self._shares[dataset])
        self.taken[dataset] += 1
        heapq.heapreplace(queue, self._turn(dataset))
        return Draw(dataset, epoch, int(self._first[dataset]) + turn * self._num_streams)

    def add_tokens(self, dataset: int, num_tokens: int) -> None:
        """Count the tokens of a sample that was drawn."""
        self.tokens[self._group_of[dataset]] += num_tokens

    def state_dict(self) -> dict[str, Any]:
        """Position, as JSON."""
        return {"taken": list(self.taken), "tokens": list(self.tokens)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position that was saved with the same data sets and groups."""
        self.taken = [int(count) for count in state["taken"]]
        self.tokens = [int(count) for count in state["tokens"]]
        self._queues = self._make_queues()

    def _make_queues(self) -> list[list[tuple[int, float, int]]]:
        """Of each group, a heap of the next turn of each of its data sets."""
        queues = [[self._turn(member) for member in group.members if self._shares[member]] for group in self._groups]
        for queue in queues:
            heapq.heapify(queue)
        return queues

    def _turn(self, dataset: int) -> tuple[int, float, int]:
        """(epoch, place in it from 0 to 1, data set) of a data set's next draw.

        Its draws are at equal distances, the first at the stream's phase: the i-th of c at (i + phase) / c, so that all c are
        in the epoch, and at any time within one of their even share.
        """
        share = int(self._shares[dataset])
        epoch, turn = divmod(self.taken[dataset], share)
        return epoch, (turn * _PHASES + self._phases[dataset]) / (share * _PHASES), dataset

    def _next_group(self) -> int:
        """The group furthest behind its share of the tokens."""
        if len(self._groups) == 1:
            return 0
        present = [number for number, share in enumerate(self._group_shares) if share]
        total = sum(self.tokens[number] for number in present)
        if not total:
            return self._first_group
        weight = sum(self._groups[number].weight for number in present)
        return max(present, key=lambda number: self._groups[number].weight * total - weight * self.tokens[number])

    def _choose_first(self, place: float) -> int:
        """The group a stream begins with, `place` from 0 to 1: of many streams, each group has its share."""
        weights = [group.weight if share else 0 for group, share in zip(self._groups, self._group_shares, strict=True)]
        bounds = np.cumsum(weights)
        return int(np.searchsorted(bounds, place * int(bounds[-1]), side="right"))


def _deal(
    lengths: Sequence[int], groups: Sequence[Group], index: int, num_streams: int
) -> tuple[np.ndarray, np.ndarray]:
    """What a stream gets when the places of all orders are dealt to the streams in turn.

    The deal goes on from data set to data set, so shares of a group differ by one at most, whatever its data sets are.

    Returns:
        int64 [data sets] each: the first place that is the stream's (every `num_streams`-th after it is too), and how many
        there are.
    """
    in_order = [member for group in groups for member in group.members]
    ordered = np.array(lengths, dtype=np.int64)[in_order]
    first, shares = np.empty_like(ordered), np.empty_like(ordered)
    dealt_before = np.cumsum(ordered) - ordered
    first[in_order] = (index - dealt_before) % num_streams
    shares[in_order] = np.maximum(0, -(-(ordered - first[in_order]) // num_streams))
    return first, shares
