"""A real SLURM on this machine: a controller and two nodes of pretended size, without munge, accounting or cgroups.

Needs Debian's packages (`apt-get install slurm-wlm`). Node names resolve nowhere, so jobs set MASTER_ADDR.
"""

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import psutil

NODES = ("n1", "n2")
CPUS = 4
TOPOLOGY = "SwitchName=a Nodes=n2\nSwitchName=b Nodes=n1\nSwitchName=core Switches=a,b\n"
"""In the network n2 comes first."""
DAEMONS = ("slurmctld", "slurmd", "sbatch", "srun")


@dataclass
class SlurmCluster:
    """A running cluster; `environment` is what commands need to find it."""

    folder: Path
    environment: dict[str, str]
    daemons: dict[str, subprocess.Popen[bytes]]

    def run(self, *command: str) -> str:
        """Output of one of SLURM's commands."""
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, env=os.environ | self.environment
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def state(self, job_id: str) -> str:
        """A job's state, such as PENDING."""
        return self.run("squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T").strip()

    def field(self, job_id: str, name: str) -> str:
        """A field of `scontrol show job`."""
        parts = self.run("scontrol", "show", "job", "--oneliner", job_id).split()
        return next(part.removeprefix(f"{name}=") for part in parts if part.startswith(f"{name}="))

    def start_node(self, name: str) -> None:
        """Start a node's daemon."""
        self.daemons[name] = _start(self, "slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """What a power cut does: its daemon, and everything the jobs run there, are gone at once."""
        daemon = self.daemons.pop(name)
        daemon.kill()
        daemon.wait()
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get("SLURMD_NODENAME") == name and self._is_ours(process):
                    process.kill()

    def _is_ours(self, process: psutil.Process) -> bool:
        return process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]

    def logs(self) -> str:
        """What the daemons say, for a failure's report."""
        return "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("log/*")))


def wait_until(condition: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
    """Wait for something to become true; an error says what was there instead."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds:.0f} s: {what()}"
        time.sleep(0.2)


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[SlurmCluster]:
    """Start a cluster below an empty folder; it ends with the block.

    Raises:
        AssertionError: SLURM is not installed, or does not start; with what it says.
    """
    missing = [name for name in DAEMONS if shutil.which(name) is None]
    assert not missing, f"SLURM CANNOT BE TESTED: {', '.join(missing)} not found; apt-get install slurm-wlm"
    for name in ("state", "spool", "log"):
        (folder / name).mkdir(parents=True)
    (folder / "slurm.conf").write_text(_configuration(folder))
    (folder / "topology.conf").write_text(TOPOLOGY)
    cluster = SlurmCluster(folder, {"SLURM_CONF": str(folder / "slurm.conf"), "MASTER_ADDR": "127.0.0.1"}, {})
    try:
        cluster.daemons["slurmctld"] = _start(cluster, "slurmctld", "-D")
        for node in NODES:
            cluster.start_node(node)
        wait_until(lambda: _idle_nodes(cluster) == len(NODES), 60, lambda: f"SLURM DOES NOT START:\n{cluster.logs()}")
        yield cluster
    finally:
        for node in NODES:
            if node in cluster.daemons:
                cluster.kill_node(node)
        for daemon in cluster.daemons.values():
            daemon.kill()
            daemon.wait()


def _start(cluster: SlurmCluster, *command: str) -> subprocess.Popen[bytes]:
    silent = subprocess.DEVNULL
    return subprocess.Popen(
        command, env=os.environ | cluster.environment, stdout=silent, stderr=silent, start_new_session=True
    )


def _idle_nodes(cluster: SlurmCluster) -> int:
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"],
        capture_output=True, text=True, check=False, env=os.environ | cluster.environment,
    )  # fmt: skip
    return len(done.stdout.split())


def _configuration(folder: Path) -> str:
    host, user = socket.gethostname().partition(".")[0], getpass.getuser()
    controller, *nodes = _free_ports(1 + len(NODES))
    lines = [
        "ClusterName=test",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmUser={user}",
        f"SlurmdUser={user}",
        "AuthType=auth/none",
        "CredType=cred/none",
        f"SlurmctldPort={controller}",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd.%n.pid",
        f"SlurmctldLogFile={folder}/log/slurmctld.log",
        f"SlurmdLogFile={folder}/log/slurmd.%n.log",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool/%n",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/none",
        "AccountingStorageType=accounting_storage/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU",
        "SchedulerType=sched/builtin",
        "SlurmdParameters=config_overrides",
        "MpiDefault=none",
        "ReturnToService=2",
        "SlurmdTimeout=10",
        "TopologyPlugin=topology/tree",
        *(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} RealMemory=8000"
            for node, port in zip(NODES, nodes, strict=True)
        ),
        "PartitionName=work Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
    ]
    return "\n".join(lines) + "\n"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def restarted(cluster: SlurmCluster, job_id: str) -> None:
    """Let a requeued job begin soon: SLURM lets it wait two minutes. In the same second its nodes would still refuse it."""
    if cluster.state(job_id) == "PENDING" and cluster.field(job_id, "Reason") == "BeginTime":
        begins = cluster.field(job_id, "StartTime")
        if begins != "Unknown" and datetime.fromisoformat(begins) > datetime.now() + timedelta(seconds=10):
            cluster.run("scontrol", "update", f"jobid={job_id}", "StartTime=now+2")
