"""MPO under every kind of layout equals transformers' model and written-out formulas in one process."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from internvl_megatron.checkpoint.weight_sums import weights_id
from internvl_megatron.config.schema import DataConfig, KernelConfig, LossConfig, MpoConfig
from internvl_megatron.device import open_device
from internvl_megatron.model.vision_shards import local_shard
from internvl_megatron.parallel.groups import make_groups
from internvl_megatron.ranks import RankInfo, joined
from internvl_megatron.train.preference import MixedPreference
from tests.parallel.conftest import TrainedBy
from tests.support.comparison import expect_same_training
from tests.support.layouts import ADAMW, LAYOUTS, Ranks, Scenario
from tests.support.pair_rows import random_pairs, rows_of
from tests.support.preference_reference import train_preference_reference
from tests.support.rows import MemoryRows
from tests.support.training import Tensors, Trained, make_step, train_scenarios

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
    # Parameters are gathered when the next forward pass needs them: the reference's must not be overwritten.
    "adamw": Scenario(drop_path_rate=0.5, changes={**PAIRS, "optimizer": ADAMW}),
    "adamw_sharded": Scenario(
        drop_path_rate=0.5, changes={**PAIRS, "optimizer": ADAMW}, parallel_changes={"vision_sharding": "sharded"}
    ),
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
COMPARED_WITH_ONE_RANK = {"adamw": ["1", "DP2", "TP2+SPxPP2"], "adamw_sharded": ["DP2"]}
QUICK = {
    *(("pairs", layout) for layout in ("1", "DP2", "CP2", "TP2+SPxPP2")),
    ("before_step", "1"),
    ("by_pair", "1"),
    ("chunks", "TP2+SPxPP2"),
    ("broken", "1"),
    ("sharded", "TP2+SPxPP2"),
    *(("adamw", layout) for layout in ("1", "DP2", "TP2+SPxPP2")),
}
CASES = [
    pytest.param(layout, scenario, marks=[] if (scenario, layout) in QUICK else [pytest.mark.slow])
    for scenario, layouts in LAYOUTS_OF.items()
    for layout in layouts
]


@pytest.fixture(scope="module")
def trained_on_pairs(run_ranks: Callable[..., list[Any]], weights: dict[str, Tensors]) -> TrainedBy:
    @cache
    def train_layout(layout: str, is_quick: bool) -> list[dict[str, Trained]]:
        ranks = LAYOUTS[layout]
        names = [name for name, layouts in (LAYOUTS_OF | COMPARED_WITH_ONE_RANK).items() if layout in layouts]
        wanted = {name: SCENARIOS[name] for name in names if ((name, layout) in QUICK) == is_quick}
        return run_ranks(train_scenarios, ranks.num_ranks, ranks, wanted, weights)

    return lambda layout, scenario: [
        results[scenario] for results in train_layout(layout, (scenario, layout) in QUICK)
    ]


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


@pytest.mark.parametrize(
    ("layout", "scenario"),
    [
        ("DP2", "adamw"),
        ("TP2+SPxPP2", "adamw"),
        pytest.param("DP2", "adamw_sharded", marks=pytest.mark.slow),
    ],
)
def test_training_with_adamw_and_drop_path_equals_one_rank(
    trained_on_pairs: TrainedBy, weights: dict[str, Tensors], layout: str, scenario: str
) -> None:
    one = trained_on_pairs("1", "adamw")
    expect_same_training(trained_on_pairs(layout, scenario), one[0], weights["300m"], LAYOUTS[layout].layout)


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


def losses_of_splits(info: RankInfo, num_replicas: int, weights: Tensors) -> list[list[float]]:
    """Losses and gradient norms of two steps over the same twelve pairs, packed in several ways."""
    torch.set_num_threads(1)
    device = open_device("cpu")
    config = SCENARIOS["pairs"].config(Ranks(num_replicas))
    config = replace(config, data=replace(config.data, tokens_per_row=256, tiles_per_row=32))
    steps = [random_pairs(config.model, 6, seed) for seed in (1, 2)]
    found = []
    with joined(info, device, 60):
        groups = make_groups(Ranks(num_replicas).layout, device, 60)
        for sizes in SPLITS:
            step, _ = make_step(config, weights, groups, device)
            figures = []
            for number, pairs in enumerate(steps):
                left = iter(pairs)
                data = rows_of([[next(left) for _ in range(size)] for size in sizes], config.model, 256)
                own = range(info.rank, len(sizes), num_replicas)
                batch: Any = MemoryRows(data, own, 0, 1)
                result = step.run(batch, number)
                assert result.preference is not None, "it trains on pairs"
                figures += [result.loss, result.grad_norm, result.preference.shift, result.preference.margin]
            found.append(figures)
    return found


SPLITS = ((2, 2, 1, 1), (3, 0, 2, 1), (1, 1, 1, 3))


@pytest.mark.slow
def test_how_pairs_are_packed_and_shared_out_does_not_matter(
    run_ranks: Callable[..., list[Any]], weights: dict[str, Tensors]
) -> None:
    by_replicas = [run_ranks(losses_of_splits, count, count, weights["300m"]) for count in (1, 2)]
    wanted = by_replicas[0][0][0]
    assert abs(wanted[-2]) > 1e-4, "the shift of the second step is not 0"
    for ranks in by_replicas:
        for splits in ranks:
            for figures in splits:
                np.testing.assert_allclose(figures, wanted, rtol=1e-4, atol=1e-7)
                np.testing.assert_allclose(figures[0::4], wanted[0::4], rtol=1e-6, err_msg="losses")


def ids_of_weights(info: RankInfo, ranks: Ranks, sharded: bool, family: str, weights: Tensors) -> list[str]:
    """Of a model, of the same with one value changed, and of its first weights again, which a copy has kept."""
    torch.set_num_threads(1)
    device = open_device("cpu")
    changes = {"vision_sharding": "sharded"} if sharded else {}
    config = Scenario(family=family, changes=PAIRS, parallel_changes=changes).config(ranks)
    with joined(info, device, 60):
        groups = make_groups(ranks.layout, device, 60, ranks.vision_layout)
        step, model = make_step(config, weights, groups, device)
        found = [weights_id(model, groups)]
        for name, parameter in model.named_parameters():
            if name == "vision.encoder.layers.0.mlp.linear_fc1.weight":
                local_shard(parameter.detach()).mul_(2)
        found.append(weights_id(model, groups))
        assert isinstance(step.objective, MixedPreference)
        assert step.objective.reference is not None
        with step.objective.reference():
            found.append(weights_id(model, groups))
        return [*found, weights_id(model, groups)]


@pytest.mark.parametrize("family", ["300m", pytest.param("6b", marks=pytest.mark.slow)])
def test_weights_have_the_same_number_under_every_layout(
    run_ranks: Callable[..., list[Any]], weights: dict[str, Tensors], family: str
) -> None:
    wanted = run_ranks(ids_of_weights, 1, Ranks(1), False, family, weights[family])[0]
    assert wanted[0] == wanted[2], "in the block the model has the copied weights"
    assert wanted[1] == wanted[3], "and after it its own"
    assert wanted[0] != wanted[1]
    cases = [(LAYOUTS["PP2"], False), (LAYOUTS["DP2"], True), (Ranks(2, tensor_size=2, vision_tensor_size=2), False)]
    for ranks, sharded in cases:
        for found in run_ranks(ids_of_weights, ranks.num_ranks, ranks, sharded, family, weights[family]):
            assert found == wanted, ranks
