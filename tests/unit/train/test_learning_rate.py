"""Learning-rate schedules against transformers' own."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.optimization import get_cosine_schedule_with_warmup, get_wsd_schedule

from internvl_megatron.config.schema import OptimizerConfig
from internvl_megatron.train.optimizer import learning_rate

STEPS = 50
CONFIG = OptimizerConfig(learning_rate=8e-5, warmup_ratio=0.1)


def rates(config: OptimizerConfig) -> list[float]:
    return [learning_rate(config, step, STEPS) for step in range(STEPS)]


def rates_of_transformers(make: Any, **settings: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=CONFIG.learning_rate)
    schedule, found = make(optimizer, **settings), []
    for _ in range(STEPS):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def test_cosine() -> None:
    wanted = rates_of_transformers(get_cosine_schedule_with_warmup, num_warmup_steps=5, num_training_steps=STEPS)
    found = rates(CONFIG)
    assert found[5:] == pytest.approx(wanted[5:])
    # Theirs spends the first step on a rate of 0.
    assert found[:5] == pytest.approx(wanted[1:6])


def test_warm_up_stable_decay() -> None:
    config = replace(CONFIG, schedule="wsd", final_decay_ratio=0.2, min_learning_rate=0.1 * CONFIG.learning_rate)
    wanted = rates_of_transformers(
        get_wsd_schedule,
        num_warmup_steps=5,
        num_stable_steps=35,
        num_decay_steps=10,
        decay_type="linear",
        min_lr_ratio=0.1,
    )
    found = rates(config)
    assert found[5:] == pytest.approx(wanted[5:])
    assert found[:5] == pytest.approx([config.learning_rate * share for share in (0.2, 0.4, 0.6, 0.8, 1.0)])
    assert found[4:41] == [config.learning_rate] * 37
    assert all(before > after for before, after in itertools.pairwise(found[40:]))


def test_constant_and_no_warm_up() -> None:
    assert rates(replace(CONFIG, schedule="constant", warmup_ratio=None)) == [8e-5] * STEPS
    assert rates(replace(CONFIG, schedule="constant"))[4:] == [8e-5] * (STEPS - 4)


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_warm_up_in_steps_is_that_by_ratio(schedule: Any) -> None:
    by_ratio = replace(CONFIG, schedule=schedule, warmup_ratio=0.13)
    assert rates(replace(by_ratio, warmup_ratio=None, warmup_steps=7)) == rates(by_ratio)
    assert rates(replace(by_ratio, warmup_ratio=None, warmup_steps=8)) != rates(by_ratio)
