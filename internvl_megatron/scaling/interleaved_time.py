"""When the passes of an interleaved pipeline run, from their durations alone: Megatron Core's schedule with V model chunks a rank.

A rank runs its passes in the order of the schedule, each as soon as the rank is free and its input is there; sending takes no time
and makes nobody wait. With one chunk this is `pipeline_time`.

Shapes: P ranks, V chunks of each (chunk c of rank s is stage c * P + s), M rows, a multiple of P.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from internvl_megatron.scaling.pipeline_time import passes_of_stage


class ChunkPass(NamedTuple):
    """What a rank does at a time."""

    kind: Literal["forward", "backward"]
    row: int
    chunk: int


class Span(NamedTuple):
    """A pass and when it runs."""

    work: ChunkPass
    start: float
    end: float


def passes_of_rank(rank: int, num_ranks: int, num_chunks: int, num_rows: int) -> list[ChunkPass]:
    """The passes of one rank in the order Megatron Core runs them.

    Rows go through the chunks in groups of as many as there are ranks. Forward passes until the first row is on its way back, then
    one forward and one backward pass in turn, then the backward passes that are left; these take the chunks from the end.
    """
    assert num_chunks == 1 or num_rows % num_ranks == 0, f"{num_rows} rows do not go around {num_ranks} ranks"
    if num_chunks == 1:
        return [ChunkPass(kind, row, 0) for kind, row in passes_of_stage(rank, num_ranks, num_rows)]
    table = [
        (row, chunk)
        for first in range(0, num_rows, num_ranks)
        for chunk in range(num_chunks)
        for row in range(first, first + num_ranks)
    ]
    warmup = min(2 * (num_ranks - rank - 1) + (num_chunks - 1) * num_ranks, len(table))
    forward = [ChunkPass("forward", row, chunk) for row, chunk in table]
    backward = [ChunkPass("backward", row, num_chunks - 1 - chunk) for row, chunk in table]
    order = forward[:warmup]
    for number, work in enumerate(forward[warmup:]):
        order += [work, backward[number]]
    return order + backward[len(table) - warmup :]


@dataclass(frozen=True)
class Timeline:
    """All passes of a step by rank, in the order they run."""

    ranks: list[list[Span]]

    @property
    def makespan(self) -> float:
        """When the last pass ends."""
        return max(spans[-1].end for spans in self.ranks)

    @property
    def idle_share(self) -> float:
        """Of the ranks' time, that in which they run nothing."""
        busy = sum(span.end - span.start for spans in self.ranks for span in spans)
        return 1 - busy / (len(self.ranks) * self.makespan)

    @property
    def most_rows_under_way(self) -> list[float]:
        """By rank: rows whose activations it holds at the same time, chunks as parts of rows."""
        most = []
        for spans in self.ranks:
            num_chunks = 1 + max(span.work.chunk for span in spans)
            held = np.cumsum([1 if span.work.kind == "forward" else -1 for span in spans])
            most.append(float(held.max()) / num_chunks)
        return most


def timeline(forward: np.ndarray, backward: np.ndarray, num_ranks: int) -> Timeline:
    """Run the schedule.

    Args:
        forward: durations [P * V, M] of the forward passes, by stage in the order rows pass them.
        backward: durations [P * V, M] of the backward passes.
        num_ranks: P.
    """
    num_stages, num_rows = forward.shape
    num_chunks = num_stages // num_ranks
    assert forward.shape == backward.shape, f"durations of {forward.shape} forward, {backward.shape} backward passes"
    assert num_chunks * num_ranks == num_stages, f"{num_stages} stages do not go around {num_ranks} ranks"
    waiting = [passes_of_rank(rank, num_ranks, num_chunks, num_rows)[::-1] for rank in range(num_ranks)]
    ranks: list[list[Span]] = [[] for _ in waiting]
    ends: dict[tuple[str, int, int], float] = {}
    while any(waiting):
        num_left = sum(map(len, waiting))
        for rank, works in enumerate(waiting):
            while works:
                work = works[-1]
                stage = work.chunk * num_ranks + rank
                before = stage - 1 if work.kind == "forward" else stage + 1
                # The last stage's backward pass begins with its own output, which the order of its passes sees to.
                there = ends.get((work.kind, before, work.row)) if 0 <= before < num_stages else 0.0
                if there is None:
                    break
                start = max(there, ranks[rank][-1].end if ranks[rank] else 0.0)
                durations = forward if work.kind == "forward" else backward
                end = start + float(durations[stage, work.row])
                ends[work.kind, stage, work.row] = end
                ranks[rank].append(Span(works.pop(), start, end))
        assert sum(map(len, waiting)) < num_left, "ranks wait for each other"
    return Timeline(ranks)
