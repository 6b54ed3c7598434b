"""A sharded vision side trains as plain PyTorch does in one process, whatever it is combined with."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.parallel.conftest import TrainedBy
from tests.parallel.scenarios import SCENARIOS
from tests.support.comparison import expect_equal, expect_same_training
from tests.support.layouts import LAYOUTS, Scenario
from tests.support.training import Tensors, Trained, merge, train_scenarios

pytestmark = pytest.mark.parallel

COMPARED = {
    "300m": ["1", "DP2", "TP2xPP2", "PP2xVPP2xDP2", "TP2+SPxCP2", "PP2xDP2 apart"],
    "6b": ["TP2xPP2"],
    "adamw": ["1", "DP2", "TP2xPP2"],
    "own_ways": ["DP2"],
    "window": ["TP2xPP2"],
    "offload": ["DP2"],
    "small_chunks": ["DP2"],
    "recompute": ["TP2xPP2"],
    "recompute_less": ["DP2"],
    "sparse_images": ["DP2", "TP2xPP2"],
    "frozen_vision": ["DP2"],
    "frozen_vision_side": ["DP2"],
    "projector_only": ["DP2"],
    "frozen_language": ["DP2"],
    "text": ["TP2xPP2"],
    "one_tile": ["TP2xPP2"],
    "no_targets": ["DP2"],
    "vision_overflow": ["TP2xPP2"],
    "adamw_overflow": ["DP2"],
}
"""Scenarios to be compared with the reference, and layouts."""
COPIES = {"300m": ["TP2xPP2"], "adamw": ["PP2xDP2 apart"]}
"""The same with two shards on four ranks, so that there are two copies of each."""
OTHERS = {"bf16": ["DP2"], "drop_path": ["TP2xPP2"], "drop_path_otherwise": ["DP2"], "drop_path_by_layer": ["DP2"]}

SLOW_LAYOUTS = {"TP2+SPxCP2", "PP2xDP2 apart"}
SLOW_SCENARIOS = {
    "6b", "offload", "small_chunks", "recompute", "frozen_vision", "frozen_language", "text",
    "own_ways", "frozen_vision_side", "recompute_less",
    "drop_path_otherwise", "drop_path_by_layer",
}  # fmt: skip
"""The others stand for them where time is short."""


def sharded(name: str, **more: Any) -> Scenario:
    scenario = SCENARIOS[name]
    return replace(scenario, parallel_changes={**scenario.parallel_changes, "vision_sharding": "sharded", **more})


@pytest.fixture(scope="module")
def trained_sharded(run_ranks: Callable[..., list[Any]], weights: dict[str, Tensors]) -> TrainedBy:
    """(layout, scenario) to what every rank saw; "NAME, copies" is a scenario with two shards."""

    @cache
    def train_layout(layout: str, is_slow: bool) -> list[dict[str, Trained]]:
        wanted = {name: sharded(name) for name, layouts in (COMPARED | OTHERS).items() if layout in layouts}
        wanted |= {
            f"{name}, copies": sharded(name, vision_shard_ranks=2)
            for name, layouts in COPIES.items()
            if layout in layouts
        }
        ranks = LAYOUTS[layout]
        wanted = {name: scenario for name, scenario in wanted.items() if (name in SLOW_SCENARIOS) == is_slow}
        return run_ranks(train_scenarios, ranks.num_ranks, ranks, wanted, weights)

    return lambda layout, scenario: [results[scenario] for results in train_layout(layout, scenario in SLOW_SCENARIOS)]


@pytest.fixture(scope="module")
def replicated(run_ranks: Callable[..., list[Any]], weights: dict[str, Tensors]) -> dict[str, Trained]:
    """One rank's replicated vision side, of what has no reference."""
    wanted = {name: SCENARIOS[name] for name in ("bf16", "drop_path")}
    return run_ranks(train_scenarios, 1, LAYOUTS["1"], wanted, weights)[0]


def case(layout: str, name: str, *kind: str) -> Any:
    """Parameters of a test."""
    is_slow = layout in SLOW_LAYOUTS or name in SLOW_SCENARIOS
    return pytest.param(layout, name, *kind, marks=[pytest.mark.slow] if is_slow else [])


CASES = [
    case(layout, name, kind)
    for kind, scenarios in (("", COMPARED), (", copies", COPIES))
    for name, layouts in scenarios.items()
    for layout in layouts
]


@pytest.mark.parametrize(("layout", "scenario", "kind"), CASES)
def test_training_equals_plain_pytorch(
    trained_sharded: TrainedBy,
    reference: Callable[[str, str], Trained],
    weights: dict[str, Tensors],
    layout: str,
    scenario: str,
    kind: str,
) -> None:
    found, start = trained_sharded(layout, scenario + kind), weights[SCENARIOS[scenario].family]
    expect_same_training(found, reference(layout, scenario), start, LAYOUTS[layout].layout)


@pytest.mark.slow
def test_a_step_without_images_never_calls_the_tower(trained_sharded: TrainedBy) -> None:
    assert all(found.vision_calls == [[], []] for found in trained_sharded("TP2xPP2", "text"))


def test_all_ranks_run_the_same_chunks(trained_sharded: TrainedBy) -> None:
    assert all(found.vision_calls == [[1], [1]] for found in trained_sharded("TP2xPP2", "one_tile"))


@pytest.mark.parametrize(("layout", "scenario"), [("TP2xPP2", "vision_overflow"), ("DP2", "adamw_overflow")])
def test_an_overflow_in_one_ranks_shard_updates_nothing(
    trained_sharded: TrainedBy, weights: dict[str, Tensors], layout: str, scenario: str
) -> None:
    ranks = trained_sharded(layout, scenario)
    for found in ranks:
        assert not math.isfinite(found.grad_norms[0]), "every rank sees the overflow of the last"
        assert found.updated == [False, True], "the step is left out and the next one is not"
    expect_equal(merge([found.after_first_step for found in ranks], LAYOUTS[layout].layout), weights["300m"])


def test_without_targets_nothing_changes(trained_sharded: TrainedBy, weights: dict[str, Tensors]) -> None:
    ranks = trained_sharded("DP2", "no_targets")
    assert all(found.updated == [False, False] for found in ranks)
    expect_equal(merge([found.parameters for found in ranks], LAYOUTS["DP2"].layout), weights["300m"])


@pytest.mark.parametrize(("layout", "scenario"), [case(layout, name) for name in OTHERS for layout in OTHERS[name]])
def test_what_has_no_reference_stays_near_the_replicated_one(
    replicated: dict[str, Trained], trained_sharded: TrainedBy, layout: str, scenario: str
) -> None:
    is_bf16 = scenario == "bf16"
    wanted = replicated["bf16" if is_bf16 else "drop_path"]
    for found in trained_sharded(layout, scenario):
        # Replicated bf16 begins from weights rounded to bf16, sharded from fp32 ones.
        np.testing.assert_allclose(found.losses, wanted.losses, rtol=0.01 if is_bf16 else 1e-5)
        np.testing.assert_allclose(found.grad_norms, wanted.grad_norms, rtol=0.05 if is_bf16 else 1e-4)
