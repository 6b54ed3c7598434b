"""Faults in a small training run on CPU ranks, one after another at random times: each costs a checkpoint's interval at most, and nothing else.

    python -m tools.chaos [--faults 50] [--seed 0] [--stall-seconds 30] [--synchronous] [--folder FOLDER] [--output FILE.json]

Ranks are killed, also while they save, stopped, asked to end, and run out of disk; checkpoints and positions in the data are damaged between
two starts. After each fault the same command is started again, in this process, whose ranks are forked from a warm interpreter.
At the end losses and gradient norms of all steps must be those of a run that nobody disturbed, bit for bit, and nothing may be left behind: no
process, no shared memory, no file handle, no temporary folder. With --output, the record is written as JSON and as a table beside it.
"""

import argparse
import contextlib
import json
import multiprocessing.util
import os
import random
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from internvl_megatron.checkpoint import folders
from internvl_megatron.checkpoint.file_sums import find_damage
from internvl_megatron.config.overrides import apply_overrides
from internvl_megatron.config.recipes import demo_digits
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.faults.rank_notes import HEARTBEATS, RankNote, read_note, state_of
from internvl_megatron.launcher import InterruptedRunError, RankFailedError, launch
from internvl_megatron.watching.metrics import METRICS_FILE, read_metrics
from internvl_megatron.watching.run_events import EVENTS_FILE
from tools.machine_record import machine_record
from tools.prepare_demo import Amounts, prepare

TRAIN_RANK = "internvl_megatron.trainer:train_rank"
NUM_RANKS = 2
SAVE_EVERY = 4
MORE_SECONDS = 10.0
"""Until the others have come to a halt in the step under way, and after the limit until all have ended."""
POLL_SECONDS = 0.01
LEAVING_SECONDS = 15.0
"""For processes that end with their parents."""
LARGEST_FILE_BYTES = 20_000
"""What a rank can write on a full disk."""
AMOUNTS = Amounts(
    num_pictures=60, num_pairs=12, num_texts=20, num_heldout_pictures=12, num_heldout_pairs=6, num_heldout_texts=6, questions_per_task=4,
)  # fmt: skip


@dataclass(frozen=True)
class FaultRecord:
    """What became of one fault."""

    kind: str
    rank: int | None
    """It was done to; None = to all, or to files."""
    at_step: int
    """Steps taken when it came."""
    ended_seconds: float
    """From the fault to the end of all ranks; 0 = the run went on."""
    steps_redone: int
    most_steps_redone: int
    """What may be lost: an interval for this fault and for each full disk just before it, and the steps taken while the checkpoint
    that was lost was being written."""
    restart_seconds: float
    """From the start after it to the first step that was taken."""


class ChaosError(RuntimeError):
    """The run has not survived, or not unchanged."""


