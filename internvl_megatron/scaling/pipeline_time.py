"""When the passes of a pipeline run, from their durations alone: Megatron Core's 1F1B schedule, not interleaved.

A stage runs its passes in the order of the schedule, each as soon as the stage is free and its input is there; sending
takes no time and makes nobody wait.

Shapes: P pipeline stages, M rows (micro-batches), "..." any further axes: cases that have nothing to do with each other.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np


class Pass(NamedTuple):
    """What a stage does at a time."""

    kind: Literal["forward", "backward"]
    row: int


def passes_of_stage(stage: int, num_stages: int, num_rows: int) -> list[Pass]:
    """The passes of one stage in the order Megatron Core runs them.

    Warm-up forward passes until the first row is on its way back, then one forward and one backward pass in turn, then the
    backward passes that are left.
    """
    warmup = min(num_stages - stage - 1, num_rows)
    order = [Pass("forward", row) for row in range(warmup)]
    for row in range(warmup, num_rows):
        order += [Pass("forward", row), Pass("backward", row - warmup)]
    return order + [Pass("backward", row) for row in range(num_rows - warmup, num_rows)]


@dataclass(frozen=True)
class PipelineTimes:
    """Beginnings and ends of all passes, [P, M, ...] each, counted from when the first stage may begin."""

    forward_start: np.ndarray
    forward_end: np.ndarray
    backward_start: np.ndarray
    backward_end: np.ndarray

    @property
    def makespan(self) -> np.ndarray:
        """When the last pass ends, [...]."""
        return self.backward_end.max(axis=(0, 1))


def one_f_one_b(forward: np.ndarray, backward: np.ndarray) -> PipelineTimes:
    """Times of all passes.

    Args:
        forward: durations [P, M, ...] of the forward passes.
        backward: durations [P, M, ...] of the backward passes.
    """
    assert forward.shape == backward.shape, f"durations of {forward.shape} forward, {backward.shape} backward passes"
    num_stages, num_rows = forward.shape[:2]
    durations = {"forward": forward, "backward": backward}
    ends = {kind: np.zeros(forward.shape) for kind in durations}
    starts = {kind: np.zeros(forward.shape) for kind in durations}
    free = np.zeros((num_stages, *forward.shape[2:]))
    waiting = [passes_of_stage(stage, num_stages, num_rows) for stage in range(num_stages)]
    finished: set[tuple[int, Pass]] = set()
    while any(waiting):
        for stage in range(num_stages):
            while waiting[stage]:
                kind, row = waiting[stage][0]
                # The last stage's backward pass begins with its own output, which the order of its passes sees to.
                source = stage - 1 if kind == "forward" else stage + 1
                has_source = 0 <= source < num_stages
                if has_source and (source, waiting[stage][0]) not in finished:
                    break
                starts[kind][stage, row] = (
                    np.maximum(free[stage], ends[kind][source, row]) if has_source else free[stage]
                )
                free[stage] = ends[kind][stage, row] = starts[kind][stage, row] + durations[kind][stage, row]
                finished.add((stage, waiting[stage].pop(0)))
    return PipelineTimes(starts["forward"], ends["forward"], starts["backward"], ends["backward"])
