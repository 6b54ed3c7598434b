"""Hand broken files to everything that reads files of others: each is taken or refused with an error that says so, and nothing else happens.

    python -m tools.fuzz [TARGET ...] [--cases 10000] [--seed 0] [--keep FOLDER]

Files are good ones with bytes or values changed at random, the same for the same seed. A fault is another error than the documented
one, a death of the process, more CPU seconds than a file can be worth, a file outside of the case's folder written, changed, or read because
a broken one names it, a program started, a connection opened, or an object made of a pickle that is not plain data. `--keep` saves the files of each.
"""

import argparse
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from internvl_megatron.checkpoint.metadata_guard import is_plain
from tools.fuzz_mutations import PATHS_OUTSIDE, mutate
from tools.fuzz_targets import TARGETS, Target

MOST_TOLD = 20
"""Faults of a target that are written out."""
MOST_FILE_BYTES = 2**26
MORE_MEMORY_BYTES = 2**32
"""Address space a reader may take beyond what the process has: a few kilobytes must not become more."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATH_EVENTS = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.truncate",
    "os.chmod",
    "shutil.rmtree",
)
_FORBIDDEN_EVENTS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "socket.bind",
)


@dataclass(frozen=True)
class Fault:
    """What should not have happened."""

    target: str
    case: int
    text: str


@dataclass(frozen=True)
class Outcome:
    """Of a target's cases."""

    accepted: int
    refused: int
    faults: list[Fault]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 1 if there was a fault."""
    parser = argparse.ArgumentParser(description="Hand broken files to every reader of files.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)} (default: all)")
    parser.add_argument("--cases", type=int, default=10_000, help="of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files of faults")
    options = parser.parse_args(arguments)
    for name in options.targets:
        if name not in TARGETS:
            parser.error(f"there is no target {name!r}; there are {', '.join(TARGETS)}")
    num_faults = 0
    for name in options.targets or TARGETS:
        outcome = fuzz(name, TARGETS[name], range(options.cases), options.seed, options.keep)
        num_faults += len(outcome.faults)
        print(
            f"{name:24s} {outcome.accepted:6d} taken, {outcome.refused:6d} refused, {len(outcome.faults)} faults",
            flush=True,
        )
        for fault in outcome.faults[:MOST_TOLD]:
            print(f"  case {fault.case}: {fault.text}", flush=True)
    return 1 if num_faults else 0


def fuzz(name: str, target: Target, cases: range, seed: int, keep: Path | None = None) -> Outcome:
    """Hand a target some cases, in a process of its own; faults keep their files if there is a folder for them."""
    accepted = refused = 0
    faults: list[Fault] = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        good = Path(folder) / "good"
        for event, case, text in _events(name, target, cases, seed, Path(folder)):
            accepted += event == "taken"
            refused += event == "refused"
            if event == "fault":
                faults.append(Fault(name, case, text))
                if keep is not None:
                    place = keep / f"{name.replace(' ', '_')}-{seed}-{case}"
                    shutil.rmtree(place, ignore_errors=True)
                    shutil.copytree(good, place)
                    break_one(place, target, generator(name, seed, case))
    return Outcome(accepted, refused, faults)


def generator(name: str, seed: int, case: int) -> random.Random:
    """The draws of a case."""
    return random.Random(f"{name} {seed} {case}")


def break_one(folder: Path, target: Target, draw: random.Random) -> dict[Path, bytes]:
    """Break one of the files of a folder, or two; returns what they were."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    before = {path: path.read_bytes() for path in files}
    for path in draw.sample(files, min(len(files), draw.choice((1, 1, 1, 2)))):
        path.write_bytes(mutate(before[path], draw))
    if target.repair is not None and draw.random() < 0.7:
        target.repair(folder)
    return before


