"""What is measured on a GPU: rows, layers that fit, configurations that a run would accept."""

import numpy as np
import pytest

from internvl_megatron.config.plan import plan
from tools.gpu_cases import (
    KEPT_TILES,
    PRECISIONS,
    SIZES,
    WAYS,
    Case,
    Way,
    benchmark_rows,
    best_way,
    image_token,
    layers_that_fit,
    model_of,
)
from tools.gpu_curves import curve_config, curve_model, curves_here

GIB = 2**30


@pytest.mark.parametrize("is_dry", [False, True])
@pytest.mark.parametrize("tokens_per_row", [4096, 16384])
def test_rows_hold_half_image_tokens_and_v2pe_positions(is_dry: bool, tokens_per_row: int) -> None:
    model = model_of("2B", is_dry)
    rows, placeholder, per_tile = (
        benchmark_rows(model, 4, tokens_per_row),
        image_token(model),
        model.vision.tokens_per_tile,
    )
    share = sum(row.num_tiles for row in rows) * per_tile / sum(row.num_tokens for row in rows)
    assert 0.35 < share < 0.65
    for row in rows:
        assert len(row.token_ids) == tokens_per_row * per_tile // 256
        places = (row.tile_starts[:, None] + np.arange(per_tile)).ravel()
        assert np.flatnonzero(row.token_ids == placeholder).tolist() == places.tolist()
        predicted = np.flatnonzero(row.targets >= 0)
        assert (row.targets[predicted] == row.token_ids[predicted + 1]).all()
        assert (row.positions >= 0).all()
    steps = np.concatenate(
        [np.diff(row.positions)[np.isin(np.arange(len(row.positions) - 1), row.tile_starts)] for row in rows]
    )
    assert len(set(steps.tolist())) > 1, "each image has a step of its own"
    assert (steps < 256).any()


def test_layers_grow_with_memory_and_shrink_with_rows() -> None:
    model = model_of("8B", is_dry=False)
    on_h100, on_h200 = (layers_that_fit(model, 16384, memory * GIB) for memory in (80, 141))
    assert 4 <= on_h100 < on_h200 < 28
    assert layers_that_fit(model, 4096, 80 * GIB) > on_h100
    assert layers_that_fit(model, 4096, 1000 * GIB) == 28
    assert layers_that_fit(model, 4096, GIB) == 1
    assert layers_that_fit(model_of("1B", is_dry=False), 16384, 80 * GIB) == 24


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_cases_are_runs_that_plan_accepts(size, precision) -> None:
    for is_dry in (False, True):
        layers = model_of(size, is_dry).language.num_layers
        for tokens_per_row in (4096, 16384):
            plan(Case(size, precision, tokens_per_row, layers, is_dry=is_dry).config("cpu" if is_dry else "cuda"), 1)


def test_a_whole_model_keeps_its_tiles_before_it_runs_its_encoder_again() -> None:
    model = model_of("8B", is_dry=False)
    assert best_way(model, 4096, 180 * GIB) == (KEPT_TILES, 28)
    assert best_way(model, 4096, 141 * GIB) == (WAYS[-1], 25), (
        "neither fits, and without the encoder's second pass even less"
    )
    for tokens_per_row in (4096, 16384):
        parallel = Case("8B", "bf16", tokens_per_row, 8, way=KEPT_TILES).config("cuda").parallel
        assert (parallel.vision_recompute, parallel.vision_window_rows, parallel.vision_chunk_tiles) == ("none", 1, 16)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize("tokens_per_row", [4096, 16384])
def test_all_ways_are_runs_that_plan_accepts(way: Way, tokens_per_row: int) -> None:
    plan(Case("8B", "fp8_delayed", tokens_per_row, 8, way=way).config("cuda"), 1)


def test_overrides_change_a_case() -> None:
    case = Case("1B", "bf16", 4096, 2, ("parallel.vision_recompute=layer",))
    assert case.config("cuda").parallel.vision_recompute == "layer"
    assert case.config("cuda").model.language.num_layers == 2


@pytest.mark.parametrize("is_dry", [False, True])
def test_curves_are_runs_that_plan_accepts(is_dry: bool) -> None:
    for curve in curves_here(is_dry)[0]:
        plan(curve_config(curve, 10, "cpu" if is_dry else "cuda", is_dry), 1)
    assert curve_model(is_dry).language.hidden_size % 128 == 0
