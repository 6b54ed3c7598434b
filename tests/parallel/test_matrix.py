"""Every layout equals one rank, step by step: all ways to split the language model x all layouts of the vision encoder.

Eight narrow layers, twice as many micro-batches as stages, five steps of 1, 3, 0, 2 chunks and one in which a replica has no
image, drop path and random V2PE strides. One rank of our own code is the reference; without drop path it equals plain
PyTorch. The default cases are few, but every two values that can go together meet in one of them.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from tests.support.comparison import expect_close, expect_same_training
from tests.support.layouts import Ranks
from tests.support.matrix import (
    CHUNKS_OF_STEPS,
    FACTORS,
    TILES_OF_STEPS,
    MatrixScenario,
    default_cases,
    matrix_model,
    matrix_rows,
    more_cases,
    name_of,
    num_rows,
    ranks_of,
    scenario_of,
    valid_cases,
)
from tests.support.models import huggingface_model
from tests.support.pairs import Case, pairs_of
from tests.support.reference import our_tensors, train_reference
from tests.support.training import Tensors, Trained, merge, train_scenarios
from tests.support.vision_shards import whole_vision

pytestmark = pytest.mark.parallel

Run = Callable[..., list[Any]]


def by_layout(cases: list[Case]) -> list[Case]:
    """Cases of one layout, which are trained in one launch, beside each other; small layouts first."""
    return sorted(cases, key=lambda case: (ranks_of(case).num_ranks, str(ranks_of(case))))


DEFAULT = by_layout(default_cases())
MORE = by_layout(more_cases())


@pytest.fixture(scope="module")
def start() -> Tensors:
    """Full parameters before training."""
    model = matrix_model()
    return our_tensors(huggingface_model(model).state_dict(), model)


@pytest.fixture(scope="module")
def one_rank(run_ranks: Run, start: Tensors) -> Callable[[MatrixScenario], Trained]:
    @cache
    def train(rows: int, trained: str, drop_path_rate: float) -> Trained:
        scenario = MatrixScenario(num_rows=rows, trained=trained, drop_path_rate=drop_path_rate)
        return run_ranks(train_scenarios, 1, Ranks(1), {"": scenario}, {scenario.family: start})[0][""]

    return lambda scenario: train(scenario.num_rows, scenario.trained, scenario.drop_path_rate)


@pytest.fixture(scope="module")
def trained(run_ranks: Run, start: Tensors) -> Callable[[Case], list[Trained]]:
    # Cases of a layout follow each other: only the last layout's results are kept.
    @lru_cache(maxsize=1)
    def train_layout(ranks: Ranks, is_default: bool) -> list[dict[str, Trained]]:
        cases = [case for case in (DEFAULT if is_default else MORE) if ranks_of(case) == ranks]
        scenarios = {name_of(case): scenario_of(case) for case in cases}
        return run_ranks(train_scenarios, ranks.num_ranks, ranks, scenarios, {MatrixScenario.family: start})

    return lambda case: [results[name_of(case)] for results in train_layout(ranks_of(case), case in DEFAULT)]


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=name_of(case)) for case in DEFAULT),
        *(pytest.param(case, id=name_of(case), marks=pytest.mark.slow) for case in MORE),
    ],
)
def test_every_layout_equals_one_rank(
    trained: Callable[[Case], list[Trained]],
    one_rank: Callable[[MatrixScenario], Trained],
    start: Tensors,
    case: Case,
) -> None:
    ranks, scenario = ranks_of(case), scenario_of(case)
    found, wanted = trained(case), one_rank(scenario)
    for trained_rank in found:
        check_chunks(case, trained_rank.vision_calls)
    vision = matrix_model().vision
    steps = [[rank.gradients_of_steps[step] for rank in found] for step in range(len(TILES_OF_STEPS))]
    for shards in (*steps, [rank.gradients for rank in found], [rank.parameters for rank in found]):
        whole = whole_vision(shards, ranks.vision_layout, vision)
        for tensors in shards:
            tensors |= whole
    expect_same_training(found, wanted, start, ranks.layout)
    for step, shards in enumerate(steps):
        gradients = merge(shards, ranks.layout)
        expect_close(gradients, wanted.gradients_of_steps[step], f"gradients of step {step}")


def check_chunks(case: Case, calls: list[list[int]]) -> None:
    """Every rank runs as many chunks as the step was made for; an encoder inside the pipeline runs when rows have images."""
    counts = [len(chunks) for chunks in calls]
    if case["vision"] == "first stage":
        assert counts[TILES_OF_STEPS.index(0)] == 0
        return
    has_pauses = case["pipeline"] != "PP1" and case["virtual"] == "VPP1" and case["vision"] != "sharded"
    if has_pauses and scenario_of(case).parallel_changes["vision_in_bubbles"]:
        # Chunks hold tiles of one row there, which `test_no_layout_hangs.py` looks at.
        assert [count > 0 for count in counts] == [number > 0 for number in CHUNKS_OF_STEPS]
        return
    apart = case["vision"] in ("apart", "colocated") and case["data"] == "DP2"
    passes = 2 if case["recompute"] == "full" else 1
    assert counts == [passes * number for number in (*CHUNKS_OF_STEPS[:-1], 2 if apart else CHUNKS_OF_STEPS[-1])]


def test_one_rank_equals_plain_pytorch(one_rank: Callable[[MatrixScenario], Trained], start: Tensors) -> None:
    scenario = MatrixScenario(num_rows=4, drop_path_rate=0.0)
    expect_same_training([one_rank(scenario)], train_reference(scenario, Ranks(1)), start, Ranks(1).layout)


def test_drop_path_drops(one_rank: Callable[[MatrixScenario], Trained]) -> None:
    losses, plain = (one_rank(MatrixScenario(num_rows=4, drop_path_rate=rate)).losses for rate in (0.3, 0.0))
    differing = [abs(one - other) > 1e-4 for one, other in zip(losses, plain, strict=True)]
    assert differing[0], "the first step has images, and the same parameters"


def test_every_two_values_meet_in_a_default_case() -> None:
    """All but those that exclude each other, which are written down here."""
    never = {
        frozenset(pair)
        for pair in [
            ("PP1", "VPP2"),
            ("DP1", "apart"),
            ("full", "first stage"),
            *(("colocated", other) for other in ("TP1", "CP2", "CP2 ring", "PP2", "PP4", "VPP2")),
        ]
    }
    wanted = {
        frozenset((one, other))
        for (_, ones), (_, others) in combinations(FACTORS.items(), 2)
        for one in ones
        for other in others
    }
    met = {frozenset((one, other)) for case in DEFAULT for _, one, _, other in pairs_of(case)}
    assert met == wanted - never


def test_the_slow_cases_are_the_rest() -> None:
    """Every layout of the language model x layout of the encoder x recomputation, once."""
    factors = [factor for factor in FACTORS if factor not in ("trained", "overlap")]
    layouts = [tuple(case[factor] for factor in factors) for case in MORE]
    assert len(set(layouts)) == len(layouts)
    default = {tuple(case[factor] for factor in factors) for case in DEFAULT}
    assert default.isdisjoint(layouts)
    assert default.union(layouts) == {tuple(case[factor] for factor in factors) for case in valid_cases()}
    assert {pair for case in MORE for pair in pairs_of(case)} == {p for case in valid_cases() for p in pairs_of(case)}


@pytest.mark.parametrize("rows", sorted({num_rows(ranks_of(case)) for case in DEFAULT}))
def test_the_rows_hold_what_the_matrix_is_about(rows: int) -> None:
    model = matrix_model()
    steps = [matrix_rows(rows, step).rows for step in range(len(TILES_OF_STEPS))]
    assert [sum(row.num_tiles for row in step) for step in steps] == list(TILES_OF_STEPS)
    for step in steps[:-1]:
        assert sum(row.num_tiles for row in step[::2]) == sum(row.num_tiles for row in step[1::2]), "for two replicas"
    assert not any(row.num_tiles for row in steps[-1][1::2]), "one of two replicas without an image"
    assert all(any(row.weights.any() for row in step) for step in steps), "something to learn in every step"
    everything = [row for step in steps for row in step]
    assert any((row.positions % 256).any() for row in everything), "V2PE strides below 1"
    places = np.array([start for row in everything for start in row.tile_starts.tolist()])
    parts = len(everything[0].token_ids) // 4
    cut = places // parts != (places + model.vision.tokens_per_tile - 1) // parts
    assert cut.any(), "tiles across the slices of context and sequence parallelism"
