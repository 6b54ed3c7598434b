"""Layouts on CPU ranks: the machine's speed is found from what a machine of known speed would measure, and tables say what was off."""

import json
from pathlib import Path
from typing import Any

import pytest

from internvl_megatron.config.plan import plan
from internvl_megatron.scaling.collective_time import LINK_SHARE
from internvl_megatron.scaling.gpus import GpuKind, StepFactors
from internvl_megatron.scaling.kernel_time import Kernels
from internvl_megatron.scaling.predicted_step import predict_step
from tools import cpu_layouts
from tools.cpu_layouts import (
    ALONE,
    ELEMENTWISE_BYTES,
    MESSAGE_BYTES,
    MODEL,
    ROWS_PER_STEP,
    SHAPES,
    TRIALS,
    cpu_kind,
    main,
    predictions,
    table,
    workload,
)

KNOWN = GpuKind(
    "known",
    memory_bytes=0.0,
    bf16_flops=60e9,
    fp8_flops=None,
    memory_bandwidth=8e9,
    machine_bandwidth=1.5e9 / LINK_SHARE,
    network_bandwidth=1e9 / LINK_SHARE,
    source="made up",
    collective_latency_seconds=2e-4,
    message_latency_seconds=3e-4,
    sum_bandwidth=2e9,
    layer_host_seconds=5e-3,
    factors=StepFactors(1.4, 2.0, 0.8),
)


def measured(slower: float = 1.0) -> dict[str, Any]:
    """What a machine of this kind measures; every layout's step, but not that of one rank, takes longer by a factor."""
    config = ALONE.config
    time = predict_step(config, plan(config, 1), workload(), KNOWN)
    trials = {}
    for trial in TRIALS:
        made = plan(trial.config, trial.num_ranks)
        step = predict_step(trial.config, made, workload(), KNOWN).total * slower
        trials[trial.name] = {"num_ranks": trial.num_ranks, "step": step, "all_steps": [step], "quiet_steps": []}
    kernels = Kernels(KNOWN)
    narrow = KNOWN.layer_host_seconds * 3 * MODEL.language.num_layers * ROWS_PER_STEP
    return {
        "kernels": {
            "products": [[*kernels.product(shape)] for shape in SHAPES],
            "elementwise": {name: kernels.elementwise(size, 0).forward for name, size in ELEMENTWISE_BYTES.items()},
        },
        # Of two ranks that gather each sends a half; what is summed is summed after that.
        "messages": {
            "all-gather": [2e-4 + size / 2 / 1.5e9 for size in MESSAGE_BYTES],
            "reduce-scatter": [2e-4 + size / 2 / 1.5e9 + size / 2e9 for size in MESSAGE_BYTES],
            "message": [3e-4 + size / 1e9 for size in MESSAGE_BYTES],
        },
        "alone_narrow": {"decode": narrow},
        "alone": {
            "decode": time.language,
            "encode": time.vision / 3,
            "backprop": time.vision * 2 / 3,
            "update": time.update,
        },
        "trials": trials,
    }


def test_a_machine_of_known_speed_is_found() -> None:
    found = cpu_kind(measured())
    for name in (
        "bf16_flops",
        "memory_bandwidth",
        "machine_bandwidth",
        "network_bandwidth",
        "collective_latency_seconds",
        "message_latency_seconds",
        "sum_bandwidth",
        "layer_host_seconds",
    ):
        assert getattr(found, name) == pytest.approx(getattr(KNOWN, name), rel=1e-6), name
    assert found.factors is not None and KNOWN.factors is not None
    assert vars(found.factors) == pytest.approx(vars(KNOWN.factors))


def test_layouts_are_predicted_from_one_rank_alone() -> None:
    """Whatever layouts were measured to take."""
    found, slower = predictions(measured()), predictions(measured(slower=1.5))
    assert found.keys() == {trial.name for trial in TRIALS}
    assert {name: time.total for name, time in found.items()} == {name: time.total for name, time in slower.items()}
    assert found["TP2+SPxPP2"].total < found["TP2+SP"].total, "four ranks are faster than two"
    assert found["PP2, windows of 2 rows"].pauses > found["PP2"].pauses


def test_the_table_says_how_far_predictions_are_off() -> None:
    assert "median 0.0%, largest 0.0%" in table(measured())
    assert f"Of {len(TRIALS)} steps of layouts 0 were not disturbed" in table(measured())
    text = table(measured(slower=1.25))
    assert "median 20.0%, largest 20.0%" in text
    pairs = int(text.split("Of ")[1].split()[0])
    assert pairs > 20
    assert f"{pairs} are predicted in the right order" in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--rounds", "0"], "--rounds=0"),
        (["--ranks", "4"], "this machine has 2 cores"),
        (["--output", "no/such/folder/record.json"], "no/such/folder is no folder"),
    ],
)
def test_wrong_questions(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_layouts.os, "sched_getaffinity", lambda _: {0, 1})
    assert main(arguments) == 2
    assert named in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parallel
def test_real_steps_are_measured_and_recorded(tmp_path: Path) -> None:
    """Two ranks, once; what a busy machine makes of it is nobody's concern here."""
    file = tmp_path / "layouts.json"
    assert main(["--rounds", "1", "--output", str(file)]) == 0
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["trials"].keys() == {trial.name for trial in TRIALS if trial.num_ranks == 2}
    assert all(trial["step"] > 0 for trial in record["trials"].values())
    assert record["alone"]["decode"] > record["alone"]["update"] > 0
