"""Work of all ranks beside training: each does its part in a thread, then rank 0 closes, and nobody waits for another one's disk.

    part      every rank, in a thread
    close     when all parts are done, rank 0, in its thread, knowing what each rank returned
    give up   in its place if a part has failed

`poll`, once a step, takes a job under way further, as far as all ranks have come.
"""

import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from internvl_megatron.parallel.groups import Groups
from internvl_megatron.parallel.host import exchange_bytes, sum_floats


class JobError(RuntimeError):
    """A job has come to nothing; the message says which rank met what."""


@dataclass(frozen=True)
class Ending:
    """How a job ended."""

    succeeded: bool
    """The same on all ranks."""
    result: Any = None
    """Of closing; on rank 0."""
    error: BaseException | None = None
    """On rank 0."""


class SharedJob:
    """One job at a time. `start` and `poll` are called by all ranks."""

    def __init__(self, groups: Groups, thread_name: str) -> None:
        """Its thread gets a name, for whoever looks at a stuck process."""
        self.worker = ThreadPoolExecutor(1, thread_name_prefix=thread_name)
        self._groups = groups
        self._own: Future[Any] | None = None
        """What this rank has to do at present; None = nothing."""
        self._close: Callable[[Sequence[Any]], Any] | None = None
        self._give_up: Callable[[], None] | None = None
        self._is_closing = False
        self.is_running = False

    def start(
        self, part: Callable[[], Any], close: Callable[[Sequence[Any]], Any], give_up: Callable[[], None]
    ) -> None:
        """Begin.

        Args:
            part: what this rank does; what it returns must be small, and is pickled.
            close: on rank 0, with what the parts returned, in the order of the ranks.
            give_up: on rank 0, removes what there is if a part has failed.
        """
        assert not self.is_running, "one job at a time"
        self._close, self._give_up = close, give_up
        self._own, self._is_closing, self.is_running = self.worker.submit(part), False, True

    def poll(self) -> Ending | None:
        """Go on if all ranks have come so far; how the job ended, if it has just now."""
        if not self.is_running:
            return None
        is_done = self._own is None or self._own.done()
        has_failed = self._own is not None and is_done and self._own.exception() is not None
        num_done, num_failed = sum_floats([float(is_done), float(has_failed)], self._groups.host_world)
        if num_done < self._groups.layout.world_size:
            return None
        if not self._is_closing:
            self._begin_to_close(num_failed > 0)
            return None
        own, self._own, self.is_running = self._own, None, False
        if own is None:
            return Ending(num_failed == 0)
        error = own.exception()
        return Ending(num_failed == 0, None if error is not None else own.result(), error)

    def shutdown(self) -> None:
        """End the thread; what is under way is given up if nobody has waited for it."""
        self.worker.shutdown(wait=False, cancel_futures=True)

    def _begin_to_close(self, has_failed: bool) -> None:
        """Rank 0 hears what became of all parts, and goes on from there."""
        assert self._own is not None, "every rank has a part"
        error = self._own.exception()
        part = self._own.result() if error is None else JobError(f"rank {self._groups.rank}: {reason_of(error)}")
        payloads = [pickle.dumps(part), *[b""] * (self._groups.layout.world_size - 1)]
        received = exchange_bytes(payloads, self._groups.host_world)
        self._is_closing, self._own = True, None
        if self._groups.rank != 0:
            return
        # From this job's own ranks, over its own connections: no file and no user has a hand in it.
        parts = [pickle.loads(payload) for payload in received]
        if has_failed:
            self._own = self.worker.submit(self._fail, [part for part in parts if isinstance(part, JobError)])
        else:
            assert self._close is not None, "the job has begun"
            self._own = self.worker.submit(self._close, parts)

    def _fail(self, errors: Sequence[JobError]) -> None:
        assert self._give_up is not None, "the job has begun"
        self._give_up()
        more = f" (and {len(errors) - 1} ranks more)" if len(errors) > 1 else ""
        raise JobError(f"{errors[0]}{more}")


def reason_of(error: BaseException) -> str:
    """An error in a few words."""
    if isinstance(error, JobError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}"
    return f"{type(error).__name__}: {error}"
