"""The thread of the model: lets jobs join the batch, makes steps, tells of tokens, and lets go of jobs nobody waits for.

On every rank of the replica this loop does the same in the same order: the leading one, which the server runs on, orders.
"""

import queue
import time
from collections.abc import Sequence
from pathlib import Path

from internvl_megatron.faults.stop_signals import StopSignals
from internvl_megatron.inference.generate import Generator
from internvl_megatron.serving.figures import Figures
from internvl_megatron.serving.jobs import Grown, Job, Orders, orders_from_payload, start

IDLE_SECONDS = 0.5
"""How long the loop waits for a job at most before it looks for a signal; other ranks hear of it as often, and wait in no collective
for longer."""


class Engine:
    """Of one rank. `submit`, `cancel` and the properties may be used by other threads, on the leading rank."""

    def __init__(self, generator: Generator, figures: Figures) -> None:
        self._generator = generator
        self._figures = figures
        self._batch = generator.new_batch()
        self._jobs: dict[int, Job] = {}
        """Under way, by their numbers."""
        self._inbox: queue.SimpleQueue[Job | int] = queue.SimpleQueue()
        """Jobs to begin, and numbers of jobs to drop."""
        self.is_stopping = False
        """No more jobs should come."""
        self._has_ended = False

    @property
    def num_active(self) -> int:
        """Sequences that grow: slots of the cache in use."""
        return len(self._batch.active)

    @property
    def num_waiting(self) -> int:
        """Answers that have not begun."""
        return len(self._batch.waiting)

    def submit(self, job: Job) -> None:
        """Let a job begin when there is room."""
        self._inbox.put(job)
        if self._has_ended:
            job.tell(None)

    def cancel(self, job: Job) -> None:
        """Nobody waits for a job any more; its images are not needed either. Does nothing to one that has ended."""
        self._inbox.put(job.number)

    def lead(self, signals: StopSignals, drain_seconds: float) -> None:
        """Run until a signal comes and jobs have ended after it, or so many seconds have passed; on the leading rank."""
        deadline = float("inf")
        is_last = False
        while not is_last:
            orders = self._next_orders()
            if signals.received is not None and not self.is_stopping:
                self.is_stopping = True
                deadline = time.monotonic() + drain_seconds
            is_idle = not (orders.joining or self._jobs)
            is_last = self.is_stopping and (is_idle or time.monotonic() >= deadline)
            orders = Orders(orders.joining, orders.leaving, is_last)
            self._generator.stages.share(orders.payload())
            self._do(orders)
        self._has_ended = True
        for job in [*self._jobs.values(), *self._next_orders().joining]:
            job.tell(None)
            self._leave(job)

    def follow(self) -> None:
        """Run as the leading rank orders; on the others."""
        is_last = False
        while not is_last:
            orders = orders_from_payload(self._generator.stages.share(None), self._generator)
            is_last = orders.is_last
            self._do(orders)

    def _next_orders(self) -> Orders:
        """What other threads have asked for by now; waits a little where there is nothing to do."""
        joining: dict[int, Job] = {}
        leaving = []
        try:
            found = self._inbox.get(block=not self._batch.is_busy, timeout=IDLE_SECONDS)
            while True:
                if isinstance(found, Job):
                    joining[found.number] = found
                elif found in joining:
                    self._leave(joining.pop(found))
                else:
                    leaving.append(found)
                found = self._inbox.get_nowait()
        except queue.Empty:
            return Orders(list(joining.values()), leaving, is_last=False)

    def _do(self, orders: Orders) -> None:
        for job in orders.joining:
            self._jobs[job.number] = job
            for request in start(job, self._generator):
                self._batch.add(request)
        dropped = [self._jobs[number] for number in orders.leaving if number in self._jobs]
        if dropped:
            self._batch.drop([request for job in dropped for request in job.requests])
            for job in dropped:
                self._leave(job)
        if self._batch.is_busy and not orders.is_last:
            self._step()

    def _step(self) -> None:
        """Make one step, and tell of it."""
        began = time.monotonic()
        grown = self._batch.step()
        self._figures.count_step(len(grown), time.monotonic() - began)
        for request, text in grown:
            job = self._jobs[request.number]
            index = job.requests.index(request)
            job.tell(Grown(index, text, len(request.answer_ids), request.end))
        for job in {self._jobs[request.number] for request, _ in grown}:
            if all(one.end is not None for one in job.requests):
                self._leave(job)

    def _leave(self, job: Job) -> None:
        """Forget a job and its images."""
        self._jobs.pop(job.number, None)
        remove_files(job.prompt.images)


def remove_files(paths: Sequence[str]) -> None:
    """Remove images that were sent; other ranks may have been quicker."""
    for path in paths:
        Path(path).unlink(missing_ok=True)
