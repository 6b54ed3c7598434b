"""The command line on real files: train, interrupt, kill, continue, answer. Four ranks, TP2 x PP2."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from internvl_megatron.__main__ import main
from internvl_megatron.checkpoint import folders
from internvl_megatron.faults.rank_notes import HEARTBEATS, read_note
from internvl_megatron.faults.watchdog import STALLS
from internvl_megatron.watching.metrics import METRICS_FILE, read_metrics
from tests.support.small_runs import small_data, small_run_settings

pytestmark = pytest.mark.parallel

STEPS, SAVE_EVERY = 6, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("demo") / "data")


def _command(data: Path, run: Path, *overrides: str, ranks: int = 4) -> list[str]:
    settings = [
        *small_run_settings(data, run),
        f"data.eval_meta={data / 'heldout_meta.json'}",
        f"num_steps={STEPS}",
        f"checkpoint.save_every_steps={SAVE_EVERY}",
        "eval_every_steps=3",
        "sample_every_steps=3",
        "data.num_workers=2",
        "parallel.tensor_size=2",
        "parallel.pipeline_size=2",
        *overrides,
    ]
    return [sys.executable, "-m", "internvl_megatron", "train", "demo_digits", *settings, "--nproc", str(ranks)]


def _train(data: Path, run: Path, *overrides: str, ranks: int = 4) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(data, run, *overrides, ranks=ranks), capture_output=True, text=True, timeout=300, check=False
    )


def _train_here(data: Path, run: Path, *overrides: str) -> int:
    """In this process, which has all imported already; the exit status."""
    return main(_command(data, run, *overrides)[3:])


def _metrics(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run / METRICS_FILE)


def _losses(run: Path) -> dict[int, tuple[float, float | None]]:
    return {int(row["step"]): (row["loss"], row["eval_loss"]) for row in _metrics(run)}


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    run = tmp_path_factory.mktemp("whole")
    done = _train(data, run)
    assert done.returncode == 0, done.stderr
    assert f"step {STEPS} of {STEPS}" in done.stdout
    return run


def _start(data: Path, run: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        _command(data, run, *overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    path = run / METRICS_FILE
    while not (path.is_file() and len(read_metrics(path)) >= step):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.02)


def _family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def _ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The forked ranks: children of the fork server, and parents of processes that decode."""
    return [rank for child in psutil.Process(process.pid).children() for rank in child.children()]


def _assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=15)
    assert not alive, f"still running: {alive}"


def test_metrics_are_complete(whole: Path) -> None:
    rows = _metrics(whole)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 and row["mfu"] > 0 for row in rows)
    assert sum(row["num_tiles"] for row in rows) > 0
    for what in ("tokens", "samples"):
        counted = itertools.accumulate(row[f"num_{what}"] for row in rows)
        assert [row[f"total_{what}"] for row in rows] == list(counted)
    newest = folders.read_info(folders.finished(whole / "checkpoints")[-1])
    assert (newest.num_tokens, newest.num_samples) == (rows[-1]["total_tokens"], rows[-1]["total_samples"])
    times = [row["unix_seconds"] for row in rows]
    assert times == sorted(times) and 0 <= time.time() - times[-1] < 3600
    assert all(0 < row["num_supervised_tokens"] < 2 * 512 for row in rows)
    assert [row["step"] for row in rows if row["eval_loss"] is not None] == [3, 6]
    for row in rows:
        for part in ("dataset", "kind"):
            shares, losses = row[f"loss_weight_by_{part}"], row[f"loss_by_{part}"]
            assert sum(shares.values()) == pytest.approx(1, rel=1e-6)
            assert sum(shares[name] * losses[name] for name in shares if shares[name]) == pytest.approx(
                row["loss"], rel=1e-6
            )
            assert sum(row[f"samples_by_{part}"].values()) == row["num_samples"]
        norms = [row[f"{part}_grad_norm"] for part in ("vision", "projector", "language")]
        assert sum(norm**2 for norm in norms) == pytest.approx(row["grad_norm"] ** 2, rel=1e-6)
    assert {name for row in rows for name in row["loss_by_kind"]} == {"text", "image", "multi_image"}
    events = EventAccumulator(str(whole / "tensorboard")).Reload()
    assert [event.step for event in events.Tensors("samples/0/text/text_summary")] == [3, 6]
    assert {"loss/loss", "eval/loss", "grad/vision_grad_norm", "speed/mfu"} <= set(events.Tags()["scalars"])
    assert json.loads((whole / "config.json").read_text())["num_steps"] == STEPS


@pytest.mark.slow
def test_ctrl_c_stops_in_order_and_the_run_continues(data: Path, whole: Path, tmp_path: Path) -> None:
    process = _start(data, tmp_path)
    _wait_for_step(tmp_path, 1, process)
    family = _family(process)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    _assert_gone(family)
    saved = folders.finished(tmp_path / "checkpoints")
    assert saved, "the interrupted run saved nothing"
    assert folders.read_info(saved[-1]).step < STEPS, "the run was over before the interrupt: nothing was tested"
    assert not list((tmp_path / "checkpoints").glob("*.writing"))
    assert _train_here(data, tmp_path) == 0
    assert _losses(tmp_path) == _losses(whole)


