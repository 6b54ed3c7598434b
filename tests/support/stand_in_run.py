"""Stands in for `python -m internvl_megatron train` in tests of the job scripts: nothing is computed, so it costs no time.

Started as the job's interpreter by every rank. What it does follows from the text of the file `plan` in the run's folder, a line for each
attempt: "run", save a checkpoint at once and wait for a signal, then save and end as training does; "hang", write nothing more and ignore
signals; or an exit code, at once.
"""

import os
import signal
import sys
import time
from pathlib import Path

EXIT_REQUEUE, EXIT_INTERRUPTED = 75, 130


def main() -> int:
    """One rank."""
    run, rank = Path(os.environ["RUN_FOLDER"]), int(os.environ["SLURM_PROCID"])
    attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    received: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: received.append(number))
    what = (run / "plan").read_text().splitlines()[attempt]
    node = os.environ["SLURMD_NODENAME"]
    sys.stdout.write(f"rank {rank} of {os.environ['SLURM_STEP_NUM_TASKS']} on {node}: {what}\n")
    sys.stdout.flush()
    (run / f"began-{attempt}-{rank}").touch()
    if what == "hang":
        while True:
            time.sleep(0.1)
    if what != "run":
        if rank != 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(1)
        return int(what) if rank == 0 else 0
    if rank == 0:
        (run / "checkpoints" / f"step-{attempt:08d}").mkdir(parents=True)
    while not received:
        time.sleep(0.1)
    if rank != 0:  # still busy when rank 0 ends, so that srun ends it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(2)
        return 0
    return EXIT_INTERRUPTED if received[0] == signal.SIGINT else EXIT_REQUEUE


if __name__ == "__main__":
    sys.exit(main())
