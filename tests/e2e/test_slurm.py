"""A real SLURM of two nodes on this machine: the demo as 2 x 2 ranks, out of time, without a node, finished all the same.

Slow (minutes), and loud where SLURM is not installed: nothing of it can be tested then.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from internvl_megatron.checkpoint import folders
from internvl_megatron.watching.metrics import METRICS_FILE, read_metrics
from tests.support.slurm_cluster import SlurmCluster, restarted, slurm_cluster, wait_until
from tests.support.small_runs import small_data

pytestmark = [pytest.mark.slow, pytest.mark.parallel]

STEPS, SAVE_EVERY = 60, 5
SETTINGS = [
    f"num_steps={STEPS}",
    f"checkpoint.save_every_steps={SAVE_EVERY}",
    "rows_per_step=8",
    "eval_every_steps=null",
    "data.eval_meta=null",
    "data.tokens_per_row=1024",
    "data.tiles_per_row=64",
]
LONGEST_SECONDS = 900


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("demo") / "data")


def command(cluster: SlurmCluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "internvl_megatron", *arguments],
        capture_output=True, text=True, timeout=120, check=False, env=os.environ | cluster.environment,
    )  # fmt: skip


def launch(cluster: SlurmCluster, data: Path, run: Path, *more: str) -> subprocess.CompletedProcess[str]:
    given = [f"data.meta={data / 'train_meta.json'}", f"data.tokenizer={data / 'tokenizer'}", f"folder={run}"]
    return command(cluster, "launch", "demo_digits", "--nodes=2", "--gpus-per-node=2", *SETTINGS, *given, *more)


def submitted(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    match = re.search(r"submitted as job (\d+)", done.stdout)
    assert match is not None, done.stdout
    return match[1]


def steps_taken(run: Path) -> int:
    path = run / METRICS_FILE
    return len(read_metrics(path)) if path.is_file() else 0


def losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(run / METRICS_FILE)}


def job_log(run: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(run.glob("jobs/*/slurm-*.log")))


def wait_for_step(run: Path, step: int) -> None:
    wait_until(lambda: steps_taken(run) >= step, LONGEST_SECONDS, lambda: job_log(run))


def wait_for_attempt(cluster: SlurmCluster, job_id: str, run: Path, restarts: int) -> None:
    """Wait until a requeued job runs again, without the two minutes that SLURM lets it wait."""

    def runs_again() -> bool:
        restarted(cluster, job_id)
        return cluster.state(job_id) == "RUNNING" and int(cluster.field(job_id, "Restarts")) == restarts

    wait_until(runs_again, 180, lambda: f"{cluster.run('scontrol', 'show', 'job', job_id)}\n{job_log(run)}")


def wait_for_end(cluster: SlurmCluster, job_id: str, run: Path) -> None:
    wait_until(lambda: cluster.state(job_id) in ("COMPLETED", "FAILED"), LONGEST_SECONDS, lambda: job_log(run))
    assert cluster.state(job_id) == "COMPLETED", job_log(run)


@pytest.fixture(scope="module")
def whole(cluster: SlurmCluster, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    run = tmp_path_factory.mktemp("whole")
    wait_for_end(cluster, submitted(launch(cluster, data, run)), run)
    return run


def test_a_run_ends_as_it_would_have_without_its_time_limit_and_a_dead_node(
    cluster: SlurmCluster, data: Path, whole: Path, tmp_path: Path
) -> None:
    job_id = submitted(launch(cluster, data, tmp_path, "--time=60", "--notice-seconds=120"))
    wait_for_step(tmp_path, 2)
    # The limit is now one or two minutes away, and notice of it due. SLURM looks every 30 s.
    minutes, seconds = cluster.run("squeue", "--noheader", f"--jobs={job_id}", "--format=%M").strip().split(":")
    cluster.run("scontrol", "update", f"jobid={job_id}", f"TimeLimit={int(minutes) + (2 if int(seconds) < 55 else 3)}")
    wait_for_attempt(cluster, job_id, tmp_path, restarts=1)
    assert "the time limit is near" in job_log(tmp_path)
    assert "saved and stopped by the system" in job_log(tmp_path)
    at_limit = folders.read_info(folders.finished(tmp_path / "checkpoints")[-1]).step
    assert 2 <= at_limit < STEPS, "the run was over before its time: nothing was tested"
    cluster.run("scontrol", "update", f"jobid={job_id}", "TimeLimit=60")

    # The second attempt continues from there, and loses a node after its next checkpoint, before it is finished.
    wait_for_step(tmp_path, min(at_limit + 1, STEPS - 1))
    cluster.kill_node("n2")
    assert steps_taken(tmp_path) < STEPS, "the run was over before its node died: nothing was tested"
    wait_until(lambda: cluster.state(job_id) != "RUNNING", 180, lambda: job_log(tmp_path))
    cluster.start_node("n2")
    wait_for_attempt(cluster, job_id, tmp_path, restarts=2)
    wait_for_end(cluster, job_id, tmp_path)

    assert losses(tmp_path) == losses(whole)
    assert sorted(losses(whole)) == list(range(1, STEPS + 1))
    status = command(cluster, "status", str(tmp_path)).stdout
    assert f"step {STEPS} of {STEPS} (100.0%)" in status, status
    assert "stopped by the system, saved" in status, status
    assert status.count("finished") == 1, status


def submit_script(cluster: SlurmCluster, folder: Path, *arguments: str) -> str:
    """Submit a script of `launch/slurm` by hand, wait for its end, and return its log."""
    log = folder / "job.log"
    with_python = {"PYTHON": sys.executable, "JOB_FOLDER": str(folder / "job")}
    done = subprocess.run(
        ["sbatch", "--wait", f"--output={log}", *arguments],
        capture_output=True, text=True, timeout=LONGEST_SECONDS, check=False,
        env=os.environ | cluster.environment | with_python,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stderr}\n{log.read_text() if log.is_file() else ''}"
    return log.read_text()


def test_conversion_and_evaluation_are_jobs_too(
    cluster: SlurmCluster, data: Path, whole: Path, tmp_path: Path
) -> None:
    target = tmp_path / "hf"
    convert = ["--nodes=2", "--ntasks-per-node=1", "launch/slurm/convert.sbatch"]
    submit_script(cluster, tmp_path, *convert, "megatron-to-hf", str(whole), str(target), "--layout", "transformers")
    assert json.loads((target / "config.json").read_text())["architectures"] == ["InternVLForConditionalGeneration"]
    assert list(target.glob("*.safetensors"))

    image = next((data / "images").rglob("*.png"))
    question = ["score", str(whole), "Read the number.", "--image", str(image), "--answer", "3", "--answer", "8"]
    log = submit_script(cluster, tmp_path, "--ntasks-per-node=1", "launch/slurm/evaluate.sbatch", *question)
    answer = command(cluster, *question)
    assert answer.returncode == 0, answer.stderr
    assert log.strip().splitlines()[-1] == answer.stdout.strip().splitlines()[-1]
