"""The job scripts in a real SLURM, with a stand-in for training: signals, restarts, a watchdog, and when to give up."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from internvl_megatron.cluster.job_folder import write_job
from internvl_megatron.cluster.request import JobRequest, check, requested_config
from tests.support.slurm_cluster import SlurmCluster, restarted, slurm_cluster, wait_until

pytestmark = pytest.mark.slow

STAND_IN = Path(__file__).resolve().parents[1] / "support" / "stand_in_run.py"
GIVEN = ["data.meta=m.json", "data.tokenizer=t", "data.eval_meta=m.json"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


INTERPRETER = f"""#!/bin/sh
# Training is stood in for; everything else is real, but for a node that is to be broken.
case $2 in tools.preflight | internvl_megatron.cluster.node_order) ;; *) exec "{sys.executable}" -S "{STAND_IN}" "$@" ;; esac
[ ! -e "$RUN_FOLDER/broken-$SLURMD_NODENAME" ] || exit 1
exec "{sys.executable}" "$@"
"""


class Job:
    """A submitted job whose attempts do what they are told."""

    def __init__(
        self, cluster: SlurmCluster, run: Path, plan: list[str], by_hand: bool = False, **request: Any
    ) -> None:
        self.cluster, self.run = cluster, run
        (run / "plan").write_text("\n".join(plan))
        python = run / "python"
        python.write_text(INTERPRETER)
        python.chmod(0o755)
        asked = JobRequest(**{"nodes": 2, "gpus_per_node": 2, "preflight": "off", "python": str(python)} | request)
        config = requested_config("demo_digits", asked.num_ranks, None, [*GIVEN, f"folder={run}"])
        self.folder = write_job(config, asked, check(config, asked)[1])
        script = self.folder / "job.sbatch"
        if by_hand:  # as whoever submits train.sbatch names a recipe
            text, given = script.read_text(), " ".join([*GIVEN, f"folder={run}"])
            assert '"$JOB_FOLDER/config.json"' in text, "launched jobs name their configuration"
            script.write_text(text.replace('"$JOB_FOLDER/config.json"', f"demo_digits {given}"))
        self.id = cluster.run("sbatch", "--parsable", str(script)).strip()

    def wait_for_attempt(self, number: int, ranks: int = 4) -> None:
        """Wait until all ranks of an attempt have begun."""

        def has_begun() -> bool:
            restarted(self.cluster, self.id)
            assert self.cluster.state(self.id) != "FAILED", self.report()
            return all((self.run / f"began-{number}-{rank}").exists() for rank in range(ranks))

        wait_until(has_begun, 120, self.report)

    def wait_for_end(self, state: str) -> None:
        def is_over() -> bool:
            restarted(self.cluster, self.id)
            return self.cluster.state(self.id) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

        wait_until(is_over, 120, self.report)
        assert self.cluster.state(self.id) == state, self.report()

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in self.folder.glob("slurm-*.log"))

    @property
    def ends(self) -> list[str]:
        """Exit codes of the attempts."""
        return [line.split()[2] for line in (self.folder / "ends").read_text().splitlines()]

    def report(self) -> str:
        return f"{self.cluster.run('scontrol', 'show', 'job', self.id)}\n{self.log}\n{self.cluster.logs()}"


def test_a_job_out_of_time_is_requeued_until_it_is_finished(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, ["run", "0"], time="2", notice_seconds=60)
    job.wait_for_attempt(0)
    job.wait_for_end("COMPLETED")
    assert job.ends == ["75", "0"], job.report()
    assert "the time limit is near" in job.log and "from checkpoint step-00000000" in job.log


def test_a_preempted_job_saves(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, ["run", "0"])
    job.wait_for_attempt(0)
    cluster.run("scancel", "--signal=TERM", job.id)  # what SLURM does ahead of a preemption
    job.wait_for_end("COMPLETED")
    assert job.ends == ["75", "0"], job.report()


def test_a_job_that_a_person_stops_is_not_started_again(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, ["run"])
    (job.folder / "jobs").write_text(f"{job.id}\n")
    job.wait_for_attempt(0)
    done = subprocess.run(
        [sys.executable, "-m", "internvl_megatron", "stop", str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=False, env=os.environ | cluster.environment,
    )  # fmt: skip
    assert "saves and stops after its step" in done.stdout, done.stderr
    job.wait_for_end("FAILED")
    assert job.ends == ["130"], job.report()


def test_a_cancelled_job_is_not_started_again(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Its ranks get SIGTERM too, save, and say so."""
    job = Job(cluster, tmp_path, ["run", "0"])
    job.wait_for_attempt(0)
    cluster.run("scancel", job.id)
    job.wait_for_end("CANCELLED")
    time.sleep(5)
    assert cluster.state(job.id) == "CANCELLED" and "job goes on" not in job.log, job.report()


