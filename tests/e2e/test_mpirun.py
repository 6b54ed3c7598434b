"""A real mpirun (Open MPI) starts the ranks of a run. Slow, and skipped where it is not installed (apt-get install openmpi-bin)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from internvl_megatron.__main__ import main
from internvl_megatron.watching.metrics import METRICS_FILE, read_metrics
from tests.support.small_runs import small_data, small_run_settings

pytestmark = [pytest.mark.slow, pytest.mark.parallel]


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed (apt-get install openmpi-bin)")
def test_losses_are_those_of_our_own_launcher(tmp_path: Path) -> None:
    data = small_data(tmp_path / "data")

    def train(run: Path) -> list[str]:
        settings = [*small_run_settings(data, run), "num_steps=3", "parallel.tensor_size=2", "device=cpu"]
        return ["train", "demo_digits", *settings]

    assert main([*train(tmp_path / "ours"), "--nproc", "2"]) == 0
    mpirun = ["mpirun", "--oversubscribe", "-n", "2", sys.executable, "-m", "internvl_megatron"]
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*mpirun, *train(tmp_path / "mpi")],
        capture_output=True, text=True, timeout=300, check=False, env=os.environ | as_root,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours, mpi = ([row["loss"] for row in read_metrics(tmp_path / name / METRICS_FILE)] for name in ("ours", "mpi"))
    assert len(ours) == 3
    assert mpi == ours
