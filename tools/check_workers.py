"""Processes that check records. A record that ends its process costs that record alone, and none outlives this process."""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Generator, Iterable, Sequence
from contextlib import suppress
from ctypes import c_longlong
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

from internvl_megatron.data.dataset import Dataset
from internvl_megatron.data.decode_pool import DecodePool
from internvl_megatron.data.records import SampleSettings
from internvl_megatron.data.tokenizer import load_tokenizer
from internvl_megatron.errors import UserError
from tools.check_records import CRASH, Chunk, Kind, RecordChecker, Tally

_PRELOADED = ["tools.check_workers", "transformers.models.auto.tokenization_auto"]
"""Imported once, by the process that the others are forked from: tokenizers take seconds to import."""
_ENDING_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Job:
    """What a process needs to know."""

    datasets: Sequence[Dataset]
    settings: SampleSettings
    tokenizer: str
    """Its folder."""
    decode: bool
    """Whether images and videos are decoded, not only opened."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """What ended a process in order."""

    text: str
    is_user_error: bool


def check_chunks(chunks: Iterable[Chunk], job: Job, num_workers: int) -> Generator[tuple[Chunk, Tally]]:
    """Check chunks of records in several processes; each is answered once, whole or in parts, in any order.

    Raises:
        UserError: what concerns every record, see `RecordChecker.check`.
    """
    rest, again = iter(chunks), list[Chunk]()
    workers = [_Worker(job) for _ in range(num_workers)]
    busy: dict[Connection, tuple[_Worker, Chunk | None]] = {worker.connection: (worker, None) for worker in workers}
    try:
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection), "only connections are waited for"
                worker, chunk = busy.pop(connection)
                answer = worker.answer()
                if isinstance(answer, Tally) and chunk is not None:
                    yield chunk, answer
                elif answer is None:  # its process has ended
                    ending = worker.ending()
                    worker.end()
                    workers.remove(worker)
                    if chunk is None:
                        raise RuntimeError(f"a process to check records cannot run: it {ending}")
                    again += chunk.around(worker.record)
                    if chunk.stop - chunk.start == 1:  # it was given a second chance, by itself
                        yield chunk, _crashed(job, chunk, ending)
                    worker = _Worker(job)
                    workers.append(worker)
                    busy[worker.connection] = (worker, None)
                    continue
                following = again.pop() if again else next(rest, None)
                if following is not None:
                    worker.begin(following)
                    busy[connection] = (worker, following)
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """One process, with what it starts itself in a process group of its own: Ctrl-C reaches this process alone."""

    def __init__(self, job: Job) -> None:
        """Start it; its first answer comes when it is ready."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        # What is forked has the handlers with which the process it is forked from was started.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            forkserver.ensure_running()
            pipe: tuple[Any, Any] = context.Pipe()
            self.connection: Connection = pipe[0]
            self._record = context.RawValue(c_longlong)
            self._process = context.Process(target=_serve, args=(pipe[1], job, self._record), daemon=True)
            self._process.start()
        finally:
            signal.signal(signal.SIGINT, before)
        pipe[1].close()

    @property
    def record(self) -> int:
        """The record it is at, or was when it ended."""
        return self._record.value

    def begin(self, chunk: Chunk) -> None:
        """Hand it a chunk. If it has ended meanwhile, `answer` says so."""
        self._record.value = chunk.start
        with suppress(ConnectionError):
            self.connection.send(chunk)

    def answer(self) -> Tally | None:
        """Its answer, which has no records when it comes before any chunk; None if it has ended.

        Raises:
            UserError: see `check_chunks`.
        """
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionError):
            return None
        if isinstance(answer, _Failure):
            raise UserError(answer.text) if answer.is_user_error else RuntimeError(answer.text)
        return answer

    def ending(self) -> str:
        """How its process, which has closed its side, has ended."""
        self._process.join(_ENDING_SECONDS)
        code = self._process.exitcode
        if code is None:
            return "does not answer any more"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"

    def end(self) -> None:
        """Kill it and what it has started, whether it has ended or not."""
        assert self._process.pid is not None, "it was started"
        with suppress(ProcessLookupError):  # it is not yet the leader of its group, or nobody is left in it
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._process.close()
        self.connection.close()


def _crashed(job: Job, chunk: Chunk, ending: str) -> Tally:
    """A record that has ended its process."""
    where = job.datasets[chunk.dataset].where(chunk.start)
    tally, kind = Tally(1), Kind()
    kind.add(chunk.start, where, f"the process that checks it {ending}; look at its files, or drop the record")
    tally.faults[CRASH] = kind
    return tally


def _serve(connection: Connection, job: Job, record: c_longlong) -> None:
    """Body of a process: answer chunks until the other side is gone; `record` tells which one it is at."""
    os.setpgid(0, 0)
    decoder = None
    try:
        settings = job.settings
        if job.decode:  # in a process of its own: what hangs can be killed
            data = settings.data
            decoder = DecodePool(1, settings.tile_pixels, data.use_thumbnail, data.read_timeout_seconds)
        checker = RecordChecker(job.datasets, settings, load_tokenizer(job.tokenizer), decoder)
        connection.send(Tally())
        while True:
            connection.send(checker.check(connection.recv(), record))
    except (EOFError, ConnectionError):
        return
    except UserError as error:
        connection.send(_Failure(str(error), is_user_error=True))
    except Exception:
        connection.send(_Failure(traceback.format_exc(), is_user_error=False))
    finally:
        if decoder is not None:
            decoder.close()
