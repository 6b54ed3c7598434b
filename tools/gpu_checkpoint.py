"""A checkpoint crosses between CPU and GPU: training goes on elsewhere as if it had never moved.

    python -m tools.gpu_checkpoint [--dry] [--output FILE]

Six steps in fp32 on the CPU are compared with two there, two on the GPU from the checkpoint of the first, and two on the CPU from
that of the GPU; with torch's layers on the GPU, and with Transformer Engine's, whose fused norms and optimizer keep their state
elsewhere. Two steps in each place: the first does not show an optimizer state that was lost. `--dry`: all on the CPU.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from internvl_megatron.config.schema import KernelConfig, RunConfig
from internvl_megatron.data.files import write_whole
from internvl_megatron.device import DeviceName
from internvl_megatron.launcher import RankFailedError, launch
from internvl_megatron.ranks import RankInfo
from tools.gpu_curves import CURVES, LearnableStep, curve_config
from tools.gpu_training import TIMEOUT_SECONDS, use_own_cores
from tools.machine_record import is_installed, machine_record

LEG_STEPS, NUM_LEGS = 2, 3
NUM_STEPS = NUM_LEGS * LEG_STEPS
TOLERANCE = 1e-4
"""Relative, of every loss."""

Layers = Literal["torch", "transformer_engine"]


def leg_rank(info: RankInfo, config: RunConfig, root: str, steps: range) -> list[float]:
    """Body of a rank: take some steps, from the checkpoint of the step before unless that is the first, and save."""
    from internvl_megatron.checkpoint import folders, save_load
    from internvl_megatron.device import open_device
    from internvl_megatron.logs import configure_logging
    from internvl_megatron.model.build import build_model
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.parallel.layout import Layout
    from internvl_megatron.ranks import joined
    from internvl_megatron.train.step import Step

    configure_logging(info.rank)
    use_own_cores()
    device = open_device(config.device, info.local_rank)
    with joined(info, device, TIMEOUT_SECONDS):
        groups = make_groups(Layout(1, 1, 1), device, TIMEOUT_SECONDS)
        model = build_model(config, groups, device)
        step = Step(config, model, groups, device)
        if steps.start:
            save_load.load(folders.path_of(Path(root), steps.start), model, step.optimizer, groups)
        batches: list[Any] = [LearnableStep(config, number) for number in steps]
        losses = [step.run(batch, number).loss for number, batch in zip(steps, batches, strict=True)]
        step.gather_parameters()
        marker = folders.CheckpointInfo(steps.stop, 0, 0, str(groups.layout), optimizer_state=True)
        save_load.save(Path(root), marker, model, step.optimizer, groups, None, keep_last=NUM_LEGS)
        return losses


def crossing(devices: Sequence[DeviceName], layers: Layers, is_dry: bool) -> list[float]:
    """Losses of all steps, a leg on each of the devices; Transformer Engine's layers on GPUs alone."""
    losses = []
    with tempfile.TemporaryDirectory(prefix="crossing-") as folder:
        for number, device in enumerate(devices):
            config = curve_config(CURVES[0], NUM_STEPS, device, is_dry)
            config = replace(config, kernels=KernelConfig(layers="torch" if device == "cpu" else layers))
            steps = range(number * LEG_STEPS, (number + 1) * LEG_STEPS)
            losses += launch(leg_rank, 1, config, folder, steps, device=device)[0]
    return losses


def uninterrupted(is_dry: bool) -> list[float]:
    """All steps in one go on the CPU."""
    config = curve_config(CURVES[0], NUM_STEPS, "cpu", is_dry)
    with tempfile.TemporaryDirectory(prefix="crossing-") as folder:
        return launch(leg_rank, 1, config, folder, range(NUM_STEPS), device="cpu")[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Cross, compare, write the record; 1 if a loss differs or a leg failed."""
    parser = argparse.ArgumentParser(description="A checkpoint crosses between CPU and GPU.")
    parser.add_argument("--dry", action="store_true", help="all on the CPU")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    other: DeviceName = "cpu" if options.dry else "cuda"
    kinds: list[Layers] = ["torch"]
    if not options.dry and is_installed("transformer_engine"):
        kinds.append("transformer_engine")
    else:
        print("left out: transformer_engine: " + ("needs a GPU" if options.dry else "is not installed"), flush=True)
    expected, checks = uninterrupted(options.dry), []
    for layers in kinds:
        try:
            found = crossing(("cpu", other, "cpu"), layers, options.dry)
        except RankFailedError as error:
            checks.append({"layers": layers, "passed": False, "failure": str(error)})
            continue
        difference = max(abs(one - two) / abs(one) for one, two in zip(expected, found, strict=True))
        checks.append({"layers": layers, "passed": difference <= TOLERANCE, "difference": difference, "losses": found})
    record = {"name": "gpu_checkpoint", **machine_record(), "is_dry": options.dry, "checks": checks}
    for check in checks:
        outcome = "passed" if check["passed"] else "FAILED"
        seen = f"{check['difference']:.1e}" if "difference" in check else check["failure"]
        print(f"{outcome}: cpu, {other}, cpu with layers of {check['layers']}: {seen}, limit {TOLERANCE:.0e}")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.output, json.dumps({**record, "uninterrupted": expected}, indent=1) + "\n")
    return int(not all(check["passed"] for check in checks))


if __name__ == "__main__":
    sys.exit(main())