def test_failures_without_a_new_checkpoint_end_a_job(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, ["1", "137", "1", "0"])
    job.wait_for_end("FAILED")
    assert job.ends == ["1", "137", "1"], job.report()
    assert "3 attempts in a row ended before a new checkpoint: giving up" in job.log


@pytest.mark.parametrize(
    ("code", "why"), [("2", "a setting or a file is wrong"), ("3", "what it may not go on after")]
)
def test_what_comes_again_is_not_tried_again(cluster: SlurmCluster, tmp_path: Path, code: str, why: str) -> None:
    job = Job(cluster, tmp_path, [code, "0"])
    job.wait_for_end("FAILED")
    assert job.ends == [code] and why in job.log, job.report()


def test_a_hanging_step_is_ended(cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cluster.environment, "WATCHDOG_SECONDS", "4")
    job = Job(cluster, tmp_path, ["hang", "0"])
    job.wait_for_end("COMPLETED")
    assert "nothing was written for 4 seconds" in job.log
    assert job.ends[0] not in ("0", "2", "75", "130") and job.ends[1:] == ["0"], job.report()


def test_a_job_goes_on_when_a_node_dies(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, ["run", "0"], min_nodes=1)
    job.wait_for_attempt(0)
    cluster.kill_node("n2")
    try:  # the demo's layout takes 4 ranks: it waits for the node
        wait_until(lambda: cluster.state(job.id) != "RUNNING", 90, job.report)
    finally:
        cluster.start_node("n2")
    job.wait_for_end("COMPLETED")
    assert job.ends[-1] == "0", job.report()


def test_a_bad_node_is_left_out_and_the_job_goes_on_with_fewer(cluster: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "broken-n2").touch()
    job = Job(cluster, tmp_path, ["0"], preflight="on", gpus_per_node=4, min_nodes=1)
    job.wait_for_end("FAILED")
    assert "preflight: n2: did not report" in job.log and "bad nodes: n2" in job.log, job.report()
    job.id = (job.folder / "jobs").read_text().split()[-1]
    job.wait_for_attempt(0)
    job.wait_for_end("COMPLETED")
    assert job.ends == ["0"] and cluster.field(job.id, "ExcNodeList") == "n2", job.report()
    assert "on 1 of 1 nodes (n1)" in job.log
    assert {path.name for path in tmp_path.glob("began-*")} == {f"began-0-{rank}" for rank in range(4)}


@pytest.mark.parametrize("by_hand", [False, True])
def test_ranks_follow_the_network(cluster: SlurmCluster, tmp_path: Path, by_hand: bool) -> None:
    job = Job(cluster, tmp_path, ["0"], by_hand=by_hand, node_order="pipeline")
    job.wait_for_end("COMPLETED")
    logs = [path.read_text() for path in sorted(job.folder.glob("logs/*/train-*.log"))]
    assert [log.split(":")[0] for log in logs] == [
        f"rank {rank} of 4 on {node}" for rank, node in enumerate(("n2", "n2", "n1", "n1"))
    ], job.report()


def test_what_slurm_would_refuse_is_not_submitted(cluster: SlurmCluster, tmp_path: Path) -> None:
    def launch(*more: str) -> subprocess.CompletedProcess[str]:
        arguments = ["launch", "demo_digits", *GIVEN, f"folder={tmp_path}", "--nodes=2", "--gpus-per-node=2", *more]
        return subprocess.run(
            [sys.executable, "-m", "internvl_megatron", *arguments],
            capture_output=True, text=True, timeout=60, check=False, env=os.environ | cluster.environment,
        )  # fmt: skip

    for options, reason in ((["--partition=nowhere"], "invalid partition"), (["--sbatch=--mem=99T"], "not available")):
        done = launch(*options)
        assert done.returncode == 2 and reason in done.stderr, done.stderr
        assert not list((tmp_path / "jobs").iterdir())
    dry = launch("--dry-run", "--partition=work")
    assert dry.returncode == 0 and "nothing was submitted" in dry.stdout, dry.stderr
    assert "to start at" in dry.stdout and (tmp_path / "jobs" / "0001" / "job.sbatch").is_file()
    assert not cluster.run("squeue", "--noheader")
