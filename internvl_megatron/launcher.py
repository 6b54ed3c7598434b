"""Local ranks: start N processes, watch them, and end all of them when one fails.

CPU ranks are forked from a server process that has torch and Megatron Core imported already (0.5 s for 4 ranks instead of
a minute of imports). Ranks find each other through a file, so runs on one machine cannot clash over ports.
"""

import contextlib
import ctypes
import importlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from internvl_megatron.device import DeviceName, uses_gpu
from internvl_megatron.errors import ConfigError, TrainingError, UserError
from internvl_megatron.faults.stop_signals import EXIT_STALLED, STOP_SIGNALS
from internvl_megatron.ranks import RankInfo

PR_SET_PDEATHSIG = 1
SECONDS_FOR_REPORTS = 2.0
"""How long the other ranks may take to report after the first failure, so that the earliest can be told apart."""


@dataclass(frozen=True)
class Failure:
    """How one rank ended when it did not end well."""

    rank: int
    when: float
    text: str
    is_user_error: bool = False
    is_training_error: bool = False
    """Of user errors those that are a `TrainingError`."""
    is_signal: bool = False
    """The process was killed; nobody knows more."""
    is_stall: bool = False
    """Its watchdog has ended it, and written a report of all ranks."""


class RankFailedError(RuntimeError):
    """A rank failed and all ranks have been ended. The message starts with the first failure."""

    def __init__(self, failures: list[Failure]) -> None:
        # A killed rank cannot say when it died; what the others report after it, they report because of it. So do those
        # that were let go on to write the stacks of a stall.
        self.failures = sorted(
            failures, key=lambda failure: (not failure.is_stall, not failure.is_signal, failure.when)
        )
        first, *others = self.failures
        lines = [first.text] if first.is_stall else [f"rank {first.rank} failed first:", first.text.rstrip()]
        if others and not first.is_stall:
            lines.append(
                f"ranks {sorted(failure.rank for failure in others)} failed after it, most likely because of it"
            )
        super().__init__("\n".join(lines))


class InterruptedRunError(RuntimeError):
    """The run was interrupted by a signal."""

    def __init__(self, signal_number: int, in_order: bool) -> None:
        super().__init__("interrupted; every rank ended in order" if in_order else "interrupted")
        self.signal_number = signal_number
        self.in_order = in_order
        """Every rank ended by itself, and a run has saved; otherwise the ranks were killed."""


def launch(target: Callable[..., Any] | str, num_ranks: int, *args: Any, device: DeviceName = "auto") -> list[Any]:
    """Run `target(rank_info, *args)` in `num_ranks` processes and return their results by rank.

    `device` is what the ranks will open: CPU ranks are forked from a server that has torch and Megatron Core imported
    already, GPU ranks start as fresh interpreters, because those imports ask the driver and would spoil a fork.

    The target may be given as "module:function": then this process need not import what only the ranks use.

    Ctrl-C, SIGTERM or SIGUSR1 asks all ranks to stop in order (they get SIGTERM); a second one kills them.

    Raises:
        ConfigError: there would be no rank.
        RankFailedError: a rank raised or was killed; the others have been killed.
        InterruptedRunError: the run was interrupted.
    """
    if num_ranks < 1:
        raise ConfigError(f"{num_ranks} ranks: start at least one (--nproc)")
    if uses_gpu(device):
        context = multiprocessing.get_context("spawn")
    else:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["internvl_megatron.preload"])
    with tempfile.TemporaryDirectory(prefix="internvl-ranks-") as folder:
        store = f"file://{Path(folder) / 'store'}"
        ranks, readers = [], []
        # Nobody writes to it: its end closes with this process, however that ends.
        launcher_alive, keep_open = context.Pipe(duplex=False)
        for rank in range(num_ranks):
            reader, writer = context.Pipe(duplex=False)
            info = RankInfo(rank, num_ranks, rank, num_ranks, store)
            process = context.Process(
                target=_run_rank, args=(writer, launcher_alive, target, info, args), name=f"rank{rank}"
            )
            process.start()
            writer.close()
            ranks.append(process)
            readers.append(reader)
        launcher_alive.close()
        with keep_open:
            watch = _Watch(ranks, readers)
            try:
                return watch.until_done()
            finally:
                watch.close()


