"""`launch`, `status`, `logs` and `stop`: runs on a cluster from the command line."""

import argparse
import json
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

from internvl_megatron.checkpoint import folders
from internvl_megatron.cluster import slurm
from internvl_megatron.cluster.job_folder import SCRIPT, job_ids, newest_job, record_id, write_job
from internvl_megatron.cluster.node_order import Near
from internvl_megatron.cluster.request import JobRequest, Preflight, check, describe, requested_config
from internvl_megatron.config.overrides import CONFIG_FILE, from_json
from internvl_megatron.errors import UserError
from internvl_megatron.scaling.gpus import GPUS, find_gpu
from internvl_megatron.watching.metrics import METRICS_FILE

ENDS = {
    "0": "finished",
    "2": "a setting or a file is wrong",
    "3": "ended by a bad step, gradients that differ, or a failed last save (logs and events.jsonl say which); not started again",
    "75": "stopped by the system, saved",
    "130": "stopped by a person",
}
"""Exit codes of `train`, for people."""


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The commands' arguments."""
    launch = commands.add_parser("launch", help="submit a run to SLURM; it goes on until its last step is taken")
    launch.add_argument("recipe", help="name of a recipe")
    launch.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings to change")
    launch.add_argument("--nodes", type=int, required=True)
    launch.add_argument("--gpus-per-node", type=int, default=8, help="ranks of a node (default: 8)")
    launch.add_argument("--min-nodes", type=int, help="may also run on fewer nodes, down to these")
    launch.add_argument("--settings", type=Path, metavar="FILE", help="settings by number of GPUs (launch/settings/)")
    launch.add_argument("--time", help="time limit of a job, as sbatch takes it (default: the partition's)")
    launch.add_argument("--notice-seconds", type=int, default=300, help="the run saves so long before (default: 300)")
    launch.add_argument("--partition")
    launch.add_argument("--account")
    launch.add_argument("--container", metavar="KIND:IMAGE", help="pyxis:IMAGE or apptainer:IMAGE")
    launch.add_argument("--container-mounts", metavar="SRC:DST,...")
    launch.add_argument("--python", help="interpreter of the job (default: this one; in a container, python3)")
    launch.add_argument("--gpu", metavar="KIND", help=f"predict a step on these: {', '.join(GPUS)}")
    launch.add_argument("--memory-gb", type=float, help="of a GPU (default: that of --gpu, or 80)")
    launch.add_argument(
        "--node-order", choices=get_args(Near), help="what is near in the network (default: SLURM's order)"
    )
    launch.add_argument("--sbatch", action="append", default=[], metavar="=--OPTION=VALUE", help="handed on to sbatch")
    launch.add_argument(
        "--preflight",
        choices=get_args(Preflight),
        default="on",
        help="look at the nodes first, and time their network or not (default: on)",
    )
    launch.add_argument("--dry-run", action="store_true", help="check, write the job's folder, and submit nothing")
    launch.set_defaults(run=_launch)

    for name, run, text in (
        ("status", _status, "what a launched run is doing"),
        ("logs", _logs, "what a rank of a launched run says"),
        ("stop", _stop, "let a launched run save and stop"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("run_folder", type=Path, help="folder of the run")
        command.set_defaults(run=run)
        if name == "logs":
            command.add_argument("--rank", type=int, default=0, help="(default: 0)")
            command.add_argument("--lines", type=int, default=40, help="the last so many (default: 40)")
            command.add_argument("--follow", action="store_true", help="go on printing until Ctrl-C")
        elif name == "stop":
            command.add_argument("--now", action="store_true", help="without saving")


def _launch(options: argparse.Namespace) -> int:
    memory_gb = options.memory_gb
    if memory_gb is None:
        memory_gb = 80.0 if options.gpu is None else find_gpu(options.gpu).memory_bytes / 1e9
    request = JobRequest(
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        min_nodes=options.min_nodes,
        time=options.time,
        notice_seconds=options.notice_seconds,
        partition=options.partition,
        account=options.account,
        container=options.container,
        container_mounts=options.container_mounts,
        python=options.python,
        preflight=options.preflight,
        node_order=options.node_order,
        gpu=options.gpu,
        memory_gb=memory_gb,
        sbatch_options=tuple(option.removeprefix("=") for option in options.sbatch),
    )
    config = requested_config(options.recipe, request.num_ranks, options.settings, options.overrides)
    made, counts = check(config, request)
    print(describe(config, made, request, counts))
    if slurm.is_here():
        _refuse_second(Path(config.folder))
    elif not options.dry_run:
        raise UserError(
            "sbatch: not found: SLURM is not on this machine; launch where jobs are submitted, or give --dry-run"
        )
    job = write_job(config, request, counts)
    if slurm.is_here():
        try:
            print(slurm.test(job / SCRIPT))
        except UserError:
            shutil.rmtree(job)
            raise
    print(f"job folder: {job}")
    if not slurm.is_here():
        print("SLURM is not here: whether it takes the job was not tried")
    if options.dry_run:
        print(f"nothing was submitted; sbatch {job / SCRIPT} does it")
        return 0
    job_id = slurm.submit(job / SCRIPT)
    record_id(job, job_id)
    print(f"submitted as job {job_id}; internvl-megatron status {config.folder}")
    return 0


def _refuse_second(run_folder: Path) -> None:
    """Two jobs must not write the same run."""
    try:
        before = newest_job(run_folder)
    except UserError:
        return
    waiting = [job for job in slurm.queued(job_ids(before)) if not job.is_over]
    if waiting:
        raise UserError(
            f"{run_folder}: job {waiting[-1].id} of this run is {waiting[-1].state.lower()}; stop it first "
            f"(internvl-megatron stop {run_folder}), or choose another folder (folder=PATH)"
        )


def _status(options: argparse.Namespace) -> int:
    job = newest_job(options.run_folder)
    config = from_json(job / CONFIG_FILE)
    ids = job_ids(job)
    print(f"{config.name}: job folder {job}")
    known = slurm.queued(ids)
    for one in known:
        where = f" on {one.nodes}" if one.nodes else ""
        why = f" ({one.reason})" if one.reason != "None" else ""
        print(f"job {one.id}: {one.state.lower()}{why}, {one.elapsed} of {one.limit}, {one.num_nodes} nodes{where}")
    if not known:
        print(f"jobs {', '.join(ids)}: SLURM knows them no more" if ids else "was not submitted")
    ends = job / "ends"
    for line in ends.read_text().splitlines() if ends.is_file() else []:
        when, attempt, code = line.split()
        print(
            f"attempt {attempt}: {ENDS.get(code, f'failed with exit code {code}')}, {datetime.fromtimestamp(int(when), UTC):%F %T} UTC"
        )
    excluded = job / "excluded_nodes"
    if excluded.is_file():
        print(f"left out: {', '.join(sorted(set(excluded.read_text().split())))}")
    print(_progress(options.run_folder, config.num_steps))
    return 0


def _progress(run_folder: Path, num_steps: int) -> str:
    saved = folders.finished(run_folder / folders.CHECKPOINTS)
    newest = f"newest checkpoint {saved[-1].name}" if saved else "no checkpoint yet"
    path = run_folder / METRICS_FILE
    lines = path.read_text().splitlines() if path.is_file() else []
    if not lines:
        return f"no step taken yet; {newest}"
    last = json.loads(lines[-1])
    age = time.time() - path.stat().st_mtime
    return (
        f"step {last['step']} of {num_steps} ({last['step'] / num_steps:.1%}), loss {last['loss']:.4f}, "
        f"{last['tokens_per_second']:.0f} tokens/s, {last['step_seconds']:.1f} s a step, {age:.0f} s ago; {newest}"
    )


def _logs(options: argparse.Namespace) -> int:
    attempts = sorted(newest_job(options.run_folder).glob("logs/*"), key=lambda path: path.stat().st_mtime)
    if not attempts:
        raise UserError(f"{options.run_folder}: its job has not started yet; `status` says why")
    path = attempts[-1] / f"train-{options.rank}.log"
    if not path.is_file():
        raise UserError(
            f"{path}: no such log; the ranks of that attempt are 0 to {len(list(path.parent.glob('train-*'))) - 1}"
        )
    print(f"{path}:")
    with path.open(encoding="utf-8", errors="replace") as file:
        print("".join(file.readlines()[-options.lines :]), end="")
        while options.follow:
            print(file.read(), end="", flush=True)
            time.sleep(1)
    return 0


def _stop(options: argparse.Namespace) -> int:
    job = newest_job(options.run_folder)
    alive = [one for one in slurm.queued(job_ids(job)) if not one.is_over]
    if not alive:
        raise UserError(
            f"{options.run_folder}: none of its jobs ({', '.join(job_ids(job)) or 'none'}) is waiting or running"
        )
    for one in alive:
        if one.state == "RUNNING" and not options.now:
            slurm.cancel(one.id, "INT")  # what Ctrl-C is: the run saves, and is not started again
            print(f"job {one.id} saves and stops after its step")
        else:
            slurm.cancel(one.id)
            print(f"job {one.id} is cancelled")
    return 0
