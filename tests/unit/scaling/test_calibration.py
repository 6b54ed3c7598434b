"""The cost model on published runs it has not seen."""

import math
from dataclasses import replace

import pytest

from internvl_megatron.scaling.calibration import (
    errors_of,
    factor_of,
    fit_factor,
    leave_one_out,
    lines,
    predicted_seconds,
)
from internvl_megatron.scaling.published_runs import LLAMA, PUBLISHED, SURVEYED

LINES = lines()


def test_the_factor_is_found() -> None:
    assert fit_factor(lambda factor: [math.log(factor / 1.7)]) == pytest.approx(1.7, rel=1e-4)
    runs = LINES["Bridge 26.02", "fp8"]
    slower = [replace(run, step_seconds=predicted_seconds(run, 1.3)) for run in runs]
    assert factor_of(slower) == pytest.approx(1.3, rel=1e-3)


def test_a_row_has_no_say_in_its_own_prediction() -> None:
    runs = LINES["Bridge 26.02", "fp8"]
    odd = [replace(runs[0], step_seconds=2 * runs[0].step_seconds), *runs[1:]]
    assert leave_one_out(odd)[0].without_row == leave_one_out(runs)[0].without_row
    assert leave_one_out(odd)[1].without_row > leave_one_out(runs)[1].without_row


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_rows_of_a_line_are_predicted_by_the_others(precision: str) -> None:
    """The target: median at most 10 %, none above 20 %."""
    runs = LINES["dgxc 25.02", precision]
    assert len(runs) == 21
    middle, largest = errors_of([one.row_error for one in leave_one_out(runs)])
    assert middle <= 0.10
    assert largest <= 0.20


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_the_survey_s_rows_alone_are_predicted_by_each_other(precision: str) -> None:
    """Five rows of four kinds, the same target."""
    runs = [run for run in LINES["dgxc 25.02", precision] if (run.group, run.layout.world_size) in SURVEYED]
    assert len(runs) == len(SURVEYED)
    middle, largest = errors_of([one.row_error for one in leave_one_out(runs)])
    assert middle <= 0.10
    assert largest <= 0.20


def test_speeds_are_those_of_the_sources() -> None:
    """Tokens per second and GPU, as the survey of peers has them."""
    found = {
        (run.group, run.layout.world_size, run.precision): run.tokens_per_second
        for run in PUBLISHED
        if run.line == "dgxc 25.02"
    }
    for key, speed in {
        ("70B pretrain", 64, "bf16"): 1121,
        ("70B pretrain", 2048, "bf16"): 1104,
        ("70B pretrain", 64, "fp8"): 1567,
        ("70B pretrain", 2048, "fp8"): 1491,
        ("70B sft", 32, "bf16"): 1219,
        ("405B pretrain", 576, "bf16"): 205,
    }.items():
        assert found[key] == pytest.approx(speed, rel=0.003)


def test_layers_of_published_layouts_add_up() -> None:
    for run in PUBLISHED:
        assert sum(run.run.stage_layers) == LLAMA[run.model].num_layers
        assert len(run.run.stage_layers) == run.layout.pipeline_size * run.layout.virtual_size
        assert run.rows_per_step % run.layout.data_size == 0