def _events(name: str, target: Target, cases: range, seed: int, folder: Path) -> Iterator[tuple[str, int, str]]:
    """(kind, case, text) of every case; a process that dies costs its case, and another goes on behind it."""
    import multiprocessing

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["internvl_megatron.preload"])
    while cases:
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(writer, name, target, cases, seed, folder), name=f"fuzz {name}")
        process.start()
        writer.close()
        last = cases.start
        try:
            while (message := reader.recv()) is not None:
                kind, last, text = message
                if kind != "begun":
                    yield kind, last, text
        except EOFError:
            process.join()
            code = process.exitcode or 0
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            if code == -signal.SIGPROF:
                how = f"more than {target.cpu_seconds} CPU seconds"
            yield "fault", last, how
        else:
            process.join()
            return
        cases = range(last + 1, cases.stop)


def _work(writer: Connection, name: str, target: Target, cases: range, seed: int, folder: Path) -> None:
    """Body of the process: all cases, or as many as it survives."""
    good, place = folder / "good", folder / "case"
    if not good.exists():
        good.mkdir()
        target.write(good)
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(good, place)
    target.read(place)  # loads what it needs, and sees that good files are good
    _bound_memory()
    resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_FILE_BYTES, MOST_FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tempfile.tempdir = str(folder)  # what is only temporary is no harm
    logging.disable()
    watch = _Watch(folder)
    sys.addaudithook(watch.hear)
    names = {path.relative_to(place) for path in place.rglob("*")}
    for case in cases:
        writer.send(("begun", case, ""))
        before = break_one(place, target, generator(name, seed, case))
        signal.setitimer(signal.ITIMER_PROF, target.cpu_seconds)
        watch.heard.clear()
        watch.listens = True
        try:
            target.read(place)
            result = "taken", case, ""
        except target.errors:
            result = "refused", case, ""
        except BaseException:
            result = "fault", case, traceback.format_exc()[-2000:]
        finally:
            watch.listens = False
            signal.setitimer(signal.ITIMER_PROF, 0)
        writer.send(("fault", case, f"it has done {', '.join(watch.heard)}") if watch.heard else result)
        for path in place.rglob("*"):  # an index that was made anew, for example
            if path.is_file() and path.relative_to(place) not in names:
                path.unlink()
        for path, content in before.items():
            path.write_bytes(content)
    writer.send(None)


def _bound_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MORE_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


class _Watch:
    """Hears what the interpreter does, and notes what no reader may do."""

    def __init__(self, folder: Path) -> None:
        self.heard: list[str] = []
        self.listens = False
        self._allowed = f"{os.path.realpath(folder)}/"

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook."""
        if not self.listens:
            return
        if event in _FORBIDDEN_EVENTS:
            self.heard.append(f"{event} {arguments!r:.200}")
        elif event == "pickle.find_class" and not is_plain(*arguments[:2]):
            self.heard.append(f"unpickled {arguments[0]}.{arguments[1]}")
        elif event == "open" and self._writes(arguments) and self._is_outside(arguments[0]):
            self.heard.append(f"opened {arguments[0]!r} to write")
        elif event == "open" and isinstance(arguments[0], str) and arguments[0].endswith(PATHS_OUTSIDE):
            self.heard.append(f"opened {arguments[0]!r}, which a broken file has named")
        elif event in _PATH_EVENTS and any(
            self._is_outside(path) for path in arguments[:2] if isinstance(path, str | bytes)
        ):
            self.heard.append(f"{event} {arguments!r:.200}")

    @staticmethod
    def _writes(arguments: tuple[Any, ...]) -> bool:
        _, mode, flags = arguments
        return any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool((flags or 0) & _WRITES)

    def _is_outside(self, path: Any) -> bool:
        if not isinstance(path, str | bytes):
            return False  # a descriptor
        real = os.path.realpath(os.fsdecode(path))
        return real != os.devnull and not f"{real}/".startswith(self._allowed)


if __name__ == "__main__":
    sys.exit(main())