class Chaos:
    """A run and what is done to it."""

    def __init__(self, folder: Path, num_faults: int, seed: int, stall_seconds: float, asynchronous: bool) -> None:
        """Prepare data in a folder, and draw the faults."""
        self.stall_seconds, self.asynchronous = stall_seconds, asynchronous
        self.folder, self.run = folder, folder / "disturbed"
        prepare(folder / "data", amounts=AMOUNTS)
        self.num_faults = num_faults
        self.num_steps = SAVE_EVERY * (num_faults + 2)
        self.draw = random.Random(seed)
        kinds = [KINDS[number % len(KINDS)] for number in range(num_faults)]
        self.draw.shuffle(kinds)
        self.plan = [
            (kind, SAVE_EVERY * (place + 1) + self.draw.randrange(SAVE_EVERY)) for place, kind in enumerate(kinds)
        ]
        self.records: list[FaultRecord] = []
        self.resume_step = 0
        """The run goes on from there."""
        self._family: set[psutil.Process] = set()

    def config(self, run: Path) -> RunConfig:
        """Of both runs."""
        data = self.folder / "data"
        return apply_overrides(
            demo_digits(),
            [
                f"data.meta={data / 'train_meta.json'}", f"data.tokenizer={data / 'tokenizer'}", f"folder={run}",
                "data.eval_meta=null", "eval_every_steps=null", "data.tokens_per_row=512", "data.tiles_per_row=32", "data.num_workers=1",
                "parallel.tensor_size=1", f"parallel.pipeline_size={NUM_RANKS}", "optimizer.schedule=constant", "optimizer.warmup_ratio=0",
                f"num_steps={self.num_steps}", f"checkpoint.save_every_steps={SAVE_EVERY}", "checkpoint.keep_last=3", "device=cpu",
                f"watchdog.stall_seconds={self.stall_seconds}", f"checkpoint.asynchronous={str(self.asynchronous).lower()}",
            ],
        )  # fmt: skip

    def go(self) -> None:
        """Run undisturbed, then with all faults; raises `ChaosError`."""
        whole = self.folder / "undisturbed"
        launch(TRAIN_RANK, NUM_RANKS, self.config(whole), device="cpu")
        before = Leftovers.now()
        faults = list(self.plan)
        while self._attempt(faults):
            continue
        self._compare(whole)
        self._check_gone(before)

    def _attempt(self, faults: list[tuple[str, int]]) -> bool:
        """Start the run and do the next faults to it, up to one that ends it; whether it has to be started again."""
        watcher = _Watcher(self, faults)
        began = time.monotonic()
        thread = threading.Thread(target=watcher.watch)
        thread.start()
        failure: Exception | None = None
        try:
            launch(TRAIN_RANK, NUM_RANKS, self.config(self.run), device="cpu")
        except (RankFailedError, InterruptedRunError) as error:
            failure = error
        ended = time.monotonic()
        watcher.is_over.set()
        thread.join()
        if watcher.first_step is not None and self.records and self.records[-1].restart_seconds < 0:
            self.records[-1] = replace(self.records[-1], restart_seconds=watcher.first_step - began)
        if watcher.error is not None:
            raise watcher.error
        if watcher.ending is None:
            if failure is not None:
                raise ChaosError(f"the run has ended without a fault: {failure}")
            return False
        self._survey(watcher.ending, watcher.ending_rank, watcher.fault_time, ended, failure)
        return True

    def _survey(self, kind: str, rank: int | None, when: float, ended: float, failure: Exception | None) -> None:
        """Look at what a fault that ended the run has left, and damage it more if it is that kind of fault."""
        checkpoints = folders.finished(self.run / folders.CHECKPOINTS)
        reached = read_metrics(self.run / METRICS_FILE)[-1]["step"]
        if kind == "stop" and not (isinstance(failure, RankFailedError) and failure.failures[0].is_stall):
            raise ChaosError(f"a stopped rank was not found: {failure}")
        if kind == "stop" and ended - when > self.stall_seconds + MORE_SECONDS:
            raise ChaosError(
                f"a stopped rank has held the run for {ended - when:.1f} s, {self.stall_seconds} s is the limit"
            )
        if kind in DAMAGES:
            DAMAGES[kind](checkpoints[-1])
        newest = max((folders.read_info(path).step for path in checkpoints if not find_damage(path)), default=0)
        self.resume_step = newest
        most = SAVE_EVERY * (1 + self._full_disks())
        if self.asynchronous:
            most += self._steps_beside_save(reached)
        record = FaultRecord(kind, rank, reached, ended - when, reached - newest, most, -1.0)
        if record.steps_redone > most:
            raise ChaosError(f"a fault has cost {record.steps_redone} steps, {most} may be lost: {record}")
        self.records.append(record)
        print(
            f"{len(self.records):3d} of {self.num_faults}: {kind}, step {reached}, {record.steps_redone} steps to do again",
            flush=True,
        )

    def _steps_beside_save(self, reached: int) -> int:
        """Steps taken since the save began that was under way at the end."""
        names = [path.stem for path in (self.run / folders.CHECKPOINTS).glob("*.writing")]
        return max((reached - int(name.removeprefix("step-")) for name in names), default=0)

    def _full_disks(self) -> int:
        """Faults just before this one that have cost a save each."""
        kinds = [record.kind for record in reversed(self.records)]
        return next((place for place, kind in enumerate(kinds) if kind != "full disk"), len(kinds))

    def _check_gone(self, before: "Leftovers") -> None:
        left = before.since(self._family)
        if left:
            raise ChaosError(f"left behind: {'; '.join(left)}")

    def _compare(self, whole: Path) -> None:
        names = ("loss", "grad_norm", "num_samples", "learning_rate")
        wanted, found = (
            [{name: row[name] for name in names} for row in read_metrics(run / METRICS_FILE)]
            for run in (whole, self.run)
        )
        if len(wanted) != self.num_steps:
            raise ChaosError(f"the undisturbed run has {len(wanted)} steps of {self.num_steps}")
        for step, (one, other) in enumerate(zip(wanted, found, strict=True), start=1):
            if one != other:
                raise ChaosError(f"step {step} is {other}, and {one} without faults")

    def note_family(self) -> None:
        """Remember all processes that there are now below this one."""
        self._family |= set(psutil.Process().children(recursive=True))


