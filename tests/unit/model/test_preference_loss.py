"""The terms of MPO against numbers worked out by hand and plain formulas."""

import math

import numpy as np
import pytest
import torch

from internvl_megatron.model.preference_loss import (
    Rewards,
    RunningMean,
    implicit_rewards,
    preference_losses,
    quality_losses,
)

BETA = 0.1


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_rewards_are_beta_times_the_log_ratio() -> None:
    logprobs = torch.tensor([-10.0, -30.0, -5.0, -7.0], dtype=torch.float64)
    reference = torch.tensor([-15.0, -20.0, -5.0, -9.0], dtype=torch.float64)
    rewards = implicit_rewards(logprobs, reference, BETA)
    np.testing.assert_allclose(rewards.chosen.numpy(), [0.5, 0.0], atol=1e-15)
    np.testing.assert_allclose(rewards.rejected.numpy(), [-1.0, 0.2], atol=1e-15)


def test_by_hand() -> None:
    rewards = Rewards(torch.tensor([0.5], dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64))
    # -log sigmoid(1.5) = log(1 + e^-1.5) = log 1.22313 = 0.20141
    assert preference_losses(rewards).item() == pytest.approx(0.2014132779827524, abs=1e-12)
    # shift -0.25: log(1 + e^-0.75) + log(1 + e^-0.75) = 2 * 0.38687
    assert quality_losses(rewards, -0.25).item() == pytest.approx(2 * math.log1p(math.exp(-0.75)), abs=1e-12)


def test_equal_models_give_log_two() -> None:
    """Before the first update policy and reference agree, and the shift is 0."""
    nothing = Rewards(torch.zeros(3), torch.zeros(3))
    np.testing.assert_allclose(preference_losses(nothing).numpy(), math.log(2), rtol=1e-6)
    np.testing.assert_allclose(quality_losses(nothing, RunningMean().value).numpy(), 2 * math.log(2), rtol=1e-6)


def test_losses_and_gradients_equal_the_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs = (-50 * torch.rand(12, generator=generator, dtype=torch.float64)).requires_grad_()
    reference = -50 * torch.rand(12, generator=generator, dtype=torch.float64)
    shift = 0.3
    rewards = implicit_rewards(logprobs, reference, BETA)
    (0.8 * preference_losses(rewards) + 0.2 * quality_losses(rewards, shift)).sum().backward()
    assert logprobs.grad is not None
    ratios = (BETA * (logprobs.detach() - reference)).view(6, 2).tolist()
    for pair, (chosen, rejected) in enumerate(ratios):
        assert preference_losses(rewards)[pair].item() == pytest.approx(
            -math.log(sigmoid(chosen - rejected)), abs=1e-9
        )
        wanted = -math.log(sigmoid(chosen - shift)) - math.log(sigmoid(-(rejected - shift)))
        assert quality_losses(rewards, shift)[pair].item() == pytest.approx(wanted, abs=1e-9)
        # d/dx of -log sigmoid(x) is sigmoid(x) - 1
        lead = 0.8 * (sigmoid(chosen - rejected) - 1)
        gradient = BETA * (lead + 0.2 * (sigmoid(chosen - shift) - 1))
        assert logprobs.grad[2 * pair].item() == pytest.approx(gradient, abs=1e-9)
        gradient = BETA * (-lead + 0.2 * (1 - sigmoid(shift - rejected)))
        assert logprobs.grad[2 * pair + 1].item() == pytest.approx(gradient, abs=1e-9)


def test_large_rewards_stay_finite() -> None:
    rewards = Rewards(torch.tensor([-1e4, 1e4]), torch.tensor([1e4, -1e4]))
    np.testing.assert_allclose(preference_losses(rewards).numpy(), [2e4, 0.0])
    np.testing.assert_allclose(quality_losses(rewards, 0.0).numpy(), [2e4, 0.0])


def test_the_mean_is_trls() -> None:
    """trl's update, `mean += (batch mean - mean) * batch count / count`, a number at a time."""
    numbers = np.random.default_rng(0).normal(size=40)
    mean, count = 0.0, 1e-24  # as trl starts
    running = RunningMean()
    assert running.value == 0
    for number in numbers.tolist():
        mean += (number - mean) / (count + 1)
        count += 1
        running = running.including(number, 1)
        assert running.value == pytest.approx(mean, abs=1e-12)
    together = RunningMean().including(float(numbers.sum()), len(numbers))
    assert together.value == pytest.approx(running.value, abs=1e-12), "however the numbers come in"
