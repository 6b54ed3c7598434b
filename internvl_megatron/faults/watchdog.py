"""Ends a run that gets nowhere, and says what every rank was doing.

The training loop says where it is (`beat`); a thread of the rank looks at how long ago that was. After `watchdog.stall_seconds`
a rank raises the alarm, a file in the run's folder. The ranks that wait for it, or for the same, see it, and all write their stacks;
those that cannot are asked by a neighbour on their machine. The rank that raised it writes the report, and all end at once:
process groups are left as they are, since to take them down is to wait for ranks that do not answer.

Nothing is sent while all is well, and each rank watches itself, so it does not matter who started the ranks. Where this thread cannot run
(a library holds the interpreter, the disk of the run's folder is gone), a timer of `faulthandler` writes the stacks of this rank to its log
and ends it.
"""

import faulthandler
import logging
import os
import sys
import threading
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from internvl_megatron.config.schema import WatchdogConfig
from internvl_megatron.faults.rank_notes import (
    OwnNote,
    RankNote,
    ask_for_stack,
    read_found,
    read_note,
    read_stacks,
    state_of,
    write_found,
)
from internvl_megatron.faults.stall_report import StuckRank, stall_report
from internvl_megatron.faults.stop_signals import EXIT_STALLED
from internvl_megatron.ranks import RankInfo
from internvl_megatron.watching.run_events import RunEvents

log = logging.getLogger(__name__)

STALLS = "stalls"
"""Folder of the reports in a run's folder."""
_ALARM, _REPORT = "alarm", "report"
STOPPED = ("T", "t")
_STATES = {"T": "stopped (by a signal)", "t": "stopped (by a debugger)", "D": "waiting for a disk", "gone": "gone"}
LONGEST_INTERVAL_SECONDS = 1.0
"""Between two looks at this rank."""
SECONDS_FOR_REPORTS = 2.5
"""From the alarm on, for ranks to write their stacks by themselves. Those that are stopped are asked at once, others then."""
SECONDS_FOR_ANSWERS = 0.75
"""For those that were asked."""
SECONDS_IN_ALL = 4.0
"""From the alarm on, until every rank has ended."""
BACKSTOP_SECONDS = 4.5
"""After the limit: by then a rank has ended, or faulthandler ends it."""
POLL_SECONDS = 0.02
SECONDS_BETWEEN_NOTES = 10.0
"""At least."""


@dataclass(frozen=True)
class _Beat:
    place: str
    when: float
    """Of `time.monotonic`."""
    limit_seconds: float