class _Watch:
    """Waits for all ranks; ends them when one fails."""

    def __init__(self, ranks: list[Any], readers: list[Connection]) -> None:
        self.ranks = ranks
        self.readers = readers
        self.results: dict[int, Any] = {}
        self.failures: dict[int, Failure] = {}
        self.interrupts = 0
        self.signal_number = 0

    def until_done(self) -> list[Any]:
        with _signals_to(self._interrupt):
            try:
                while len(self.results) + len(self.failures) < len(self.ranks) and not self.failures:
                    self._collect(timeout=0.5)
                deadline = time.monotonic() + SECONDS_FOR_REPORTS
                while self.failures and time.monotonic() < deadline and not self._all_reported():
                    self._collect(timeout=0.1)
            finally:
                self._end_all(kill=bool(self.failures) or not self._all_reported())
        if self.interrupts and all(failure.is_signal for failure in self.failures.values()):
            # Before training has begun, or at the second interrupt, there is nothing to save: ranks are just killed.
            raise InterruptedRunError(self.signal_number, in_order=not self.failures)
        if self.failures:
            raise RankFailedError(list(self.failures.values()))
        return [self.results[rank] for rank in range(len(self.ranks))]

    def close(self) -> None:
        """Give back the handles of ranks that have ended: an error's traceback may hold these objects for long."""
        for process in self.ranks:
            process.close()
        for reader in self.readers:
            reader.close()

    def _all_reported(self) -> bool:
        return len(self.results) + len(self.failures) == len(self.ranks)

    def _collect(self, timeout: float) -> None:
        open_ranks = [
            rank for rank in range(len(self.ranks)) if rank not in self.results and rank not in self.failures
        ]
        multiprocessing.connection.wait([self.readers[rank] for rank in open_ranks], timeout)
        for rank in open_ranks:
            if not self.readers[rank].poll():
                continue
            try:
                kind, value = self.readers[rank].recv()
            except EOFError:
                self.ranks[rank].join(timeout=1.0)
                code = self.ranks[rank].exitcode
                self.failures[rank] = Failure(
                    rank,
                    time.time(),
                    _end_of(code),
                    is_signal=code is not None and code < 0,
                    is_stall=code == EXIT_STALLED,
                )
                continue
            if kind == "result":
                self.results[rank] = value
            else:
                self.failures[rank] = value

    def _interrupt(self, signal_number: int) -> None:
        self.interrupts += 1
        self.signal_number = signal_number
        if self.interrupts == 1:
            sys.stderr.write("stopping after this step; interrupt again to stop at once\n")
        for process in self.ranks:
            if process.is_alive():
                os.kill(process.pid, signal.SIGTERM if self.interrupts == 1 else signal.SIGKILL)

    def _end_all(self, kill: bool) -> None:
        for process in self.ranks:
            if kill and process.is_alive():
                process.kill()
        for process in self.ranks:
            process.join()


def _run_rank(
    writer: Connection,
    launcher_alive: Connection,
    target: Callable[..., Any] | str,
    info: RankInfo,
    args: tuple[Any, ...],
) -> None:
    """Body of a rank's process."""
    # If the launcher or the fork server dies, however it dies, so does this rank. The server cannot stand for the
    # launcher: it waits for its last child before it ends.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_end_with_launcher, args=(launcher_alive,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends Ctrl-C to every process; the launcher decides
    try:
        writer.send(("result", _function(target)(info, *args)))
    except BaseException as error:
        user_error = isinstance(error, UserError)
        text = f"{type(error).__name__}: {error}" if user_error else traceback.format_exc()
        writer.send(("failure", Failure(info.rank, time.time(), text, user_error, isinstance(error, TrainingError))))
    finally:
        writer.close()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # destructors of process groups would wait for ranks that are gone


def _end_with_launcher(launcher_alive: Connection) -> None:
    multiprocessing.connection.wait([launcher_alive])
    os.kill(os.getpid(), signal.SIGKILL)


def _function(target: Callable[..., Any] | str) -> Callable[..., Any]:
    if not isinstance(target, str):
        return target
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _end_of(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        return f"killed by {name} (signal {-exit_code}); if nobody sent it, the machine ran out of memory"
    if exit_code == EXIT_STALLED:
        return "the run got nowhere: the report above begins with the rank that stopped first"
    return f"ended without a report (exit code {exit_code})"


@contextlib.contextmanager
def _signals_to(handle: Callable[[int], None]) -> Any:
    """Route the signals that stop a run to `handle` inside the block (main thread only, as Python wants it)."""
    try:
        previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number in previous:
            signal.signal(number, lambda number, _frame: handle(number))
    except ValueError:  # not the main thread: the caller handles signals
        previous = {}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
