"""How many replicas share out their tiles: as few as leave all ranks about the same number, seen by drawing rows."""

import json
from pathlib import Path

import numpy as np
import pytest

from internvl_megatron.config.overrides import apply_overrides
from internvl_megatron.config.plan import ACCEPTED_IMBALANCE, TILES_SPREAD, excess_of_busiest, plan
from internvl_megatron.config.recipes import demo_digits, find_recipe

RECORD = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "packing_cpu_2026-11-26.json"
GIVEN = ["data.meta=m.json", "data.tokenizer=t", "checkpoint.load=w"]


def measured_spreads(packing: str, image_share: float) -> list[float]:
    """Standard deviation over mean of the tiles of rows."""
    return [
        one["tiles_of_a_row_std"] / (one["tile_fill"] * one["tiles"])
        for one in json.loads(RECORD.read_text())["fill"]
        if one["algorithm"] == packing and round(one["image_share"], 2) == image_share
    ]


@pytest.mark.parametrize("packing", TILES_SPREAD)
def test_the_spread_of_tiles_is_the_largest_measured_at_half_image_tokens(packing: str) -> None:
    spread = TILES_SPREAD[packing]
    assert max(measured_spreads(packing, 0.5)) == pytest.approx(spread, abs=0.005)
    # Over the encoder's work at half image tokens, the others have no more.
    for share in (0.25, 0.75):
        assert max(measured_spreads(packing, share)) * share / 0.5 <= spread


def drawn_excess(num_groups: int, rows_of_group: int, packing: str) -> float:
    """Of rows with as many tiles as a normal number says, none below 0 and none above the budget of 48; over 400 steps."""
    mean = {"best_fit": 32, "first_fit": 28}[packing]
    rng = np.random.default_rng(0)
    rows = rng.normal(mean, TILES_SPREAD[packing] * mean, (400, num_groups, rows_of_group)).clip(0, 48)
    tiles = rows.sum(axis=2)
    return float((tiles.max(axis=1) / tiles.mean(axis=1)).mean()) - 1


@pytest.mark.parametrize("packing", TILES_SPREAD)
@pytest.mark.parametrize("num_groups", [2, 4, 16, 64])
@pytest.mark.parametrize("rows_of_group", [4, 32, 128])
def test_the_busiest_group_has_what_is_expected(num_groups: int, rows_of_group: int, packing: str) -> None:
    expected = excess_of_busiest(num_groups, rows_of_group, TILES_SPREAD[packing])
    assert drawn_excess(num_groups, rows_of_group, packing) == pytest.approx(expected, rel=0.15)


def test_one_group_is_always_even() -> None:
    assert excess_of_busiest(1, 1, 1.0) == 0


@pytest.mark.parametrize("size", ["1b", "8b", "78b"])
@pytest.mark.parametrize("num_ranks", [64, 512])
def test_groups_of_recipes_are_the_smallest_that_are_even(size: str, num_ranks: int) -> None:
    config = apply_overrides(find_recipe(f"internvl3_{size}_sft", num_ranks), GIVEN)
    made = plan(config, num_ranks)
    window, vision = config.parallel.vision_window_rows, made.vision_layout
    assert window is not None
    rows = vision.exchange_replicas * min(window, made.rows_per_replica)
    assert drawn_excess(vision.num_groups, rows, "best_fit") <= 1.1 * ACCEPTED_IMBALANCE
    if vision.exchange_replicas > 1:
        assert drawn_excess(2 * vision.num_groups, rows // 2, "best_fit") > 0.9 * ACCEPTED_IMBALANCE


def test_groups_of_large_recipes_are_a_part_of_the_run() -> None:
    found = {}
    for size, num_ranks in (("1b", 512), ("8b", 64), ("8b", 512), ("38b", 512), ("78b", 512), ("78b", 1024)):
        made = plan(apply_overrides(find_recipe(f"internvl3_{size}_sft", num_ranks), GIVEN), num_ranks)
        found[size, num_ranks] = num_ranks // made.vision_layout.num_groups
    # Ranks of a group.
    assert found == {
        ("1b", 512): 128,
        ("8b", 64): 32,
        ("8b", 512): 128,
        ("38b", 512): 128,
        ("78b", 512): 128,
        ("78b", 1024): 256,
    }


def test_more_rows_make_smaller_groups_and_a_setting_wins() -> None:
    config = apply_overrides(demo_digits(), ["eval_every_steps=null", "data.eval_meta=null"])
    found = {}
    for rows, data_size in ((2, 1), (64, 8), (4096, 128), (2**17, 128)):
        made = plan(apply_overrides(config, [f"rows_per_step={rows}"]), 4 * data_size)
        found[rows, data_size] = made.vision_layout.exchange_replicas
    assert found == {(2, 1): 1, (64, 8): 4, (4096, 128): 8, (2**17, 128): 1}
    made = plan(apply_overrides(config, ["rows_per_step=64", "parallel.vision_exchange_replicas=2"]), 32)
    assert made.vision_layout.num_groups == 4
    # A window longer than a step is no more rows than the step has.
    long = plan(apply_overrides(config, ["rows_per_step=64", "parallel.vision_window_rows=1024"]), 32)
    assert long.vision_layout.exchange_replicas == found[64, 8]
