"""When a step's work is done that fills the pauses of the pipeline, from its plan and the durations of its parts alone.

Every rank does its operations in the order of the schedule, each as soon as the rank is free and what it needs is there.
The ranks of a stage that share a row (T of them) run its passes together and encode each by itself. Messages take no time
and make nobody wait. All replicas exchange tiles with each other.

Shapes: P pipeline stages, M rows of a replica, R replicas, C chunks of the plan, "..." any further axes: cases that have the
plan in common and nothing else. Passes are in slot order: in the order in which a replica's pipeline takes its rows.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from internvl_megatron.parallel.bubble_plan import BubblePlan
from internvl_megatron.scaling.pipeline_time import one_f_one_b, passes_of_stage


class Operation(NamedTuple):
    """What a stage does at a time: a pass of the language model over a slot's rows, or of the encoder over a chunk."""

    kind: Literal["forward", "backward", "encode", "backprop"]
    number: int
    """Of the slot, or of the chunk."""


def operations_of_stage(plan: BubblePlan, stage: int) -> list[Operation]:
    """What one stage does in a step, in this order; its ranks leave out the chunks they do not run (`BubblePlan.runs`).

    The passes are Megatron Core's. What is not encoded ahead is encoded when the stage waits for its first gradient, and
    chunks run backward when it waits for one. The last stage waits for none.
    """
    num_stages, num_rows = plan.chunks_back.shape
    encoded, run_back = int(plan.chunks_ahead[stage]), 0
    operations = [Operation("encode", chunk) for chunk in range(encoded)]
    for kind, slot in passes_of_stage(stage, num_stages, num_rows):
        if kind == "backward" and stage < num_stages - 1:
            operations += [Operation("encode", chunk) for chunk in range(encoded, plan.num_chunks)]
            encoded = plan.num_chunks
            end = max(run_back, int(plan.chunks_back[stage, slot]))
            operations += [Operation("backprop", chunk) for chunk in range(run_back, end)]
            run_back = end
        operations.append(Operation(kind, slot))
    return operations + [Operation("backprop", chunk) for chunk in range(run_back, plan.num_chunks)]


@dataclass(frozen=True)
class BubbleWork:
    """Durations of the parts of one step."""

    plan: BubblePlan
    forward: np.ndarray
    """[P, M, R, ...], forward pass of a stage on a slot's row; of the slowest of the ranks that share it."""
    backward: np.ndarray
    """[P, M, R, ...]."""
    encode: np.ndarray
    """[P, C, R, T, ...], forward pass of a rank over its tiles of a chunk; 0 where it does not run it."""
    backprop: np.ndarray
    """[P, C, R, T, ...]."""

    @cached_property
    def critical_path(self) -> np.ndarray:
        """Duration of the step, [...]."""
        return _Simulation(self).run().max(axis=(0, 1, 2))

    @cached_property
    def least(self) -> np.ndarray:
        """What the critical path cannot be below with these tiles on these ranks and rows in this order, [...].

        The first slot's tiles must be encoded before the pipeline begins, those of the last come back when it has ended, and
        no rank can do with less time than its work takes.
        """
        plan = self.plan
        pipelines = one_f_one_b(self.forward, self.backward).makespan.max(axis=0)
        first, last = plan.chunks_of(0), plan.chunks_of(self.forward.shape[1] - 1)
        before = self.encode[:, first].sum(axis=1).max(axis=(0, 1, 2))
        after = self.backprop[:, last].sum(axis=1).max(axis=(0, 1, 2))
        language = (self.forward + self.backward).sum(axis=1)[:, :, None]
        work = language + self.encode.sum(axis=1) + self.backprop.sum(axis=1)
        return np.maximum(before + pipelines + after, work.max(axis=(0, 1, 2)))


class _Simulation:
    """One step, operation by operation."""

    def __init__(self, work: BubbleWork) -> None:
        self._work = work
        self._plan = work.plan
        self._num_stages = len(work.forward)
        of_passes = (*work.forward.shape[2:3], 1, *work.forward.shape[3:])
        shape = np.broadcast_shapes(work.encode.shape[2:], of_passes)
        self._free = np.zeros((self._num_stages, *shape))
        """[P, R, T, ...], when each rank can begin what comes next."""
        self._encoded = np.zeros((self._plan.num_chunks, *shape[2:]))
        """[C, ...], when the last of the ranks that are through has encoded a chunk."""
        self._num_encoded = np.zeros(self._plan.num_chunks, dtype=np.int64)
        """[C], stages whose ranks are through."""
        self._ends: dict[tuple[int, Operation], np.ndarray] = {}
        """[R, ...], of the passes of each stage that are over."""

    def run(self) -> np.ndarray:
        """When each rank has done all it has to do, [P, R, T, ...]."""
        waiting = [operations_of_stage(self._plan, stage) for stage in range(self._num_stages)]
        while any(waiting):
            num_left = sum(map(len, waiting))
            for stage, operations in enumerate(waiting):
                while operations and (inputs := self._inputs(stage, operations[0])) is not None:
                    operation = operations.pop(0)
                    if operation.kind in ("encode", "backprop"):
                        self._run_chunk(stage, operation, inputs)
                    else:
                        self._run_passes(stage, operation, inputs)
            assert sum(map(len, waiting)) < num_left, "ranks wait for each other"
        return self._free

    def _inputs(self, stage: int, operation: Operation) -> list[np.ndarray] | None:
        """When each of the things is there that an operation needs, [R, ...] or [...]; None while that is not known."""
        kind, number = operation
        if kind == "encode":
            return []
        if kind == "forward" and stage == 0:
            chunks = self._plan.chunks_of(number)
            is_known = (self._num_encoded[chunks] == self._num_stages).all()
            return [self._encoded[chunk] for chunk in chunks] if is_known else None
        if kind == "backward" and stage == self._num_stages - 1:
            return []  # the stage's own forward pass, which the order of its passes sees to
        if kind == "backprop":
            slot = int(self._plan.slot_of_chunk[number])
            gradients = self._ends.get((0, Operation("backward", slot)))
            return None if gradients is None else [gradients.max(axis=0)]
        end = self._ends.get((stage - 1 if kind == "forward" else stage + 1, operation))
        return None if end is None else [end]

    def _run_chunk(self, stage: int, operation: Operation, inputs: list[np.ndarray]) -> None:
        kind, chunk = operation
        duration = (self._work.encode if kind == "encode" else self._work.backprop)[stage, chunk]
        runs = duration > 0
        self._free[stage] = np.where(runs, _latest(self._free[stage], inputs) + duration, self._free[stage])
        if kind == "encode":
            ends = np.where(runs, self._free[stage], 0.0).max(axis=(0, 1))
            self._encoded[chunk] = np.maximum(self._encoded[chunk], ends)
            self._num_encoded[chunk] += 1

    def _run_passes(self, stage: int, operation: Operation, inputs: list[np.ndarray]) -> None:
        kind, slot = operation
        duration = (self._work.forward if kind == "forward" else self._work.backward)[stage, slot]
        self._ends[stage, operation] = _latest(self._free[stage].max(axis=1), inputs) + duration
        self._free[stage] = self._ends[stage, operation][:, None]


def _latest(time: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    for other in others:
        time = np.maximum(time, other)
    return time
