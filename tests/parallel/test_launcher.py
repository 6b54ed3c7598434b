"""Local ranks end together, and the message begins with the rank that failed first."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from internvl_megatron.errors import ConfigError, TrainingError
from internvl_megatron.launcher import InterruptedRunError, RankFailedError, launch
from internvl_megatron.ranks import RankInfo

pytestmark = pytest.mark.parallel

ROOT = Path(__file__).resolve().parents[2]
NEVER_SECONDS = 300.0
Run = Callable[..., list[Any]]


def note_pid(info: RankInfo, folder: Path) -> None:
    """Write the pid of this rank, and wait until all have."""
    (folder / f"unfinished{info.rank}").write_text(str(os.getpid()))
    (folder / f"unfinished{info.rank}").rename(folder / f"pid{info.rank}")
    while len(list(folder.glob("pid*"))) < info.world_size:
        time.sleep(0.01)


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in folder.glob("pid*")]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def expect_gone(folder: Path, num_ranks: int, within_seconds: float = 30.0) -> None:
    found = pids(folder)
    assert len(found) == num_ranks, "every rank had started"
    deadline = time.monotonic() + within_seconds
    while any(map(is_alive, found)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in found if is_alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "no rank is left behind"


def place_of(info: RankInfo) -> tuple[int, int, int]:
    return info.rank, info.world_size, info.local_rank


def fail_on_rank_2(info: RankInfo, folder: Path) -> None:
    note_pid(info, folder)
    if info.rank == 2:
        raise ValueError("boom")
    if info.rank == 1:
        time.sleep(0.5)
        raise RuntimeError("connection closed by peer")
    time.sleep(NEVER_SECONDS)


def killed_on_rank_1(info: RankInfo, folder: Path) -> None:
    note_pid(info, folder)
    if info.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(NEVER_SECONDS)


def exit_on_rank_1(info: RankInfo, folder: Path) -> None:
    note_pid(info, folder)
    if info.rank == 1:
        os._exit(3)
    time.sleep(NEVER_SECONDS)


def wrong_setting(info: RankInfo, folder: Path) -> None:
    note_pid(info, folder)
    raise ConfigError("parallel.tensor_size: 3 ranks cannot be split in twos; use --nproc 4")


def bad_step(info: RankInfo, folder: Path) -> None:
    note_pid(info, folder)
    raise TrainingError("step 3 is bad and ends the run")


def unsendable_result(info: RankInfo) -> object:
    return lambda: info


def wait_for_ever(info: RankInfo, folder: Path) -> None:
    note_pid(info, folder)
    time.sleep(NEVER_SECONDS)


def stop_when_asked(info: RankInfo, folder: Path) -> None:
    """Ends by itself on SIGTERM; rank 0 has the launcher interrupted."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: asked.append(number))
    note_pid(info, folder)
    if info.rank == 0:
        os.kill(int((folder / "launcher").read_text()), signal.SIGINT)
    while not asked:
        time.sleep(0.01)
    (folder / f"stopped{info.rank}").touch()


def test_results_come_by_rank(run_ranks: Run) -> None:
    assert run_ranks(place_of, 3) == [(rank, 3, rank) for rank in range(3)]


def test_a_failing_rank_ends_all_and_its_traceback_comes_first(run_ranks: Run, tmp_path: Path) -> None:
    with pytest.raises(RankFailedError) as caught:
        run_ranks(fail_on_rank_2, 4, tmp_path)
    message = str(caught.value)
    assert message.startswith("rank 2 failed first:\nTraceback (most recent call last):")
    assert "in fail_on_rank_2" in message
    assert "ValueError: boom" in message
    assert "connection closed by peer" not in message, "what followed from it is only counted"
    assert caught.value.failures[0].rank == 2
    expect_gone(tmp_path, 4)


def test_a_killed_rank_ends_all(run_ranks: Run, tmp_path: Path) -> None:
    with pytest.raises(RankFailedError, match=r"^rank 1 failed first:\nkilled by SIGKILL \(signal 9\)"):
        run_ranks(killed_on_rank_1, 3, tmp_path)
    expect_gone(tmp_path, 3)


def test_a_rank_that_just_exits_ends_all(run_ranks: Run, tmp_path: Path) -> None:
    with pytest.raises(RankFailedError, match=r"^rank 1 failed first:\nended without a report \(exit code 3\)"):
        run_ranks(exit_on_rank_1, 2, tmp_path)
    expect_gone(tmp_path, 2)


def test_a_users_error_shows_no_traceback(run_ranks: Run, tmp_path: Path) -> None:
    with pytest.raises(RankFailedError) as caught:
        run_ranks(wrong_setting, 2, tmp_path)
    assert "use --nproc 4" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert all(failure.is_user_error for failure in caught.value.failures)
    expect_gone(tmp_path, 2)


def test_an_end_that_is_nobodys_wrong_setting_is_told_apart(run_ranks: Run, tmp_path: Path) -> None:
    with pytest.raises(RankFailedError, match="step 3 is bad") as caught:
        run_ranks(bad_step, 2, tmp_path)
    assert "Traceback" not in str(caught.value)
    assert all(failure.is_user_error and failure.is_training_error for failure in caught.value.failures)


def test_a_result_that_cannot_be_sent_is_a_failure(run_ranks: Run) -> None:
    with pytest.raises(RankFailedError, match="unsendable_result"):
        run_ranks(unsendable_result, 1)


def test_failures_keep_no_handles_open(run_ranks: Run) -> None:
    """A process that starts runs again and again, and keeps their errors."""
    run_ranks(place_of, 2)  # the server that ranks are forked from stays
    before, kept = psutil.Process().num_fds(), []
    for _ in range(2):
        with pytest.raises(RankFailedError) as caught:
            run_ranks(unsendable_result, 2)
        kept.append(caught.value)
    assert psutil.Process().num_fds() == before


def test_an_interrupt_lets_ranks_end_in_order(run_ranks: Run, tmp_path: Path) -> None:
    (tmp_path / "launcher").write_text(str(os.getpid()))
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(InterruptedRunError):
        run_ranks(stop_when_asked, 2, tmp_path)
    assert len(list(tmp_path.glob("stopped*"))) == 2, "every rank ended by itself"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    expect_gone(tmp_path, 2)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, id="killed"),
        pytest.param(signal.SIGTERM, id="terminated twice", marks=pytest.mark.slow),
    ],
)
def test_ranks_end_with_their_launcher(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "import sys, pathlib\n"
        "from internvl_megatron.launcher import launch\n"
        "from tests.parallel.test_launcher import wait_for_ever\n"
        "if __name__ == '__main__':\n"
        "    launch(wait_for_ever, 2, pathlib.Path(sys.argv[1]))\n"
    )
    script = tmp_path / "start_two_ranks.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, str(script), str(tmp_path)], cwd=ROOT, env=environment) as launcher:
        deadline = time.monotonic() + 120
        while len(pids(tmp_path)) < 2 and time.monotonic() < deadline and launcher.poll() is None:
            time.sleep(0.1)
        launcher.send_signal(number)
        if number == signal.SIGTERM:  # the ranks of this test do not listen to the first
            time.sleep(0.5)
            launcher.send_signal(number)
        launcher.wait(timeout=60)
    expect_gone(tmp_path, 2)


@pytest.mark.parametrize("count", [0, -2])
def test_no_rank_at_all(count: int) -> None:
    with pytest.raises(ConfigError, match=f"^{count} ranks: start at least one"):
        launch(place_of, count)
