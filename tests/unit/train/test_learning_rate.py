"""Learning-rate schedules against transformers' own."""

import itertools
import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.optimization import get_cosine_schedule_with_warmup, get_wsd_schedule

from internvl_megatron.config.optimizer_rules import schedule_problems
from internvl_megatron.config.recipes import find_recipe
from internvl_megatron.config.schema import OptimizerConfig
from internvl_megatron.train.optimizer import learning_rate

STEPS = 50
CONFIG = OptimizerConfig(learning_rate=8e-5, warmup_ratio=0.1)


def rates(config: OptimizerConfig, num_steps: int = STEPS) -> list[float]:
    return [learning_rate(config, step, num_steps) for step in range(num_steps)]


def rates_of_transformers(
    make: Any, rate: float = CONFIG.learning_rate, num_steps: int = STEPS, **settings: Any
) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    schedule, found = make(optimizer, **settings), []
    for _ in range(num_steps):
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


@pytest.mark.parametrize("size", ["38b", "78b"])
def test_a_run_that_stops_within_its_schedule_is_on_the_curve_of_the_whole(size: str) -> None:
    """MPO of the large sizes: step 400 of one epoch, as InternVL3's scripts, whose Trainer knows of the epoch alone, get there."""
    config = find_recipe(f"internvl3_{size}_mpo")
    epoch = math.ceil(300_000 / 512)
    wanted = rates_of_transformers(
        get_cosine_schedule_with_warmup,
        rate=2e-7,
        num_steps=400,
        num_warmup_steps=math.ceil(0.03 * epoch),
        num_training_steps=epoch,
    )
    found = rates(config.optimizer, config.num_steps)
    assert len(found) == 400
    assert found[18:] == pytest.approx(wanted[18:])
    assert found[-1] == pytest.approx(0.24 * 2e-7, rel=0.02), "far from 0 when it stops"


def test_behind_its_schedule_the_rate_stays_at_the_minimum() -> None:
    config = replace(CONFIG, min_learning_rate=1e-6, schedule_steps=30)
    for schedule in ("cosine", "wsd"):
        found = rates(replace(config, schedule=schedule))
        assert found[30:] == [1e-6] * 20, schedule
        assert found[:30] == rates(replace(config, schedule=schedule, schedule_steps=None), 30), schedule
    assert rates(replace(CONFIG, schedule_steps=STEPS)) == rates(CONFIG)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule_steps": 49}, "schedule_steps=49 is below num_steps=50, .*min_learning_rate=0"),
        ({"schedule_steps": 60, "schedule": "constant"}, "a constant learning rate does not fall"),
        ({"schedule_steps": 60, "warmup_ratio": None, "warmup_steps": 50}, "must be below num_steps=50"),
        (
            {"schedule_steps": 40, "min_learning_rate": 1e-6, "warmup_ratio": None, "warmup_steps": 40},
            "must be below optimizer.schedule_steps=40",
        ),
        (
            {"schedule_steps": 60, "schedule": "wsd", "final_decay_ratio": 0.95},
            "6 steps of warm-up and 57 of decay .* more than optimizer.schedule_steps=60",
        ),
    ],
)
def test_schedules_that_lead_nowhere_are_refused(settings: dict[str, Any], message: str) -> None:
    (problem,) = schedule_problems(replace(CONFIG, **settings), STEPS)
    assert re.search(message, problem), problem


def test_schedules_that_do_are_taken() -> None:
    for settings in (
        {"schedule_steps": 60},
        {"schedule_steps": 50},
        {"schedule_steps": 40, "min_learning_rate": 1e-6},
    ):
        assert schedule_problems(replace(CONFIG, **settings), STEPS) == []