class _Watcher:
    """Beside one attempt: waits for the step of the next fault, and does it."""

    def __init__(self, chaos: Chaos, faults: list[tuple[str, int]]) -> None:
        self.is_over = threading.Event()
        self.first_step: float | None = None
        self.ending: str | None = None
        """The fault that ends the run."""
        self.ending_rank: int | None = None
        self.fault_time = 0.0
        self.error: ChaosError | None = None
        self._chaos, self._faults = chaos, faults
        self._inode = _inode(chaos.run / METRICS_FILE)

    def watch(self) -> None:
        """Until the run ends."""
        try:
            self._watch()
        except ChaosError as error:
            self.error = error
            os.kill(os.getpid(), signal.SIGTERM)

    def _watch(self) -> None:
        while self.ending is None and not self.is_over.wait(POLL_SECONDS):
            step = self._step()
            if step is None:
                continue
            if self.first_step is None:
                self.first_step = time.monotonic()
            notes = self._notes()
            if self._faults and step >= self._faults[0][1] and len(notes) == NUM_RANKS:
                kind, _ = self._faults.pop(0)
                self._chaos.note_family()
                self._do(kind, step, notes)

    def _step(self) -> int | None:
        """Steps the run has taken, if this attempt has taken one."""
        path = self._chaos.run / METRICS_FILE
        if _inode(path) in (None, self._inode):  # a run writes the file anew when it starts
            return None
        rows = read_metrics(path)
        return rows[-1]["step"] if rows and rows[-1]["step"] > self._chaos.resume_step else None

    def _notes(self) -> list[RankNote]:
        notes = [read_note(self._chaos.run / HEARTBEATS, rank) for rank in range(NUM_RANKS)]
        return [note for note in notes if note is not None and state_of(note) != "gone"]

    def _do(self, kind: str, step: int, notes: list[RankNote]) -> None:
        draw = self._chaos.draw
        rank = draw.randrange(NUM_RANKS)
        if kind == "full disk":
            self._fill_disk(notes[NUM_RANKS - 1].pid, step)
            return
        if kind == "kill in save":
            self._wait_for(lambda: any((self._chaos.run / folders.CHECKPOINTS).glob("*.writing")))
            time.sleep(draw.uniform(0, 0.1))
        else:
            time.sleep(draw.uniform(0, 0.3))
        self.fault_time = time.monotonic()
        self.ending = kind
        if kind in ("kill", "kill in save", "stop"):
            self.ending_rank = rank
            os.kill(notes[rank].pid, signal.SIGSTOP if kind == "stop" else signal.SIGKILL)
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def _fill_disk(self, pid: int, step: int) -> None:
        """No file of one rank may grow, until a save has failed: the run goes on."""
        events = self._chaos.run / EVENTS_FILE
        count = _failed_saves(events)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (LARGEST_FILE_BYTES, resource.RLIM_INFINITY))
        self._wait_for(lambda: _failed_saves(events) > count)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if _failed_saves(events) == count:
            raise ChaosError("a full disk has made no save fail")
        self._chaos.records.append(FaultRecord("full disk", NUM_RANKS - 1, step, 0.0, 0, 0, 0.0))
        print(
            f"{len(self._chaos.records):3d} of {self._chaos.num_faults}: full disk, step {step}, the run goes on",
            flush=True,
        )

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        while not condition() and not self.is_over.wait(POLL_SECONDS):
            pass


