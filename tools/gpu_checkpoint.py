"""A checkpoint crosses between CPU and GPU: training goes on elsewhere as if it had never moved.

    python -m tools.gpu_checkpoint [--dry] [--output FILE]

Six steps in fp32 on the CPU are compared with two there, two on the GPU from the checkpoint of the first, and two on the CPU from
that of the GPU; with torch's layers on the GPU, and with Transformer Engine's, whose fused norms and optimizer keep their state
elsewhere. Two steps in each place: the first does not show an optimizer state that was lost. And six steps in bf16 on the GPU,
moments of AdamW in bf16, with the same two interruptions, in both formats of optimizer state. The record has the most memory that
loading, training and saving have taken: what training leaves free must do for the others. `--dry`: all on the CPU.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from internvl_megatron.config.schema import KernelConfig, RunConfig
from internvl_megatron.data.files import write_whole
from internvl_megatron.device import DeviceName
from internvl_megatron.launcher import RankFailedError, launch
from internvl_megatron.ranks import RankInfo
from tools.gpu_curves import CURVES, LearnableStep, curve_config
from tools.gpu_training import TIMEOUT_SECONDS, forget_peak_memory, use_own_cores
from tools.machine_record import is_installed, machine_record

LEG_STEPS, NUM_LEGS = 2, 3
NUM_STEPS = NUM_LEGS * LEG_STEPS
TOLERANCE = 1e-4
"""Relative, of every loss."""
TF32_TOLERANCE = 1e-3
"""The same where Transformer Engine multiplies in fp32, which it does in TF32, with 10 bits of mantissa (a product errs by up to 5e-4;
`tests/gpu/test_transformer_engine.py` takes 0.01 of its layers' gradients)."""

Layers = Literal["torch", "transformer_engine"]


Leg = dict[str, Any]
"""Losses of its steps, and the most memory that each of its stages has taken."""


def leg_rank(info: RankInfo, config: RunConfig, root: str, steps: range, own_format: bool) -> Leg:
    """Body of a rank: take some steps, from the checkpoint of the step before unless that is the first, and save."""
    from internvl_megatron.checkpoint import folders, save_load
    from internvl_megatron.checkpoint.optimizer_layout import optimizer_layout
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
        layout = optimizer_layout(config, groups) if own_format else None
        peaks = {}
        if steps.start:
            forget_peak_memory(device)
            checkpoint = folders.path_of(Path(root), steps.start)
            save_load.load(checkpoint, model, step.optimizer, groups, own_layout=layout)
            peaks["load"] = device.peak_memory_bytes()
        forget_peak_memory(device)
        batches: list[Any] = [LearnableStep(config, number) for number in steps]
        losses = [step.run(batch, number).loss for number, batch in zip(steps, batches, strict=True)]
        peaks["train"] = device.peak_memory_bytes()
        forget_peak_memory(device)
        step.gather_parameters()
        marker = folders.CheckpointInfo(
            steps.stop, 0, 0, str(groups.layout), optimizer_state=True, optimizer_layout=layout
        )
        save_load.save(Path(root), marker, model, step.optimizer, groups, None, keep_last=NUM_LEGS)
        peaks["save"] = device.peak_memory_bytes()
        return {"losses": losses, "peak_memory_bytes": peaks}


@dataclass(frozen=True)
class Journey:
    """Devices in order, a leg on each, and how it is trained there."""

    name: str
    devices: tuple[DeviceName, ...]
    layers: Layers
    """On GPUs; on a CPU they are torch's."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    moments: Literal["fp32", "bf16"] = "fp32"
    tolerance: float = TOLERANCE
    own_format: bool = False
    """Of the optimizer's state: that of the layout."""

    def config(self, device: DeviceName, is_dry: bool) -> RunConfig:
        """Of a leg."""
        config = curve_config(CURVES[0], NUM_STEPS, device, is_dry)
        return replace(
            config,
            dtype=self.dtype,
            kernels=KernelConfig(layers="torch" if device == "cpu" else self.layers),
            optimizer=replace(config.optimizer, moments=self.moments),
        )

    def legs(self, is_dry: bool) -> list[Leg]:
        """One on each device."""
        with tempfile.TemporaryDirectory(prefix="crossing-") as folder:
            return [
                self._leg(device, is_dry, folder, range(number * LEG_STEPS, (number + 1) * LEG_STEPS))
                for number, device in enumerate(self.devices)
            ]

    def uninterrupted(self, is_dry: bool) -> list[float]:
        """Losses of all steps in one go where the first leg is."""
        with tempfile.TemporaryDirectory(prefix="crossing-") as folder:
            return self._leg(self.devices[0], is_dry, folder, range(NUM_STEPS))["losses"]

    def _leg(self, device: DeviceName, is_dry: bool, folder: str, steps: range) -> Leg:
        return launch(leg_rank, 1, self.config(device, is_dry), folder, steps, self.own_format, device=device)[0]


def journeys(is_dry: bool) -> list[Journey]:
    """Those that are possible here."""
    if is_dry:
        dry = Journey("cpu, cpu, cpu", ("cpu", "cpu", "cpu"), "torch")
        return [dry, replace(dry, name=f"{dry.name}, own format", own_format=True)]
    there: tuple[DeviceName, ...] = ("cpu", "cuda", "cpu")
    found = [Journey("cpu, cuda, cpu", there, "torch")]
    if is_installed("transformer_engine"):
        te: Layers = "transformer_engine"
        stays = Journey("cuda, moments in bf16", ("cuda",) * NUM_LEGS, te, "bf16", "bf16", 2e-3)
        found += [
            Journey("cpu, cuda, cpu with Transformer Engine", there, te, tolerance=TF32_TOLERANCE),
            stays,
            replace(stays, name=f"{stays.name}, own format", own_format=True),
        ]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Cross, compare, write the record; 1 if a loss differs or a leg failed."""
    parser = argparse.ArgumentParser(description="A checkpoint crosses between CPU and GPU.")
    parser.add_argument("--dry", action="store_true", help="all on the CPU")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    if options.dry or not is_installed("transformer_engine"):
        why = "needs a GPU" if options.dry else "is not installed"
        print(f"left out: Transformer Engine {why}", flush=True)
    checks, expected = [], {}
    for journey in journeys(options.dry):
        kind = journey.devices[0], journey.dtype
        try:
            if kind not in expected:
                expected[kind] = journey.uninterrupted(options.dry)
            legs = journey.legs(options.dry)
        except RankFailedError as error:
            checks.append({"journey": journey.name, "passed": False, "failure": str(error)})
            continue
        found = [loss for leg in legs for loss in leg["losses"]]
        difference = max(abs(one - two) / abs(one) for one, two in zip(expected[kind], found, strict=True))
        passed = difference <= journey.tolerance
        checks.append(
            {
                "journey": journey.name,
                "passed": passed,
                "difference": difference,
                "losses": found,
                "peak_memory_bytes": [leg["peak_memory_bytes"] for leg in legs],
            }
        )
    uninterrupted = {" ".join(kind): losses for kind, losses in expected.items()}
    record = {"name": "gpu_checkpoint", **machine_record(), "is_dry": options.dry, "checks": checks}
    for check in checks:
        outcome = "passed" if check["passed"] else "FAILED"
        seen = f"{check['difference']:.1e}" if "difference" in check else check["failure"]
        print(f"{outcome}: {check['journey']}: {seen}")
        for number, peaks in enumerate(check.get("peak_memory_bytes", [])):
            print(f"    leg {number + 1}: {', '.join(f'{what} {peak / 1e9:.3f} GB' for what, peak in peaks.items())}")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.output, json.dumps({**record, "uninterrupted": uninterrupted}, indent=1) + "\n")
    return int(not all(check["passed"] for check in checks))


if __name__ == "__main__":
    sys.exit(main())