@pytest.mark.parametrize(
    ("number", "has_launcher"),
    [
        pytest.param(signal.SIGUSR1, True, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow),
    ],
)
def test_what_the_system_stops_has_saved_and_asks_to_be_started_again(
    data: Path, tmp_path: Path, number: signal.Signals, has_launcher: bool
) -> None:
    """Under our launcher, and as a rank that torchrun or srun has started."""
    one = ["parallel.tensor_size=1", "parallel.pipeline_size=1", "num_steps=400", "checkpoint.save_every_steps=null"]
    command = _command(data, tmp_path, *one, "data.num_workers=0", ranks=1)
    environment = dict(os.environ)
    if not has_launcher:
        command = command[:-2]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    _wait_for_step(tmp_path, 1, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    (saved,) = folders.finished(tmp_path / "checkpoints")
    assert 1 <= folders.read_info(saved).step < 400


def test_a_killed_rank_ends_all_and_the_run_continues(data: Path, whole: Path, tmp_path: Path) -> None:
    process = _start(data, tmp_path)
    _wait_for_step(tmp_path, 3, process)
    family, ranks = _family(process), _ranks(process)
    assert len(ranks) == 4
    start = time.monotonic()
    ranks[2].kill()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - start < 20
    assert process.returncode == 1, errors
    assert "killed by SIGKILL" in errors
    _assert_gone(family)
    assert folders.read_info(folders.finished(tmp_path / "checkpoints")[-1]).step >= SAVE_EVERY
    assert _train_here(data, tmp_path) == 0
    assert _losses(tmp_path) == _losses(whole)


@pytest.mark.slow
def test_a_stopped_rank_ends_all_with_a_report_and_the_run_continues(data: Path, whole: Path, tmp_path: Path) -> None:
    """Its process runs no more and closes nothing: nobody but the others' watchdogs can tell."""
    process = _start(data, tmp_path, "watchdog.stall_seconds=20")
    _wait_for_step(tmp_path, 3, process)
    family, ranks = _family(process), _ranks(process)
    pids = {rank: read_note(tmp_path / HEARTBEATS, rank) for rank in range(4)}
    stopped = next(rank for rank, note in pids.items() if note is not None and note.pid == ranks[2].pid)
    ranks[2].suspend()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 124, errors
    _assert_gone(family)
    (path,) = (tmp_path / STALLS).iterdir()
    report = path.read_text().split("\n\n")
    assert re.match(rf"rank {stopped} on \S+: is stopped \(by a signal\); in \w+, step \d", report[1]), report[1]
    others = "\n".join(report[2:])
    named = {
        int(number) for line in re.findall(r"^ranks? ([\d, ]+) on", others, re.MULTILINE) for number in line.split(",")
    }
    assert named == {0, 1, 2, 3} - {stopped}
    assert re.search(r"torch/distributed|pipeline_messages|internvl_megatron/parallel/", others), "what they wait in"
    assert report[1] in errors, "the log has it too"
    assert _train_here(data, tmp_path) == 0
    assert _losses(tmp_path) == _losses(whole)


@pytest.mark.slow
def test_continuing_under_another_layout(data: Path, whole: Path, tmp_path: Path) -> None:
    half = _train(data, tmp_path, "num_steps=4")
    assert half.returncode == 0, half.stderr
    rest = _train(
        data, tmp_path, "parallel.tensor_size=1", "parallel.sequence_parallel=false", "parallel.pipeline_size=1",
        ranks=2,
    )  # fmt: skip
    assert rest.returncode == 0, rest.stderr
    assert "continuing with changed settings" in rest.stderr
    resumed, uninterrupted = _losses(tmp_path), _losses(whole)
    for step in range(1, STEPS + 1):
        loss, eval_loss = uninterrupted[step]
        assert resumed[step][0] == pytest.approx(loss, rel=1e-5)
        if eval_loss is not None:
            assert resumed[step][1] == pytest.approx(eval_loss, rel=1e-5)


def test_a_finished_run_answers(data: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = data / "images" / "heldout" / "00000.png"
    command = ["generate", str(whole), "What number is shown?", "--max-new-tokens", "3"]
    assert main([*command, "--image", str(picture)]) == 0
    capsys.readouterr()
    assert main([*command, "--image", "nowhere.png"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"nowhere\.png.*not found", error)
    assert "Traceback" not in error


def test_another_model_in_the_same_folder_is_refused(
    data: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train_here(data, whole, "model.language.ffn_hidden_size=128") == 2
    error = capsys.readouterr().err
    assert "other settings of model.language.ffn_hidden_size" in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_a_broken_image_stops_or_is_skipped(data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    subprocess.run(["cp", "-r", str(data), str(copy)], check=True)
    for picture in (copy / "images" / "train").iterdir():
        picture.write_bytes(picture.read_bytes()[:60])  # the header is whole, the pixels are not
    stopped = _train(copy, tmp_path / "stop")
    assert stopped.returncode == 2
    assert re.search(r"images/train/\d+\.png: cannot be read", stopped.stderr)
    assert "Traceback" not in stopped.stderr
    skipped = _train(copy, tmp_path / "skip", "data.on_bad_sample=skip", "num_steps=2")
    assert skipped.returncode == 0, skipped.stderr
    assert all(row["num_failed_images"] > 0 and row["loss"] > 0 for row in _metrics(tmp_path / "skip"))


def test_an_annotation_that_cannot_be_read_ends_all_ranks(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 alone looks for it; the others, leaders or not, hear of it and do not wait for ever."""
    meta = json.loads((data / "train_meta.json").read_text())
    for entry in meta.values():
        entry["root"] = str(data / entry["root"])
        entry["annotation"] = str(data / entry["annotation"])
    meta["facts"]["annotation"] = str(tmp_path / "none.jsonl")
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(meta))
    assert _train_here(data, tmp_path / "run", f"data.meta={path}") == 2
    error = capsys.readouterr().err
    assert "none.jsonl: cannot be read (No such file or directory)" in error
    assert "Traceback" not in error
