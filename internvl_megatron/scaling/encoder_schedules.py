"""What every rank of a step does in which order, by who encodes and when: the schedules that are compared, for `event_time`.

    phases apart    all ranks encode a window's tiles, its rows go through the pipeline, all ranks run the tiles backward
    in bubbles      the decoupled schedule: all ranks encode in the pauses of the pipeline, as a `BubblePlan` says
    first stage     the first rank encodes a row before the row's forward pass, and runs it backward after its backward pass
    disaggregated   encoder ranks do nothing else, for all pipelines: a stage before the first stage

Shapes: P ranks of a pipeline, V chunks of each, M rows, W windows, C chunks of tiles, T ranks of a stage.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from internvl_megatron.parallel.bubble_plan import BubblePlan
from internvl_megatron.scaling.bubble_time import operations_of_stage
from internvl_megatron.scaling.event_time import Need, Task, Work
from internvl_megatron.scaling.interleaved_time import passes_of_rank, pipeline_tasks


@dataclass(frozen=True)
class PipelineSeconds:
    """Durations of the language model's passes."""

    forward: np.ndarray
    """[P * V, M], by stage in the order rows pass them."""
    backward: np.ndarray
    num_ranks: int
    """P."""

    @property
    def num_chunks(self) -> int:
        """V."""
        return len(self.forward) // self.num_ranks

    @property
    def num_rows(self) -> int:
        """M."""
        return self.forward.shape[1]

    def tasks(self) -> list[list[Task]]:
        """Without an encoder."""
        return pipeline_tasks(self.forward, self.backward, self.num_ranks)

    def of_rows(self, rows: slice) -> "PipelineSeconds":
        """Some of the rows alone."""
        return replace(self, forward=self.forward[:, rows], backward=self.backward[:, rows])


def in_first_stage(passes: PipelineSeconds, encode: Sequence[float], backprop: Sequence[float]) -> list[list[Task]]:
    """The first rank encodes row by row; durations [M]."""
    tasks = passes.tasks()
    first: list[Task] = []
    for task in tasks[0]:
        kind, row, chunk = task.work
        if chunk == 0 and kind == "forward":
            first.append(Task(Work("encode", row), encode[row]))
        first.append(task)
        if chunk == 0 and kind == "backward":
            first.append(Task(Work("backprop", row), backprop[row]))
    return [first, *tasks[1:]]


def encoder_order(num_ranks: int, num_chunks: int, num_rows: int) -> list[Work]:
    """What encoder ranks do in this order: what a stage before the first one would.

    As the first stage runs its rows forward and backward, so do they, ahead of it by as many rows as it takes one after the other:
    one, or, where they go around the chunks in groups, a group. With one chunk these are 1F1B's passes of the first of P + 1 stages.
    """
    ahead = min(1 if num_chunks == 1 else num_ranks, num_rows)
    order = [Work("encode", row) for row in range(ahead)]
    for kind, row, chunk in passes_of_rank(0, num_ranks, num_chunks, num_rows):
        if chunk == 0 and kind == "backward":
            order.append(Work("backprop", row))
        elif chunk == 0 and row + ahead < num_rows:
            order.append(Work("encode", row + ahead))
    return order


def disaggregated(passes: PipelineSeconds, encode: Sequence[float], backprop: Sequence[float]) -> list[list[Task]]:
    """Encoder ranks, as one rank after those of the pipeline; durations [M], of a row of every pipeline."""
    tasks = passes.tasks()
    encoders = passes.num_ranks
    tasks[0] = [_with_needs(task, _encoded(task.work, [encoders])) for task in tasks[0]]
    order = [
        Task(work, encode[work.row])
        if work.kind == "encode"
        else Task(work, backprop[work.row], (Need(0, Work("backward", work.row)),))
        for work in encoder_order(passes.num_ranks, passes.num_chunks, passes.num_rows)
    ]
    return [*tasks, order]


def phases_apart(
    passes: PipelineSeconds, encode: Sequence[float], backprop: Sequence[float], window_rows: int
) -> list[list[Task]]:
    """All ranks encode; durations [W], of a window's tiles on a rank."""
    tasks: list[list[Task]] = [[] for _ in range(passes.num_ranks)]
    everyone = range(passes.num_ranks)
    for window, first in enumerate(range(0, passes.num_rows, window_rows)):
        rows = slice(first, min(first + window_rows, passes.num_rows))
        pipeline = [[_later(task, first) for task in of_rank] for of_rank in passes.of_rows(rows).tasks()]
        encoded = tuple(Need(rank, Work("encode", window)) for rank in everyone)
        pipeline[0][0] = _with_needs(pipeline[0][0], encoded)
        back = Need(0, pipeline[0][-1].work)  # the last of the first stage
        for rank in everyone:
            tasks[rank] += [
                Task(Work("encode", window), encode[window]),
                *pipeline[rank],
                Task(Work("backprop", window), backprop[window], (back,)),
            ]
    return tasks


def in_bubbles(
    passes: PipelineSeconds, plan: BubblePlan, encode: np.ndarray, backprop: np.ndarray
) -> list[list[Task]]:
    """All ranks encode in pauses; one replica.

    A stage's ranks begin passes together: between two passes, what each encodes counts as far as it makes the slowest slower.

    Args:
        passes: in slot order, one chunk a rank.
        plan: of it.
        encode: durations [P, C, T], of a rank's tiles of a chunk; 0 where it does not run it.
        backprop: durations [P, C, T].
    """
    assert passes.num_chunks == 1, f"{passes.num_chunks} chunks a rank, and pauses are filled with one"
    runs = encode.max(axis=2) > 0
    of_passes = [{task.work: task for task in of_rank} for of_rank in passes.tasks()]
    tasks: list[list[Task]] = []
    for stage, of_stage in enumerate(of_passes):
        order: list[Task] = []
        since_pass = np.zeros(encode.shape[2])
        for kind, number in operations_of_stage(plan, stage):
            if kind in ("forward", "backward"):
                task, since_pass = of_stage[Work(kind, number)], np.zeros(encode.shape[2])
                chunks = plan.chunks_of(number) if stage == 0 and kind == "forward" else ()
                encoded = [
                    Need(rank, Work("encode", c)) for c in chunks for rank in np.flatnonzero(runs[:, c]).tolist()
                ]
                order.append(_with_needs(task, tuple(encoded)))
            elif runs[stage, number]:
                before = since_pass.max()
                since_pass = since_pass + (encode if kind == "encode" else backprop)[stage, number]
                slot = int(plan.slot_of_chunk[number])
                needs = (Need(0, Work("backward", slot)),) if kind == "backprop" else ()
                order.append(Task(Work(kind, number), float(since_pass.max() - before), needs))
        tasks.append(order)
    return tasks


def _encoded(work: Work, ranks: Sequence[int]) -> tuple[Need, ...]:
    """What a row's first pass needs of those who encode it."""
    is_first = work.kind == "forward" and work.chunk == 0
    return tuple(Need(rank, Work("encode", work.row)) for rank in ranks) if is_first else ()


def _with_needs(task: Task, more: tuple[Need, ...]) -> Task:
    return replace(task, needs=task.needs + more)


def _later(task: Task, num_rows: int) -> Task:
    """The same of a row so many places further."""

    def moved(work: Work) -> Work:
        return work._replace(row=work.row + num_rows)

    return replace(task, work=moved(task.work), needs=tuple(Need(rank, moved(work)) for rank, work in task.needs))
