"""When everything the ranks of a step do begins and ends: passes of both models, and the messages between them, as events.

A rank does its work in the order given, each piece as soon as the rank is free and what it needs is there. What others need of a
piece is sent when it is done: to all of them at once, and after what the rank has sent before. For a part of a message's time its
sender does nothing else (`Hop.held_seconds`); whoever waits for it waits until all of it is there. Links that receive are never busy.

A rank here may stand for several that do the same at the same time: those of a pipeline stage, or all encoder ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np


class Work(NamedTuple):
    """What a rank does at a time: a pass of the language model, or of the encoder."""

    kind: Literal["forward", "backward", "encode", "backprop"]
    row: int
    """Of the language model: a row, or its place in the pipeline. Of the encoder: what it encodes together, a row, a window, a chunk."""
    chunk: int = 0
    """Of the language model on this rank."""


class Need(NamedTuple):
    """Work of a rank whose outcome other work begins with."""

    rank: int
    work: Work


@dataclass(frozen=True)
class Task:
    """Work in a rank's order."""

    work: Work
    seconds: float
    needs: tuple[Need, ...] = ()


class Hop(NamedTuple):
    """How long a message is under way."""

    seconds: float = 0.0
    held_seconds: float = 0.0
    """Of these, from the first on, those in which the sender does nothing else."""


Hops = Callable[[int, int, Work], Hop]
"""Of the message from a rank to another with the outcome of the first one's work."""


class Span(NamedTuple):
    """Work, and when it is done."""

    work: Work
    start: float
    end: float


class Message(NamedTuple):
    """A message, and when it is under way."""

    work: Work
    """Whose outcome it brings."""
    sender: int
    receiver: int
    start: float
    end: float


class Wait(NamedTuple):
    """A time in which a message holds a rank up."""

    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A step, or what was simulated of one."""

    ranks: list[list[Span]]
    """In the order they run."""
    messages: list[Message]
    """Those that take time."""
    exposed: list[list[Wait]]
    """By rank: between its pieces of work, while a message it sends holds it up or the one it waits for is under way."""
    num_gpus: list[int]
    """That each rank stands for."""

    @property
    def makespan(self) -> float:
        """When the last work is done."""
        return max(spans[-1].end for spans in self.ranks if spans)

    @property
    def busy_seconds(self) -> list[float]:
        """By rank: its work."""
        return [sum(span.end - span.start for span in spans) for spans in self.ranks]

    @property
    def exposed_seconds(self) -> list[float]:
        """By rank: messages that hold it up."""
        return [sum(wait.end - wait.start for wait in waits) for waits in self.exposed]

    @property
    def exposed_share(self) -> float:
        """Of the GPUs' time, that in which messages hold them up."""
        return self._mean(self.exposed_seconds) / self.makespan

    @property
    def bubble_share(self) -> float:
        """Of the GPUs' time, that in which they wait and no message is the reason: the pipeline fills or empties, or others are slower."""
        return 1 - self._mean(self.busy_seconds) / self.makespan - self.exposed_share

    @property
    def imbalance(self) -> float:
        """By how much the busiest GPU's work is above the mean, as a share of the mean."""
        return max(self.busy_seconds) / self._mean(self.busy_seconds) - 1

    @property
    def most_rows_under_way(self) -> list[float]:
        """By rank: rows whose activations it holds at the same time, chunks as parts of rows; of ranks that only encode, what they
        encode together."""
        return [_most_under_way(spans) for spans in self.ranks]

    def _mean(self, seconds: Sequence[float]) -> float:
        """Over all GPUs."""
        return float(np.average(seconds, weights=self.num_gpus))


def _most_under_way(spans: list[Span]) -> float:
    works = [span.work for span in spans]
    passes = [work for work in works if work.kind in ("forward", "backward")] or works
    if not passes:
        return 0.0
    num_chunks = 1 + max(work.chunk for work in passes)
    held = np.cumsum([1 if work.kind in ("forward", "encode") else -1 for work in passes])
    return float(held.max()) / num_chunks


def no_messages(_sender: int, _receiver: int, _work: Work) -> Hop:
    """Nothing takes time to send."""
    return Hop()


def run(tasks: Sequence[Sequence[Task]], hops: Hops = no_messages, num_gpus: Sequence[int] | None = None) -> Timeline:
    """Go through a step.

    Args:
        tasks: of every rank, in its order. No rank does the same work twice.
        hops: how long messages take.
        num_gpus: that each rank stands for; None = as many each.
    """
    return _Simulation(tasks, hops).run(list(num_gpus) if num_gpus is not None else [1] * len(tasks))


class _Simulation:
    """One step, task by task."""

    def __init__(self, tasks: Sequence[Sequence[Task]], hops: Hops) -> None:
        self._waiting = [list(of_rank)[::-1] for of_rank in tasks]
        self._hops = hops
        self._receivers: dict[Need, list[int]] = {}
        for rank, of_rank in enumerate(tasks):
            for need in (need for task in of_rank for need in task.needs):
                receivers = self._receivers.setdefault(need, [])
                if need.rank != rank and rank not in receivers:
                    receivers.append(rank)
        self._there: dict[tuple[Need, int], Message] = {}
        """What has been sent, by receiver; on the sender itself, a message that takes no time."""
        self._ranks: list[list[Span]] = [[] for _ in tasks]
        self._messages: list[Message] = []
        self._exposed: list[list[Wait]] = [[] for _ in tasks]
        self._free, self._link_free = ([0.0] * len(tasks) for _ in range(2))

    def run(self, num_gpus: list[int]) -> Timeline:
        while any(self._waiting):
            num_left = sum(map(len, self._waiting))
            for rank, waiting in enumerate(self._waiting):
                while waiting and (inputs := self._inputs(rank, waiting[-1])) is not None:
                    self._work(rank, waiting.pop(), inputs)
            assert sum(map(len, self._waiting)) < num_left, "ranks wait for each other"
        return Timeline(self._ranks, self._messages, self._exposed, num_gpus)

    def _inputs(self, rank: int, task: Task) -> list[Message] | None:
        """What the task begins with; None while some of it has not been sent."""
        found = [self._there.get((need, rank)) for need in task.needs]
        known = [message for message in found if message is not None]
        return known if len(known) == len(found) else None

    def _work(self, rank: int, task: Task, inputs: list[Message]) -> None:
        spans = self._ranks[rank]
        before = spans[-1].end if spans else 0.0
        free = self._free[rank]
        last = max(inputs, key=lambda message: message.end, default=None)
        start = free if last is None else max(free, last.end)
        # Held up by its own message until it is free, then by the one it waits for, once that is under way.
        if free > before:
            self._exposed[rank].append(Wait(before, free))
        if last is not None and last.end > max(free, last.start):
            self._exposed[rank].append(Wait(max(free, last.start), last.end))
        end = start + task.seconds
        spans.append(Span(task.work, start, end))
        self._free[rank] = end
        self._send(Need(rank, task.work), end)

    def _send(self, done: Need, end: float) -> None:
        sender = done.rank
        self._there[done, sender] = Message(done.work, sender, sender, end, end)
        start = max(end, self._link_free[sender])
        for receiver in self._receivers.get(done, ()):
            hop = self._hops(sender, receiver, done.work)
            message = Message(done.work, sender, receiver, start, start + hop.seconds)
            self._there[done, receiver] = message
            if hop.seconds > 0:
                self._messages.append(message)
                self._link_free[sender] = max(self._link_free[sender], message.end)
            if hop.held_seconds > 0:
                self._free[sender] = max(self._free[sender], start + hop.held_seconds)
