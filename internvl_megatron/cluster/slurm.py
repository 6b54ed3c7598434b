"""SLURM's commands, with their errors as ours."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from internvl_megatron.errors import ConfigError

FIELDS = ("%i", "%T", "%r", "%M", "%l", "%D", "%N")


@dataclass(frozen=True)
class QueuedJob:
    """A job that SLURM still knows, in its own words."""

    id: str
    state: str
    reason: str
    """Why it waits; "None" when it does not."""
    elapsed: str
    limit: str
    num_nodes: str
    nodes: str

    @property
    def is_over(self) -> bool:
        """SLURM remembers a job for some minutes after its end."""
        return self.state not in {
            "PENDING",
            "CONFIGURING",
            "RUNNING",
            "COMPLETING",
            "REQUEUED",
            "SUSPENDED",
            "STOPPED",
        }


def is_here() -> bool:
    """Whether jobs can be submitted from this machine."""
    return shutil.which("sbatch") is not None


def test(script: Path) -> str:
    """What SLURM would do with a script, without doing it: when it would start, and where.

    Raises:
        ConfigError: it would refuse the job; with its reason.
    """
    done = _run("sbatch", "--test-only", str(script))
    return re.sub(r"^sbatch: ", "", done.stderr.strip(), flags=re.MULTILINE)


def submit(script: Path) -> str:
    """Submit a script and return the job's id.

    Raises:
        ConfigError: SLURM refuses it; with its reason.
    """
    return _run("sbatch", "--parsable", str(script)).stdout.strip().partition(";")[0]


def queued(ids: list[str]) -> list[QueuedJob]:
    """Those of some jobs that SLURM still knows.

    Raises:
        ConfigError: SLURM does not answer.
    """
    if not ids:
        return []
    command = ("squeue", "--noheader", "--states=all", f"--jobs={','.join(ids)}", f"--format={'|'.join(FIELDS)}")
    try:
        lines = _run(*command).stdout.splitlines()
    except ConfigError as error:
        if "Invalid job id" in str(error):  # a single job that is long over
            return []
        raise
    return [QueuedJob(*line.split("|", len(FIELDS) - 1)) for line in lines]


def cancel(job_id: str, signal_name: str | None = None) -> None:
    """End a job, or send a signal to its ranks.

    Raises:
        ConfigError: SLURM refuses.
    """
    _run("scancel", *([] if signal_name is None else [f"--signal={signal_name}"]), job_id)


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError(
            f"{command[0]}: not found: SLURM is not on this machine; run this where jobs are submitted, or give --dry-run"
        ) from None
    if done.returncode:
        reason = re.sub(rf"^{command[0]}: (error: )?", "", done.stderr.strip(), flags=re.MULTILINE)
        raise ConfigError(f"{command[0]}: {reason or f'exit code {done.returncode}'}")
    return done
