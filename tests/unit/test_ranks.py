"""Who a process is, from the variables that torchrun, srun and mpirun really set."""

import os
import subprocess
import sys

import pytest

from internvl_megatron.errors import ConfigError
from internvl_megatron.ranks import RankInfo, first_host, rank_from_environment, tasks_per_node

# What srun --nodes=2 --ntasks=3 gave the second task of the first node (SLURM 22.05).
SRUN = {
    "SLURM_JOB_ID": "41",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_PROCID": "1",
    "SLURM_NODEID": "0",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "16",
    "OMPI_COMM_WORLD_LOCAL_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}
TORCHRUN = {
    "RANK": "9",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "8",
    "MASTER_ADDR": "a7",
    "MASTER_PORT": "29400",
}
BATCH_SCRIPT = {"SLURM_JOB_ID": "41", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}


def test_a_process_started_by_itself_has_no_place() -> None:
    assert rank_from_environment({}) is None
    assert rank_from_environment(BATCH_SCRIPT) is None, "a batch script is no task of a step"
    shell = SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_PROCID": "0"}
    assert rank_from_environment(shell) is None, "srun --pty bash"


def test_each_launcher_is_understood() -> None:
    assert rank_from_environment(TORCHRUN) == RankInfo(9, 16, 1, 8, "tcp://a7:29400")
    assert rank_from_environment(SRUN) == RankInfo(1, 3, 1, 2, "tcp://n1:20041")
    assert rank_from_environment(OPEN_MPI | {"MASTER_ADDR": "b1"}) == RankInfo(5, 16, 5, 8, "tcp://b1:29500")
    assert rank_from_environment(HYDRA) == RankInfo(3, 4, 3, 4, "tcp://127.0.0.1:29500")


def test_every_node_of_a_step_has_its_own_number_of_tasks() -> None:
    last = SRUN | {"SLURM_PROCID": "2", "SLURM_NODEID": "1", "SLURM_LOCALID": "0"}
    assert rank_from_environment(last) == RankInfo(2, 3, 0, 1, "tcp://n1:20041")


def test_the_innermost_launcher_counts() -> None:
    """mpirun starts its daemons with srun, one a node: what SLURM says is then said of the daemon."""
    daemon = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}
    assert rank_from_environment(daemon | OPEN_MPI) == RankInfo(5, 16, 5, 8, "tcp://n1:20041")
    assert rank_from_environment(SRUN | TORCHRUN) == RankInfo(9, 16, 1, 8, "tcp://a7:29400")
    under_pmi2 = SRUN | {"PMI_RANK": "1", "PMI_SIZE": "3"}  # srun --mpi=pmi2 sets these as well
    assert rank_from_environment(under_pmi2) == rank_from_environment(SRUN)


def test_a_given_meeting_place_wins() -> None:
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}
    for launcher in (SRUN, OPEN_MPI, HYDRA):
        info = rank_from_environment(launcher | given)
        assert info is not None and info.init_method == "tcp://10.0.0.1:4000"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, "MASTER_ADDR is not"),
        (TORCHRUN | {"RANK": "one"}, "RANK='one' is not a number"),
        (TORCHRUN | {"RANK": "-1"}, "RANK='-1' is not a number"),
        (TORCHRUN | {"RANK": "16"}, "RANK=16, WORLD_SIZE=16.* do not fit together"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "17"}, "do not fit together"),
        ({name: value for name, value in TORCHRUN.items() if name != "LOCAL_RANK"}, "LOCAL_RANK is not set"),
        (OPEN_MPI, "say on which rank 0 is"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, "does not describe 3 tasks"),
        (SRUN | {"SLURM_NODEID": "2"}, "a node 2"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2x"}, "does not say how many tasks"),
    ],
)
def test_variables_that_do_not_fit_are_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rank_from_environment(environment)


def test_short_forms_of_slurm() -> None:
    assert tasks_per_node("8(x2),4,1(x3)") == [8, 8, 4, 1, 1, 1]
    assert [first_host(text) for text in ("n[08-10,12],a1", "gpu-3", "a1,a2", "r[1-2]-ib", "rack2-n[07],x")] == [
        "n08", "gpu-3", "a1", "r1-ib", "rack2-n07",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="set MASTER_ADDR"):
        first_host("")


def test_torchrun_itself() -> None:
    code = "from internvl_megatron.ranks import rank_from_environment as r; i = r(); print(i.rank, i.local_world_size)"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python",
         sys.executable, "-c", code],
        capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n"))[1:] == ["0 2", "1 2"]
