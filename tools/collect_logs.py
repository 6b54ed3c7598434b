"""One timeline out of the logs of all ranks of a job, the rank that failed first ahead of it.

    python -m tools.collect_logs RUN [--output FILE]

RUN is a run's folder (its newest job's newest attempt), or a folder of logs (`jobs/0001/logs/41-0`). Ranks are ordered by when they ended,
by the clock of the file system they share; lines by the clocks of their nodes. Failures with the same last line are told once.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from internvl_megatron.cluster.job_folder import newest_job
from internvl_megatron.errors import DataError, UserError

MOST_BYTES = 1_000_000
"""Read from the end of each log."""
LINES_OF_A_FAILURE = 30
_TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
_LOG = re.compile(r"(?P<step>[a-z]+)-(?P<rank>\d+)\.log")


@dataclass(frozen=True)
class Entry:
    """A line of a log with what belongs to it: a traceback has no times of its own."""

    time: str
    rank: int
    text: str


@dataclass(frozen=True)
class Ending:
    """How a rank ended that did not end well."""

    when: float
    """Seconds since 1970, by the clock of the file system."""
    rank: int
    code: int
    host: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, or 2 (the user can mend it)."""
    parser = argparse.ArgumentParser(description="One timeline of all ranks, the first failure first.")
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run's folder, or a folder of logs")
    parser.add_argument("--output", type=Path, help="file to write (default: the terminal)")
    options = parser.parse_args(arguments)
    try:
        text = report(log_folder(options.folder))
    except UserError as error:
        print(f"collect_logs: {error}", file=sys.stderr)
        return 2
    if options.output is None:
        print(text)
    else:
        options.output.write_text(f"{text}\n", encoding="utf-8")
        print(f"wrote {options.output}")
    return 0


def log_folder(folder: Path) -> Path:
    """The folder of logs that is meant.

    Raises:
        DataError: there are none.
    """
    if any(_LOG.fullmatch(path.name) for path in folder.glob("*.log")):
        return folder
    attempts = [path for path in newest_job(folder).glob("logs/*") if any(path.glob("*-*.log"))]
    if not attempts:
        raise DataError(f"{folder}: its newest job has no logs yet; internvl-megatron status {folder} says why")
    return max(attempts, key=lambda path: path.stat().st_mtime)


def report(folder: Path) -> str:
    """The whole text: endings, the first failure, the timeline."""
    logs = {int(match["rank"]): path for path in folder.iterdir() if (match := _LOG.fullmatch(path.name))}
    found = endings(folder)
    lines = [f"{folder}: {len(logs)} ranks", ""]
    if found:
        first = found[0]
        lines += [
            f"rank {first.rank} on {first.host} ended first, with exit code {first.code} ({meaning(first.code)}):"
        ]
        last = _read(logs[first.rank]).rstrip().splitlines()[-LINES_OF_A_FAILURE:] if first.rank in logs else []
        lines += [*(f"    {line}" for line in last), ""]
        lines += [*_others(found[1:], first.when, logs), ""]
    else:
        lines += ["no rank wrote down a bad end: all ended well, are running, or their nodes are gone", ""]
    return "\n".join([*lines, *(f"{entry.time} rank {entry.rank}: {entry.text}" for entry in timeline(logs))])


def endings(folder: Path) -> list[Ending]:
    """Ranks that ended badly, the first one first."""
    found = []
    for path in folder.glob("exit-*-*"):
        code, _, host = path.read_text().strip().partition(" ")
        if code.isdecimal():
            found.append(Ending(path.stat().st_mtime, int(path.name.rpartition("-")[2]), int(code), host))
    return sorted(found, key=lambda ending: (ending.when, ending.rank))


def meaning(code: int) -> str:
    """What an exit code of a rank says."""
    known = {
        1: "failed",
        2: "a setting or a file is wrong",
        3: "training met what it may not go on after",
        75: "the system stopped it, it has saved",
        124: "the run got nowhere",
        130: "a person stopped it",
    }
    if code in (137, 9):
        return "killed; if nobody did, the node ran out of memory"
    return known.get(code, f"signal {code - 128}" if code > 128 else "failed")


def _others(found: list[Ending], start: float, logs: dict[int, Path]) -> list[str]:
    """The endings after the first, those with the same last line together."""
    groups: dict[tuple[int, str], list[Ending]] = {}
    for ending in found:
        lines = _read(logs[ending.rank]).rstrip().splitlines() if ending.rank in logs else []
        groups.setdefault((ending.code, re.sub(r"\d+", "#", lines[-1]) if lines else ""), []).append(ending)
    told = []
    for (code, line), members in groups.items():
        ranks = ", ".join(str(ending.rank) for ending in members[:8]) + (", ..." if len(members) > 8 else "")
        after = members[0].when - start
        told.append(f"{after:+.1f} s: {len(members)} ranks ({ranks}), exit code {code} ({meaning(code)}): {line}")
    return told


def timeline(logs: dict[int, Path]) -> list[Entry]:
    """Lines of all ranks in the order of their times; those without one stay with the line before them."""
    entries = []
    for rank, path in logs.items():
        time, held = "", list[str]()
        for line in _read(path).splitlines():
            match = _TIME.match(line)
            if match is None:
                held.append(line)
                continue
            if held:
                entries.append(Entry(time, rank, "\n    ".join(held)))
            time, held = match[0], [line[match.end() :].strip().removeprefix(f"rank {rank} ")]
        if held:
            entries.append(Entry(time, rank, "\n    ".join(held)))
    return sorted(entries, key=lambda entry: (entry.time, entry.rank))


def _read(path: Path) -> str:
    """The end of a log."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - MOST_BYTES))
        return file.read().decode("utf-8", errors="replace").replace("\r", "\n")


if __name__ == "__main__":
    sys.exit(main())
