"""A run that gets nowhere is ended, and its report begins with the rank that stopped first, whatever it stopped for."""

import ctypes
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from internvl_megatron.config.schema import WatchdogConfig
from internvl_megatron.faults import watchdog as watchdog_module
from internvl_megatron.faults.rank_notes import HEARTBEATS, read_note, read_stacks
from internvl_megatron.faults.watchdog import STALLS, Watchdog
from internvl_megatron.launcher import RankFailedError
from internvl_megatron.ranks import RankInfo
from internvl_megatron.watching.run_events import EVENTS_FILE

pytestmark = pytest.mark.parallel

Run = Callable[..., list[Any]]
LIMIT_SECONDS, BUSY_SECONDS = 2.0, 0.5
NEVER_SECONDS = 300.0


def watched(info: RankInfo, folder: Path, **settings: Any) -> Watchdog:
    """A watchdog that has started, when those of all ranks have; what the rank prints goes to a log of its own."""
    os.dup2(os.open(folder / f"log{info.rank}", os.O_CREAT | os.O_WRONLY), 2)
    watchdog = Watchdog(info, folder, WatchdogConfig(**{"stall_seconds": LIMIT_SECONDS} | settings))
    watchdog.has_started()
    (folder / f"watched{info.rank}").touch()
    while len(list(folder.glob("watched*"))) < info.world_size:
        time.sleep(0.01)
    watchdog.beat("decode")
    return watchdog


def wait_for_the_others() -> None:
    time.sleep(NEVER_SECONDS)


def get_on_and_wait(watchdog: Watchdog, seconds: float) -> None:
    """As ranks do while another one has stopped: they get on until they need it."""
    for _ in range(int(seconds / 0.05)):
        watchdog.beat("encode")
        time.sleep(0.05)
    watchdog.beat("update")
    wait_for_the_others()


def stop_on_rank_1(info: RankInfo, folder: Path) -> None:
    watchdog = watched(info, folder)
    if info.rank == 1:
        stop_here()
    get_on_and_wait(watchdog, BUSY_SECONDS)


def stop_on_rank_1_seen_by_rank_2(info: RankInfo, folder: Path) -> None:
    """Rank 0 raises the alarm; when it looks, rank 2 has let rank 1 go on already."""
    if info.rank == 0:
        watchdog_module.state_of = lambda _note: "S"
    watchdog = watched(info, folder)
    if info.rank == 1:
        stop_here()
    get_on_and_wait(watchdog, BUSY_SECONDS * (info.rank + 1))


def stop_here() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    wait_for_the_others()


def wait_on_rank_0(info: RankInfo, folder: Path) -> None:
    """Rank 0 waits in Python, rank 1 a moment later: both can tell."""
    watchdog = watched(info, folder)
    time.sleep(0.3 * info.rank)
    watchdog.beat("rows" if info.rank == 0 else "decode")
    wait_for_the_others()


def hold_the_interpreter(info: RankInfo, folder: Path) -> None:
    watched(info, folder)
    time.sleep(BUSY_SECONDS)  # the watchdog has looked at it before
    ctypes.PyDLL(None).sleep(int(NEVER_SECONDS))


def no_stall(info: RankInfo, folder: Path) -> list[str]:
    """Slower than the limit where that is allowed, and never long in one place elsewhere."""
    watchdog = Watchdog(info, folder, WatchdogConfig(stall_seconds=0.4, start_seconds=30))
    time.sleep(1)
    watchdog.beat("decode")
    watchdog.has_started()
    for _ in range(20):
        watchdog.beat("decode")
        time.sleep(0.05)
    watchdog.beat("saving", extra_seconds=30)
    time.sleep(1)
    watchdog.close()
    time.sleep(1)
    off = Watchdog(info, folder, WatchdogConfig(stall_seconds=None))
    time.sleep(1)
    off.close()
    return sorted(path.name for path in folder.iterdir())


def report_of(run_ranks: Run, target: Callable[..., None], num_ranks: int, folder: Path) -> str:
    with pytest.raises(RankFailedError, match="begins with the rank that stopped first") as caught:
        run_ranks(target, num_ranks, folder)
    assert caught.value.failures[0].is_stall
    (path,) = (folder / STALLS).iterdir()
    (event,) = (json.loads(line) for line in (folder / EVENTS_FILE).read_text().splitlines())
    assert event["event"] == "stall" and str(path) in event["text"]
    return path.read_text()


def test_a_stopped_rank_is_named_first_with_its_stack(run_ranks: Run, tmp_path: Path) -> None:
    report = report_of(run_ranks, stop_on_rank_1, 3, tmp_path)
    head, stopped, others = (part.splitlines() for part in report.split("\n\n"))
    assert re.fullmatch(
        r"no progress for \d\.\d s \(watchdog\.stall_seconds=2\.0\); the first to stop is ahead", head[0]
    )
    assert re.fullmatch(
        r"rank 1 on \S+: is stopped \(by a signal\); in decode, step 1 since \S+, \d\.\d s ago", stopped[0]
    )
    assert "in stop_here" in "".join(stopped[2:4]), "where it was stopped, and not where it went on"
    assert re.fullmatch(r"ranks 0, 2 on \S+: in update, step 1 since \S+, \d\.\d s ago", others[0])
    assert "in wait_for_the_others" in "".join(others[2:4])
    assert any(report in path.read_text() for path in tmp_path.glob("log*")), "a log has it too"


def test_a_rank_that_a_neighbour_has_let_go_on_was_stopped(run_ranks: Run, tmp_path: Path) -> None:
    report = report_of(run_ranks, stop_on_rank_1_seen_by_rank_2, 3, tmp_path)
    first = report.split("\n\n")[1].splitlines()[0]
    assert re.fullmatch(r"rank 1 on \S+: is stopped \(by a signal\); in decode, step 1 since .*", first)


def test_of_ranks_that_answer_the_first_to_stop_is_ahead(run_ranks: Run, tmp_path: Path) -> None:
    report = report_of(run_ranks, wait_on_rank_0, 2, tmp_path)
    places = re.findall(r"^ranks? ([\d, ]+) on \S+: in (\w+), step 1", report, re.MULTILINE)
    assert places == [("0", "rows"), ("1", "decode")]


def test_a_rank_whose_interpreter_is_held_ends_all_the_same(run_ranks: Run, tmp_path: Path) -> None:
    with pytest.raises(RankFailedError, match=r"ended without a report \(exit code 1\)"):
        run_ranks(hold_the_interpreter, 1, tmp_path)
    assert "in hold_the_interpreter" in (tmp_path / "log0").read_text()


def test_slow_phases_and_many_short_ones_raise_no_alarm(run_ranks: Run, tmp_path: Path) -> None:
    assert run_ranks(no_stall, 1, tmp_path) == [[HEARTBEATS]]


def answer_on_request(info: RankInfo, folder: Path) -> list[str]:
    watchdog = watched(info, folder)
    note = read_note(folder / HEARTBEATS, info.rank)
    assert note is not None
    os.kill(note.pid, signal.SIGUSR2)
    watchdog.close()
    return read_stacks(folder / HEARTBEATS, note)


def test_a_signal_asks_for_stacks_without_harm(run_ranks: Run, tmp_path: Path) -> None:
    (stacks,) = run_ranks(answer_on_request, 1, tmp_path)
    assert "in answer_on_request" in stacks[0]
