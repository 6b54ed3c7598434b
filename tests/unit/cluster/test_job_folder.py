"""The job's folder: what is written, that it is whole, and that the scripts are sound shell."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from internvl_megatron.cluster.job_folder import CHECKOUT, job_ids, newest_job, record_id, script, write_job
from internvl_megatron.cluster.request import JobRequest, check, requested_config
from internvl_megatron.config.overrides import from_json
from internvl_megatron.errors import ConfigError

GIVEN = ["data.meta=m.json", "data.tokenizer=t", "checkpoint.load=w"]
SCRIPTS = [path for end in ("sh", "sbatch") for path in sorted((CHECKOUT / "launch").rglob(f"*.{end}"))]


def options_of(text: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE))


def test_a_job_s_folder_says_what_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_IB_HCA", "mlx5")
    for name in ("MY_TOKEN", "SLURM_JWT"):
        monkeypatch.setenv(name, "secret")
    config = requested_config("internvl3_8b_sft", 16, None, [*GIVEN, f"folder={tmp_path / 'a run'}"])
    request = JobRequest(nodes=2, gpus_per_node=8, time="1-00")
    first, second = (write_job(config, request, check(config, request)[1]) for _ in range(2))
    assert (first.name, second.name) == ("0001", "0002") and newest_job(tmp_path / "a run") == second
    assert from_json(first / "config.json") == config
    head = subprocess.run(
        ["git", "-C", str(CHECKOUT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    assert (first / "commit.txt").read_text().startswith(head.stdout)
    environment = (first / "environment.txt").read_text()
    assert "NCCL_IB_HCA=mlx5" in environment and "torch==" in environment and "secret" not in environment
    assert (first / "launch" / "slurm" / "train.sbatch").read_text() == (
        CHECKOUT / "launch" / "slurm" / "train.sbatch"
    ).read_text()
    assert not list(first.parent.glob("*.writing"))
    record_id(second, "41")
    record_id(second, "42")
    assert (job_ids(first), job_ids(second)) == ([], ["41", "42"])
    quoted = subprocess.run(["bash", "-n", str(first / "job.sbatch")], capture_output=True, text=True, check=False)
    assert quoted.returncode == 0, quoted.stderr


def test_the_script_asks_for_what_was_requested(tmp_path: Path) -> None:
    # The recipe's own windows leave no room for the fuller GPUs of four nodes.
    config = requested_config("internvl3_78b_sft", 64, None, [*GIVEN, "parallel.vision_window_rows=8"])
    request = JobRequest(
        nodes=8, gpus_per_node=8, min_nodes=4, time="1-00", notice_seconds=600, partition="h100", account="vision",
        container="pyxis:nvcr.io#nvidia/pytorch:25.10", sbatch_options=("--constraint=ib",),
    )  # fmt: skip
    text = script(config, request, check(config, request)[1], tmp_path)
    options = options_of(text)
    assert options["nodes"] == "4-8" and "export NODE_COUNTS='8 4'" in text
    assert (options["ntasks-per-node"], options["gpus-per-node"], options["mem"]) == ("8", "8", "0")
    assert (options["time"], options["partition"], options["account"]) == ("1-00", "h100", "vision")
    assert options["signal"] == "B:USR1@600" and options["constraint"] == "ib" and "requeue" in options
    assert "export PYTHON=python3" in text and "pyxis:nvcr.io#nvidia/pytorch:25.10" in text


def test_a_run_on_cpus_asks_for_no_gpus(tmp_path: Path) -> None:
    config = requested_config("demo_digits", 4, None, [])
    request = JobRequest(nodes=2, gpus_per_node=2)
    text = script(config, request, [2], tmp_path)
    assert "gpus" not in options_of(text)["ntasks-per-node"] and "gpus-per-node" not in options_of(text)
    assert "exclusive" not in options_of(text) and "EXPECTED_GPUS" not in text


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = requested_config("demo_digits", 4, None, [f"folder={tmp_path / 'file'}"])
    with pytest.raises(ConfigError, match="choose another"):
        write_job(config, JobRequest(nodes=2, gpus_per_node=2), [2])
    with pytest.raises(ConfigError, match="no job was launched there"):
        newest_job(tmp_path)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    is_sourced = path.name in ("env.sh", "job.sh")
    assert is_sourced or re.search(r"^set -e?uo pipefail$", path.read_text(), re.MULTILINE)


def test_shellcheck_finds_nothing() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (apt-get install shellcheck)")
    command = ["shellcheck", "-x", *(str(path.relative_to(CHECKOUT)) for path in SCRIPTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=CHECKOUT)
    assert done.returncode == 0, done.stdout
