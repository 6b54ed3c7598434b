"""A trace written by hand, and what must come out of it."""

from typing import Any

import pytest

from tools.trace_analysis import OUTSIDE, analyse, table


def event(cat: str, name: str, start: float, duration: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": duration, "tid": tid, "args": args}


def launched(name: str, asked: float, start: float, duration: float, number: int) -> list[dict[str, Any]]:
    return [
        event("cuda_runtime", "cudaLaunchKernel", asked, 1, correlation=number),
        event("kernel", name, start, duration, tid=7, correlation=number),
    ]


GPU = [
    event("user_annotation", "profiled steps", 100, 900),
    event("user_annotation", "phase:encode", 110, 100),
    event("user_annotation", "phase:decode", 210, 300),
    event("user_annotation", "phase:backprop", 300, 50),  # inside decode, as the pauses of a pipeline are
    *launched("nvjet_hsh_128x256", 50, 60, 10, 1),  # of a step before
    *launched("nvjet_hsh_128x256", 120, 200, 100, 2),
    *launched("pytorch_flash::flash_fwd_kernel", 220, 300, 50, 3),
    *launched("nvjet_hsh_128x256", 310, 320, 60, 4),  # on another stream, beside the one before
    *launched("vectorized_layer_norm_kernel", 990, 1050, 50, 5),  # ends after the host has gone on
    event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 600, 20),
    event("cpu_op", "aten::mm", 120, 500),  # what the host does is not the GPU's work
    {"ph": "i", "cat": "x", "name": "instant", "ts": 1},
]


def test_kernels_count_in_the_phase_that_launched_them() -> None:
    found = analyse(GPU, num_steps=1)
    assert found["of"] == "GPU kernels"
    assert found["step_seconds"] == pytest.approx(1000e-6)
    seconds = {name: value * 1e6 for name, value in found["seconds_by_category"].items() if value}
    assert seconds == pytest.approx({"gemm": 160, "attention": 50, "norm": 50, "memory": 20})
    phases = {
        phase: {name: value * 1e6 for name, value in parts.items()}
        for phase, parts in found["seconds_by_phase"].items()
    }
    assert phases["encode"] == pytest.approx({"gemm": 100})
    assert phases["decode"] == pytest.approx({"attention": 50})
    assert phases["backprop"] == pytest.approx({"gemm": 60})
    assert phases[OUTSIDE] == pytest.approx({"norm": 50, "memory": 20})
    # Covered: 200 to 380, 600 to 620, 1050 to 1100.
    assert found["idle_seconds"] == pytest.approx((1000 - 180 - 20 - 50) * 1e-6)
    assert found["kernels"][0] == {
        "name": "nvjet_hsh_128x256",
        "category": "gemm",
        "calls": 2,
        "seconds": pytest.approx(160e-6),
    }


def test_seconds_are_of_one_step() -> None:
    one, two = analyse(GPU, 1), analyse(GPU, 2)
    assert two["idle_seconds"] == pytest.approx(one["idle_seconds"] / 2)
    assert two["kernels"][0]["calls"] == 1


def test_operators_count_for_what_none_inside_takes() -> None:
    found = analyse(
        [
            event("user_annotation", "profiled steps", 0, 100),
            event("cpu_op", "aten::linear", 10, 50),
            event("cpu_op", "aten::t", 12, 3),
            event("cpu_op", "aten::mm", 20, 30),
            event("cpu_op", "aten::copy_", 25, 5),
            event("cpu_op", "aten::mul", 30, 10, tid=2),  # another thread's
            event("cpu_op", "aten::mul", 60, 20),
        ],
        num_steps=1,
    )
    own = {kernel["name"]: round(kernel["seconds"] * 1e6) for kernel in found["kernels"]}
    assert own == {"aten::linear": 17, "aten::t": 3, "aten::mm": 25, "aten::copy_": 5, "aten::mul": 30}
    assert found["of"] == "CPU operators"
    assert found["idle_seconds"] == pytest.approx(30e-6)


def test_the_table_names_kinds_phases_and_kernels() -> None:
    text = table(analyse(GPU, 1), num_kernels=1)
    assert "| gemm | 0.16 | 16.0% | 0.10 |" in text
    assert "| nothing ran | 0.75 | 75.0% |" in text
    assert "`nvjet_hsh_128x256`" in text
    assert "flash_fwd" not in text
