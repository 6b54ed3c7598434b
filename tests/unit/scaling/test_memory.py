"""Memory in closed form against what ranks of large worlds allocate, and against a measurement."""

import pytest

from internvl_megatron.config.plan import plan
from internvl_megatron.config.recipes import RECIPES, RELEASED, fewest_ranks
from internvl_megatron.scaling.counts import parameter_counts
from internvl_megatron.scaling.memory import rank_bytes, stage_parameters
from tools.gpu_cases import Case as GpuCase
from tools.gpu_cases import Way
from tools.recipe_bytes import Case, all_cases

QUICK = {("internvl3_1b_pretrain", 8), ("internvl3_78b_pretrain", 32), ("internvl3_78b_sft", 64)}
CASES = [
    pytest.param(case, marks=[] if (case.name, case.num_ranks) in QUICK else pytest.mark.slow) for case in all_cases()
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.num_ranks}")
def test_every_recipe_builds_on_a_fake_world_and_holds_what_is_foretold(case: Case) -> None:
    """Model and optimizers at full size, as the first rank of the fullest stage, which is the first, and of the last stage."""
    config, made = case.config, case.plan
    held = rank_bytes(config, made)
    built = case.build(stage=0)
    assert built.weights == pytest.approx(held.weights, rel=0.005)
    assert built.gradients == pytest.approx(held.gradients, rel=0.005)
    assert built.optimizer == pytest.approx(held.optimizer, rel=0.01), "shards are not all of the same size"
    counts, last = parameter_counts(config.model), made.layout.pipeline_size - 1
    ranks = config.parallel.vision_shard_ranks or case.num_ranks
    vision = (counts.vision + counts.projector) / (ranks if config.parallel.vision_sharding == "sharded" else 1)
    found = built if last == 0 else case.build(last)
    assert found.parameters == pytest.approx(stage_parameters(config.model, made, last) + vision, rel=0.01)


def test_every_recipe_is_built() -> None:
    """For each stage of training and size, on every number of ranks that a layout is stated for."""
    assert {case.name for case in all_cases()} == set(RECIPES) - {"demo_digits"}
    assert {(case.name, case.num_ranks) for case in all_cases()} >= QUICK
    assert all(
        fewest_ranks(name) in {case.num_ranks for case in all_cases() if case.name == name} for name in RELEASED
    )


def test_the_estimate_is_near_what_was_measured() -> None:
    """One H200, 25 layers of the 8B, rows of 4K: 124.7 GB allocated (benchmarks/results/gpu_check_2026-11-28.json)."""
    case = GpuCase("8B", "bf16", 4096, num_layers=25, way=Way("bf16", "full", 24))
    config = case.config("auto")
    assert rank_bytes(config, plan(config, 1)).total == pytest.approx(124.7e9, rel=0.05)
