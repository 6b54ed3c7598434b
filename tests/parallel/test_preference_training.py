"""MPO under every kind of layout equals transformers' model and written-out formulas in one process."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from internvl_megatron.config.schema import DataConfig, KernelConfig, LossConfig, MpoConfig
from tests.parallel.conftest import TrainedBy
from tests.support.comparison import expect_same_training
from tests.support.layouts import LAYOUTS, Scenario
from tests.support.preference_reference import train_preference_reference
from tests.support.training import Tensors, Trained, train_scenarios

pytestmark = pytest.mark.parallel

# A large beta: rewards that differ from 0 by more than rounding, in the first steps of a small model.
MPO = MpoConfig(beta=0.5)
ROWS = DataConfig(tokens_per_row=96, tiles_per_row=16)
PAIRS: dict[str, Any] = {"loss": LossConfig(kind="mpo"), "mpo": MPO, "data": ROWS, "num_steps": 3}

SCENARIOS = {
    "pairs": Scenario(changes=PAIRS),
    "before_step": Scenario(changes={**PAIRS, "mpo": replace(MPO, shift="before_step")}),
    "by_pair": Scenario(changes={**PAIRS, "loss": LossConfig(kind="mpo", normalize="micro_batch")}),
    "chunks": Scenario(changes={**PAIRS, "kernels": KernelConfig(loss_chunk_tokens=5)}),
    "one_piece": Scenario(changes={**PAIRS, "kernels": KernelConfig(loss_chunk_tokens=None)}),
    "broken": Scenario(changes=PAIRS, broken=frozenset({(1, 0), (3, 0)})),
    "window": Scenario(changes=PAIRS, parallel_changes={"vision_window_rows": 1, "vision_recompute": "full"}),
    "sharded": Scenario(changes=PAIRS, parallel_changes={"vision_sharding": "sharded"}),
    "short": Scenario(changes=PAIRS, parallel_changes={"pad_rows": False}),
    "ring": Scenario(changes={**PAIRS, "data": replace(ROWS, sample_multiple_tokens=4)}),
}
LAYOUTS_OF = {
    "pairs": ["1", "TP2", "PP2", "DP2", "CP2", "TP2+SPxPP2", "TP2+SPxCP2", "PP2xVPP2", "TP2xPP2 first stage"],
    "before_step": ["1", "DP2"],
    "by_pair": ["1", "DP2"],
    "chunks": ["TP2+SPxPP2"],
    "one_piece": ["TP2"],
    "broken": ["1", "DP2"],
    "window": ["PP2"],
    "sharded": ["DP2", "TP2+SPxPP2"],
    "short": ["PP2"],
    "ring": ["CP2 ring"],
}
CASES = [(layout, scenario) for scenario, layouts in LAYOUTS_OF.items() for layout in layouts]


@pytest.fixture(scope="module")
def trained_on_pairs(run_ranks: Callable[..., list[Any]], weights: dict[str, Tensors]) -> TrainedBy:
    @cache
    def train_layout(layout: str) -> list[dict[str, Trained]]:
        ranks = LAYOUTS[layout]
        wanted = {name: SCENARIOS[name] for name, layouts in LAYOUTS_OF.items() if layout in layouts}
        return run_ranks(train_scenarios, ranks.num_ranks, ranks, wanted, weights)

    return lambda layout, scenario: [results[scenario] for results in train_layout(layout)]


@pytest.fixture(scope="module")
def plain() -> Callable[[str], Trained]:
    return cache(lambda scenario: train_preference_reference(SCENARIOS[scenario], LAYOUTS["1"]))


@pytest.mark.parametrize(("layout", "scenario"), CASES)
def test_training_equals_plain_pytorch(
    trained_on_pairs: TrainedBy,
    plain: Callable[[str], Trained],
    weights: dict[str, Tensors],
    layout: str,
    scenario: str,
) -> None:
    found, wanted = trained_on_pairs(layout, scenario), plain(scenario)
    expect_same_training(found, wanted, weights["300m"], LAYOUTS[layout].layout)


def test_the_shift_matters(plain: Callable[[str], Trained]) -> None:
    """The first step is the same: policy and reference agree, all rewards are 0."""
    with_step, before = plain("pairs"), plain("before_step")
    assert with_step.losses[0] == before.losses[0]
    assert abs(with_step.losses[1] - before.losses[1]) > 1e-4


def test_means_over_tokens_and_over_pairs_differ(plain: Callable[[str], Trained]) -> None:
    assert abs(plain("pairs").losses[0] - plain("by_pair").losses[0]) > 1e-3


def test_images_are_encoded_once_a_pass(trained_on_pairs: TrainedBy) -> None:
    """Three passes a step (reference, policy beforehand, training), each over the tiles of the questions."""
    scenario = SCENARIOS["pairs"]
    config = scenario.config(LAYOUTS["1"])
    found = trained_on_pairs("1", "pairs")[0].vision_calls
    tiles = [sum(row.num_tiles for row in scenario.data(config, step).rows) for step in range(config.num_steps)]
    assert min(tiles) > 0, "there are images"
    assert [sum(calls) for calls in found] == [3 * count for count in tiles]
