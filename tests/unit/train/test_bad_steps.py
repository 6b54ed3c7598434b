"""Which steps are bad, and what follows."""

import math

import pytest

from internvl_megatron.config.schema import BadStepConfig
from internvl_megatron.train.bad_steps import BadSteps

QUIET = [2.0, 2.1, 1.9, 2.0]
SPIKES = BadStepConfig(on_spike="skip", spike_window_steps=4, spike_factor=6.0, num_bad_steps=3)


@pytest.mark.parametrize(("loss", "grad_norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_is_bad_and_not_remembered(loss: float, grad_norm: float) -> None:
    steps = BadSteps(BadStepConfig(on_nonfinite="skip"))
    found = steps.judge(loss, grad_norm)
    assert found is not None and (found.kind, found.action) == ("nonfinite", "skip")
    assert steps.num_bad == 1 and steps.recent_losses == []
    assert steps.judge(2.0, 1.0) is None


def test_a_spike_is_told_from_noise_by_the_steps_before() -> None:
    steps = BadSteps(SPIKES)
    for loss in [*QUIET[:3], 50.0]:  # too few steps to tell
        assert steps.judge(loss, 1.0) is None
    steps.continue_from(QUIET)
    deviation = 0.0707  # of QUIET, by hand: sqrt((0 + 0.01 + 0.01 + 0) / 4)
    assert steps.judge(2.0 + 5.9 * deviation, 1.0) is None
    steps.continue_from(QUIET)
    found = steps.judge(2.0 + 6.1 * deviation, 1.0)
    assert found is not None and found.kind == "spike"
    assert "loss 2.4313 after a mean of 2.0000" in found.reason
    assert steps.recent_losses == QUIET, "a spike does not raise the mean it is compared with"


def test_a_run_at_rest_has_no_spikes_of_rounding() -> None:
    steps = BadSteps(SPIKES)
    steps.continue_from([1.0] * 4)
    assert steps.judge(1.001, 1.0) is None


def test_spikes_are_ignored_unless_asked_for() -> None:
    steps = BadSteps(BadStepConfig(spike_window_steps=4))
    steps.continue_from(QUIET)
    assert steps.judge(1e6, 1.0) is None


def test_too_many_in_a_row_stop_the_run() -> None:
    steps = BadSteps(SPIKES)
    for bad in (1, 1, 0, 1, 1):
        found = steps.judge(math.nan if bad else 2.0, 1.0)
        assert (found is not None) == bool(bad)
        assert found is None or found.action == "skip"
    found = steps.judge(math.nan, 1.0)
    assert found is not None and found.action == "stop" and "3 bad steps in a row" in found.reason
    assert steps.num_bad == 5


def test_rewinds_are_counted_and_end() -> None:
    steps = BadSteps(BadStepConfig(on_nonfinite="rewind", num_rewinds=2))
    actions = []
    for _ in range(3):
        found = steps.judge(math.nan, 1.0)
        assert found is not None and steps.judge(1.0, 1.0) is None
        actions.append(found.action)
    assert actions == ["rewind", "rewind", "stop"]
    assert steps.num_rewinds == 2
