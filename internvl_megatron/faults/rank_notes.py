"""What each rank of a run says of itself in the run's folder: who it is, where it was last, and its stacks when somebody asks.

heartbeats/rank-00002.json     rewritten now and then while the rank lives, for whoever wonders about one that is silent
heartbeats/rank-00002.stack    stacks of its threads: written by SIGUSR2, whatever the rank is doing, and by a rank that is stuck
heartbeats/rank-00002.found    what a neighbour found it to be (stopped, gone, ...) before it asked for these
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from internvl_megatron.typed_object import typed_object

HEARTBEATS = "heartbeats"
STACK_SIGNAL = signal.SIGUSR2
LONGEST_STATE_CHARACTERS = 80
LAST_SECOND = 2**33
"""Since 1970: no clock is later."""


@dataclass(frozen=True)
class RankNote:
    """What a rank has said of itself."""

    rank: int
    host: str
    pid: int
    started_ticks: int
    """When the process began, as the kernel counts: by this a process is told from a later one with the same number."""
    main_thread: int
    """As Python calls it in the stacks."""
    place: str
    """What it was doing."""
    since: float
    """When it began to, in seconds since 1970."""
    is_stuck: bool = False
    """It has found this out itself, and its stacks are written."""


class OwnNote:
    """A rank's own note and stacks. From its construction on SIGUSR2 writes the stacks."""

    def __init__(self, folder: Path, rank: int) -> None:
        """Begin new files. Raises OSError if the folder cannot be written."""
        self.folder = folder / HEARTBEATS
        self.folder.mkdir(exist_ok=True)
        self._rank = rank
        self._path = note_path(self.folder, rank)
        found_path(self.folder, rank).unlink(missing_ok=True)
        self._stacks = stack_path(self.folder, rank).open("w", encoding="utf-8")
        pid, main = os.getpid(), threading.main_thread().ident or 0
        self._process = socket.gethostname(), pid, started_ticks(pid) or 0, main
        faulthandler.register(STACK_SIGNAL, self._stacks, all_threads=True)

    def write(self, place: str, idle_seconds: float, is_stuck: bool = False) -> None:
        """Say where this rank is. Raises OSError."""
        note = RankNote(self._rank, *self._process, place, time.time() - idle_seconds, is_stuck)
        partial = self._path.with_suffix(".writing")
        partial.write_text(json.dumps(asdict(note)), encoding="utf-8")
        partial.replace(self._path)

    def write_stacks(self) -> None:
        """Write the stacks of all threads of this process."""
        faulthandler.dump_traceback(self._stacks, all_threads=True)

    def close(self) -> None:
        """Stop answering."""
        faulthandler.unregister(STACK_SIGNAL)
        self._stacks.close()


def note_path(folder: Path, rank: int) -> Path:
    """Where a rank's note is; `folder` is `heartbeats` of the run."""
    return folder / f"rank-{rank:05d}.json"


def stack_path(folder: Path, rank: int) -> Path:
    """Where its stacks are."""
    return folder / f"rank-{rank:05d}.stack"


def found_path(folder: Path, rank: int) -> Path:
    """Where it is written what a neighbour found it to be."""
    return folder / f"rank-{rank:05d}.found"


def write_found(folder: Path, rank: int, state: str) -> None:
    """Write down what a rank was found to be, unless somebody has: who asks for stacks lets a stopped rank go on. Raises OSError."""
    with contextlib.suppress(FileExistsError), found_path(folder, rank).open("x", encoding="utf-8") as file:
        file.write(state)


def read_found(folder: Path, rank: int) -> str:
    """What a neighbour found a rank to be; '' = nobody has looked."""
    try:
        return found_path(folder, rank).read_text(encoding="utf-8", errors="replace")[:LONGEST_STATE_CHARACTERS]
    except OSError:
        return ""


def read_note(folder: Path, rank: int) -> RankNote | None:
    """What a rank has said last; None if it has not said anything."""
    try:
        note = typed_object(RankNote, json.loads(note_path(folder, rank).read_bytes()))
        return note if 0 <= note.since < LAST_SECOND else None
    except (OSError, ValueError, RecursionError):
        return None


def read_stacks(folder: Path, note: RankNote) -> list[str]:
    """Stacks of a rank's threads when it was first asked, the main thread's ahead; empty = it was not asked, or did not answer."""
    try:
        lines = stack_path(folder, note.rank).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    stacks: list[list[str]] = []
    for line in filter(None, lines):
        if not line.startswith(" "):
            if stacks and f"{note.main_thread:x} " in stacks[-1][0]:  # the oldest thread ends an answer
                break
            stacks.append([])
        if stacks:
            stacks[-1].append(line)
    return ["\n".join(stack) for stack in reversed(stacks)]


def started_ticks(pid: int) -> int | None:
    """When a process began; None if there is none."""
    fields = _stat(pid)
    return None if fields is None else int(fields[19])


def state_of(note: RankNote) -> str:
    """What the kernel says of a rank's process on this machine: T = stopped, D = waiting for a disk; 'gone' if it has ended."""
    fields = _stat(note.pid)
    return "gone" if fields is None or int(fields[19]) != note.started_ticks else fields[0]


def ask_for_stack(note: RankNote) -> None:
    """Have a rank of this machine write its stacks; one that was stopped is let go on, and writes them first of all."""
    if state_of(note) != "gone":
        os.kill(note.pid, STACK_SIGNAL)
        os.kill(note.pid, signal.SIGCONT)


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat after the name: state first."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