class Watchdog:
    """Of one rank; it watches from its construction on. Only its own thread ends the process."""

    def __init__(self, info: RankInfo, folder: Path, settings: WatchdogConfig) -> None:
        """Begin to watch.

        Args:
            info: this rank.
            folder: of the run, which exists.
            settings: how long the run may get nowhere.
        """
        self._info, self._folder, self._settings = info, folder, settings
        self.step = 0
        """Steps taken, for the report."""
        self._is_starting = True
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self.beat("starting")
        self._note = OwnNote(folder, info.rank)
        self._note.write("starting", 0)
        # Left by a run before; whoever is still alive of that one ends without this file too.
        for name in (_ALARM, _REPORT):
            (self._note.folder / name).unlink(missing_ok=True)
        if settings.stall_seconds is not None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def beat(self, place: str, extra_seconds: float = 0.0) -> None:
        """This rank has got to a place, and will be somewhere else within the limit and `extra_seconds`."""
        limit = (self._settings.stall_seconds or 0.0) + extra_seconds
        if self._is_starting:
            limit += self._settings.start_seconds
        self._last = _Beat(place, time.monotonic(), limit)

    def has_started(self) -> None:
        """The first step is over: nothing is compiled or loaded any more."""
        self._is_starting = False

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._note.close()

    def _watch(self) -> None:
        limit = float(self._settings.stall_seconds or 0)
        interval = min(LONGEST_INTERVAL_SECONDS, limit / 20)
        next_note = time.monotonic() + interval
        while not self._closed.wait(interval):
            now, last = time.monotonic(), self._last
            idle = now - last.when
            faulthandler.dump_traceback_later(max(0.0, last.limit_seconds - idle) + BACKSTOP_SECONDS, exit=True)
            # Others may have a lower limit than this rank has just now; one that gets on looks for no alarm.
            if idle > last.limit_seconds or (idle > limit / 4 and self._is_there(_ALARM)):
                self._end(last, idle)
            if now >= next_note:
                self._write_note(last, idle)
                next_note = now + max(SECONDS_BETWEEN_NOTES, limit / 8)

    def _write_note(self, last: _Beat, idle: float) -> None:
        try:
            self._note.write(self._where(last), idle)
        except OSError as error:  # a full disk, of which saves say more
            log.warning("%s: no heartbeat (%s)", self._note.folder, error.strerror)

    def _where(self, last: _Beat) -> str:
        return f"{last.place}, step {self.step + 1}"

    def _end(self, last: _Beat, idle: float) -> None:
        """Report, and end this process."""
        log.error("no progress for %.1f s in %s: the run ends", idle, self._where(last))
        try:
            self._tell(last, idle)
        except OSError as error:
            log.error("%s: no report (%s); stacks of this rank:", self._folder, error.strerror)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        finally:
            sys.stderr.flush()
            os._exit(EXIT_STALLED)

    def _tell(self, last: _Beat, idle: float) -> None:
        """Write down where this rank is, and if it is the first to do so, also what the others have written."""
        began = time.monotonic()
        try:
            os.close(os.open(self._note.folder / _ALARM, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            is_first = True
        except FileExistsError:
            is_first = False
        self._note.write_stacks()
        self._note.write(self._where(last), idle, is_stuck=True)
        self._ask_the_silent(is_first, began + SECONDS_FOR_REPORTS)
        if is_first:
            self._report(idle)
        while not self._is_there(_REPORT) and time.monotonic() < began + SECONDS_IN_ALL:
            time.sleep(POLL_SECONDS)

    def _ask_the_silent(self, is_first: bool, deadline: float) -> None:
        """Wait for the others to report, the first rank for all; ask those on this machine that cannot, or do not, and write down
        what the kernel says of them."""
        info, folder = self._info, self._note.folder
        neighbours = range(info.rank - info.local_rank, info.rank - info.local_rank + info.local_world_size)
        asked = set[int]()
        is_late = False
        while not is_late:
            is_late = time.monotonic() > deadline
            silent = [
                rank for rank in (range(info.world_size) if is_first else neighbours) if not self._has_reported(rank)
            ]
            if not silent:
                return
            for rank in set(silent) & (set(neighbours) - asked):
                note = read_note(folder, rank)
                state = "gone" if note is None else state_of(note)
                if note is not None and (state in STOPPED or is_late):
                    asked.add(rank)
                    write_found(folder, rank, _STATES.get(state, "not waiting for anybody"))
                    ask_for_stack(note)
            time.sleep(POLL_SECONDS)
        time.sleep(SECONDS_FOR_ANSWERS)

    def _is_there(self, name: str) -> bool:
        """Whether some rank has made this file; False where the folder does not answer."""
        return os.path.exists(self._note.folder / name)  # noqa: PTH110 - pathlib's raises if the disk has an error

    def _has_reported(self, rank: int) -> bool:
        note = read_note(self._note.folder, rank)
        return note is not None and note.is_stuck

    def _report(self, idle: float) -> None:
        now, folder = time.time(), self._note.folder
        ranks = [self._described(rank, read_note(folder, rank)) for rank in range(self._info.world_size)]
        text = f"no progress for {idle:.1f} s (watchdog.stall_seconds={self._settings.stall_seconds}); the first to stop is ahead"
        text = f"{text}\n\n{stall_report(ranks, now)}\n"
        path = self._folder / STALLS / f"{datetime.now().astimezone().strftime('%Y-%m-%dT%H-%M-%S')}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        RunEvents(self._folder).write(self.step, "stall", f"{text.partition('; the first')[0]}: {path}")
        sys.stderr.write(f"{text}\n{path} has this report\n")
        (folder / _REPORT).touch()

    def _described(self, rank: int, note: RankNote | None) -> StuckRank:
        if note is None:
            return StuckRank(rank, "an unknown host", "silent: it has never said anything", "nothing", 0.0, ())
        stacks = tuple(stack for stack in read_stacks(self._note.folder, note) if __file__ not in stack)
        state = read_found(self._note.folder, rank) or ("" if note.is_stuck else "silent")
        return StuckRank(rank, note.host, state, note.place, note.since, stacks)
