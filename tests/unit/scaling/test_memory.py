"""Memory in closed form against what ranks of large worlds allocate, and against a measurement."""

import pytest

from internvl_megatron.config.plan import plan
from internvl_megatron.config.recipes import RECIPES, RELEASED, fewest_ranks
from internvl_megatron.scaling.counts import parameter_counts
from internvl_megatron.scaling.memory import (
    OTHER_BYTES,
    UNEVEN_IMAGE_TOKENS,
    encoder_bytes,
    first_stage_bytes,
    language_bytes,
    rank_bytes,
    stage_parameters,
)
from tests.unit.scaling.test_predicted_step import REPLICATED, config_of
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


def test_without_a_pipeline_the_encoder_costs_the_same_wherever_it_is() -> None:
    """One stage and one row at a time: the language model's ranks and the encoder's have between them what a rank of both has."""
    one_row = ("parallel.pipeline_size=1", "parallel.stage_layers=null", "parallel.vision_window_rows=1")
    config = config_of("internvl3_8b_pretrain", 64, "parallel.vision_recompute=none", *one_row)
    made = plan(config, 64)
    tiles = -(-config.data.tiles_per_row // made.layout.stage_size)
    both = rank_bytes(config, made).total
    assert language_bytes(config, made) + encoder_bytes(config, 64, tiles) - OTHER_BYTES == pytest.approx(both)
    tokens = config.data.tiles_per_row * config.model.vision.tokens_per_tile
    embeddings = UNEVEN_IMAGE_TOKENS * 2 * tokens * config.model.language.hidden_size / made.layout.stage_size
    assert first_stage_bytes(config, made) == pytest.approx(both - embeddings), "it keeps none"


def test_an_encoder_in_the_first_stage_is_what_that_stage_holds_more() -> None:
    config = config_of("internvl3_78b_pretrain", 256, *REPLICATED, "parallel.vision_recompute=layer")
    made = plan(config, 256)
    more = first_stage_bytes(config, made) - language_bytes(config, made)
    weights_and_gradients = 6 * parameter_counts(config.model).vision
    assert weights_and_gradients < more < 1.6 * weights_and_gradients
    assert encoder_bytes(config, 8, 100) > encoder_bytes(config, 64, 100) > encoder_bytes(config, 64, 10)
