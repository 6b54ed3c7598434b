"""Under torchrun a rank that dies or hangs has all started again by the agent; they go on by themselves, also on fewer ranks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from internvl_megatron.faults.rank_notes import HEARTBEATS, read_note
from internvl_megatron.faults.watchdog import STALLS
from internvl_megatron.launcher import launch
from internvl_megatron.watching.metrics import METRICS_FILE, read_metrics
from tests.support.small_runs import small_data, small_run, small_run_settings

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

STEPS, NUM_RANKS = 10, 2
TRAIN_RANK = "internvl_megatron.trainer:train_rank"
SETTINGS = (
    "checkpoint.save_every_steps=2",
    # While it saves a rank may get nowhere for twice as long beside the watchdog's limit.
    "checkpoint.max_wait_seconds=10",
    "watchdog.stall_seconds=40",
    "device=cpu",
)


def _start(data: Path, run: Path, num_ranks: int, num_steps: int) -> subprocess.Popen[str]:
    agent = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", "--max-restarts=2"]
    settings = [*small_run_settings(data, run), *SETTINGS, f"num_steps={num_steps}"]
    command = [sys.executable, *agent, "-m", "internvl_megatron", "train", "demo_digits", *settings]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    path, deadline = run / METRICS_FILE, time.monotonic() + 600
    while not (path.is_file() and (rows := read_metrics(path)) and rows[-1]["step"] >= step):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


def _signal(run: Path, rank: int, number: signal.Signals) -> None:
    note = read_note(run / HEARTBEATS, rank)
    assert note is not None
    os.kill(note.pid, number)


def _losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run / METRICS_FILE)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("demo") / "data")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses without a fault."""
    run = tmp_path_factory.mktemp("whole")
    launch(TRAIN_RANK, NUM_RANKS, small_run(data, run, *SETTINGS, f"num_steps={STEPS}"), device="cpu")
    return _losses(run)


def test_killed_and_stopped_ranks_are_started_again(data: Path, whole: list[float], tmp_path: Path) -> None:
    process = _start(data, tmp_path, NUM_RANKS, STEPS)
    _wait_for_step(tmp_path, 3, process)
    _signal(tmp_path, 1, signal.SIGKILL)
    _wait_for_step(tmp_path, 6, process)
    _signal(tmp_path, 0, signal.SIGSTOP)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert len(list((tmp_path / STALLS).iterdir())) == 1, output
    assert _losses(tmp_path) == whole


def test_a_run_goes_on_with_fewer_ranks(data: Path, whole: list[float], tmp_path: Path) -> None:
    for num_ranks, num_steps in ((NUM_RANKS, 4), (1, STEPS)):
        process = _start(data, tmp_path, num_ranks, num_steps)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
    assert _losses(tmp_path) == pytest.approx(whole, rel=1e-5)