def _inode(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


def _failed_saves(events: Path) -> int:
    return events.read_text().count('"save failed"') if events.exists() else 0


def _truncate(checkpoint: Path) -> None:
    shard = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(shard, shard.stat().st_size // 2)


def _corrupt_position(checkpoint: Path) -> None:
    path = next((checkpoint / "loader").glob("*.json"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated checkpoint": _truncate,
    "corrupted data position": _corrupt_position,
}
"""Done to the newest checkpoint of a run that was asked to end."""
KINDS = ("kill", "kill in save", "terminate", "stop", "full disk", *DAMAGES)


@dataclass(frozen=True)
class Leftovers:
    """What a process may leave behind."""

    shared_memory: frozenset[str]
    """That nobody has mapped."""
    temporary: frozenset[str]
    num_handles: int

    @classmethod
    def now(cls) -> "Leftovers":
        """What there is."""
        temporary = frozenset(path.name for path in Path(tempfile.gettempdir()).glob("internvl-*"))
        return cls(_unused_memory(), temporary, psutil.Process().num_fds())

    def since(self, family: set[psutil.Process]) -> list[str]:
        """What has come since, and which of the processes still run, but for those that serve every launch."""
        servers = set(psutil.Process().children())
        _, alive = psutil.wait_procs(
            [process for process in family if process not in servers], timeout=LEAVING_SECONDS
        )
        left = [f"process {process}" for process in alive]
        now = Leftovers.now()
        left += [f"shared memory {name}" for name in now.shared_memory - self.shared_memory]
        left += [f"temporary folder {name}" for name in now.temporary - self.temporary]
        if now.num_handles > self.num_handles:
            left.append(f"{now.num_handles - self.num_handles} file handles")
        return left


def _unused_memory() -> frozenset[str]:
    """Shared memory that no process has mapped: what others on this machine use is not of this run."""
    mapped = set[str]()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # it has ended
            mapped |= {
                line.split("/dev/shm/")[1].split(" ")[0]
                for line in maps.read_text().splitlines()
                if "/dev/shm/" in line
            }
    return frozenset(set(os.listdir("/dev/shm")) - mapped)  # noqa: PTH208 - names


def summary(records: Sequence[FaultRecord]) -> dict[str, Any]:
    """By kind of fault: how many, steps done again, seconds."""
    table = {}
    for kind in KINDS:
        members = [record for record in records if record.kind == kind]
        if members:
            restarts = [record.restart_seconds for record in members if record.restart_seconds > 0]
            table[kind] = {
                "survived": len(members),
                "most_steps_redone": max(record.steps_redone for record in members),
                "mean_steps_redone": round(statistics.mean(record.steps_redone for record in members), 2),
                "longest_end_seconds": round(max(record.ended_seconds for record in members), 2),
                "median_restart_seconds": round(statistics.median(restarts), 2) if restarts else None,
                "longest_restart_seconds": round(max(restarts), 2) if restarts else None,
            }
    return table


def table_of(record: dict[str, Any]) -> str:
    """The record for people."""
    lines = [
        f"# {record['num_faults']} faults in a run of {record['num_steps']} steps",
        "",
        f"{record['date']}, {record['machine']}, torch {record['versions']['torch']}; {NUM_RANKS} CPU ranks, a checkpoint every {SAVE_EVERY} steps, which "
        f"{'is written while training goes on' if record['asynchronous'] else 'training waits for'}, "
        f"`watchdog.stall_seconds={record['stall_seconds']:g}`, seed {record['seed']}. Losses and gradient norms of all steps are those of the undisturbed run, bit "
        "for bit; no process, shared memory, file handle or temporary folder was left.",
        "",
        "| fault | survived | steps redone, most (mean) | ended after, longest | restart to first step, median (longest) |",
        "|---|---|---|---|---|",
    ]
    for kind, row in record["by_kind"].items():
        restart = (
            "-"
            if row["median_restart_seconds"] is None
            else f"{row['median_restart_seconds']} s ({row['longest_restart_seconds']} s)"
        )
        lines.append(
            f"| {kind} | {row['survived']} | {row['most_steps_redone']} ({row['mean_steps_redone']}) | {row['longest_end_seconds']} s | {restart} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 1 if the run has not survived unchanged."""
    parser = argparse.ArgumentParser(description="Faults in a small training run, at random times.")
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stall-seconds", type=float, default=30.0, help="a rank that gets nowhere for so long is stuck (default: 30)"
    )
    parser.add_argument(
        "--synchronous",
        action="store_true",
        help="training waits for saves: then no fault costs more than an interval",
    )
    parser.add_argument("--folder", type=Path, help="keep data and runs there (default: a temporary folder)")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    if options.faults < 1:
        parser.error(f"--faults {options.faults}: at least one")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        multiprocessing.util.get_temp_dir()  # outlives this folder
        tempfile.tempdir = os.environ["TMPDIR"] = temporary  # what ranks leave there is theirs
        chaos = Chaos(
            options.folder or Path(temporary),
            options.faults,
            options.seed,
            options.stall_seconds,
            asynchronous=not options.synchronous,
        )
        shutil.rmtree(chaos.run, ignore_errors=True)
        try:
            chaos.go()
        except ChaosError as error:
            print(f"chaos: {error}", file=sys.stderr)
            return 1
    record = {
        **machine_record(), "num_faults": len(chaos.records), "num_steps": chaos.num_steps, "num_ranks": NUM_RANKS,
        "save_every_steps": SAVE_EVERY, "asynchronous": chaos.asynchronous, "stall_seconds": options.stall_seconds, "seed": options.seed,
        "seconds": round(time.monotonic() - began, 1), "by_kind": summary(chaos.records),
        "faults": [asdict(fault) for fault in chaos.records],
    }  # fmt: skip
    print(table_of(record))
    if options.output is not None:
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        options.output.with_suffix(".md").write_text(table_of(record), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
