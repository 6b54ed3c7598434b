"""The checks of `gpu_check.sh` that need numbers: the same losses on GPU and CPU, bf16 near fp32, speed of a 1B model."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from internvl_megatron.device import DeviceName
from internvl_megatron.launcher import launch
from tools.benchmark import benchmark_config, record, run_steps

FP32_STEPS = 5
FP32_TOLERANCE = 1e-4
BF16_STEPS = 50
BF16_TOLERANCE = 0.02
LEARNED_SHARE = 0.9
"""The same batch is trained on again and again: a loss that does not fall proves nothing."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all checks, write the record, exit 1 if one fails."""
    parser = argparse.ArgumentParser(description="Compare GPU with CPU and measure a 1B-shaped model.")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: try the script without a GPU")
    options = parser.parse_args(arguments)
    losses = {}
    runs: list[tuple[str, DeviceName, str, int]] = [
        ("cpu_fp32", "cpu", "fp32", FP32_STEPS),
        ("gpu_fp32", options.device, "fp32", BF16_STEPS),
        ("gpu_bf16", options.device, "bf16", BF16_STEPS),
    ]
    for name, device, dtype, steps in runs:
        config, tiles_per_image = benchmark_config("demo", device, dtype, BF16_STEPS)
        losses[name] = launch(run_steps, 1, config, steps, tiles_per_image, device=device)[0]["losses"]
    fp32 = max(_difference(*pair) for pair in zip(losses["cpu_fp32"], losses["gpu_fp32"], strict=False))
    bf16 = _difference(losses["gpu_fp32"][-1], losses["gpu_bf16"][-1])
    checks = {
        f"{FP32_STEPS} fp32 losses equal the CPU's": (fp32, FP32_TOLERANCE),
        f"bf16 loss after {BF16_STEPS} steps near fp32's": (bf16, BF16_TOLERANCE),
        "share of the fp32 loss left after them": (losses["gpu_fp32"][-1] / losses["gpu_fp32"][0], LEARNED_SHARE),
    }
    config, tiles_per_image = benchmark_config(
        "1b" if options.device == "cuda" else "demo", options.device, "bf16", 13
    )
    speed = launch(run_steps, 1, config, 13, tiles_per_image, device=options.device)[0]
    report = {
        "checks": {
            name: {"value": value, "limit": limit, "passed": value <= limit} for name, (value, limit) in checks.items()
        },
        "speed": record(config.name, config, speed),
        "losses": losses,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    for name, (value, limit) in checks.items():
        print(f"{'passed' if value <= limit else 'FAILED'}: {name}: {value:.2e}, limit {limit:.0e}")
    print(f"{config.name}: {speed['tokens_per_second']:.0f} tokens/s, MFU {speed['mfu']:.1%} on {speed['device']}")
    return 0 if all(value <= limit for value, limit in checks.values()) else 1


def _difference(one: float, other: float) -> float:
    return abs(one - other) / max(abs(one), 1e-12)


if __name__ == "__main__":
    sys.exit(main())
