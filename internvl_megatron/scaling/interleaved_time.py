"""When the passes of an interleaved pipeline run, from their durations: Megatron Core's schedule with V model chunks a rank.

With one chunk this is `pipeline_time`.

Shapes: P ranks, V chunks of each (chunk c of rank s is stage c * P + s), M rows, a multiple of P.
"""

import numpy as np

from internvl_megatron.scaling.event_time import Hops, Need, Task, Timeline, Work, no_messages, run
from internvl_megatron.scaling.pipeline_time import passes_of_stage


def passes_of_rank(rank: int, num_ranks: int, num_chunks: int, num_rows: int) -> list[Work]:
    """The passes of one rank in the order Megatron Core runs them.

    Rows go through the chunks in groups of as many as there are ranks. Forward passes until the first row is on its way back, then
    one forward and one backward pass in turn, then the backward passes that are left; these take the chunks from the end.
    """
    assert num_chunks == 1 or num_rows % num_ranks == 0, f"{num_rows} rows do not go around {num_ranks} ranks"
    if num_chunks == 1:
        return [Work(kind, row) for kind, row in passes_of_stage(rank, num_ranks, num_rows)]
    table = [
        (row, chunk)
        for first in range(0, num_rows, num_ranks)
        for chunk in range(num_chunks)
        for row in range(first, first + num_ranks)
    ]
    warmup = min(2 * (num_ranks - rank - 1) + (num_chunks - 1) * num_ranks, len(table))
    forward = [Work("forward", row, chunk) for row, chunk in table]
    backward = [Work("backward", row, num_chunks - 1 - chunk) for row, chunk in table]
    order = forward[:warmup]
    for number, work in enumerate(forward[warmup:]):
        order += [work, backward[number]]
    return order + backward[len(table) - warmup :]


def pipeline_tasks(forward: np.ndarray, backward: np.ndarray, num_ranks: int) -> list[list[Task]]:
    """What every rank does.

    Args:
        forward: durations [P * V, M] of the forward passes, by stage in the order rows pass them.
        backward: durations [P * V, M] of the backward passes.
        num_ranks: P.
    """
    num_stages, num_rows = forward.shape
    num_chunks = num_stages // num_ranks
    assert forward.shape == backward.shape, f"durations of {forward.shape} forward, {backward.shape} backward passes"
    assert num_chunks * num_ranks == num_stages, f"{num_stages} stages do not go around {num_ranks} ranks"

    def task(rank: int, work: Work) -> Task:
        stage = work.chunk * num_ranks + rank
        is_forward = work.kind == "forward"
        # The last stage's backward pass begins with its own output, which the order of its passes sees to.
        chunk, source = divmod(stage - 1 if is_forward else stage + 1, num_ranks)
        needs = (Need(source, work._replace(chunk=chunk)),) if 0 <= chunk < num_chunks else ()
        return Task(work, float((forward if is_forward else backward)[stage, work.row]), needs)

    return [
        [task(rank, work) for work in passes_of_rank(rank, num_ranks, num_chunks, num_rows)]
        for rank in range(num_ranks)
    ]


def timeline(forward: np.ndarray, backward: np.ndarray, num_ranks: int, hops: Hops = no_messages) -> Timeline:
    """Run the schedule; arguments as of `pipeline_tasks`."""
    return run(pipeline_tasks(forward, backward, num_ranks), hops)
