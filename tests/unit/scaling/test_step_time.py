"""Critical paths of small cases against sums worked out by hand."""

from math import comb

import numpy as np
import pytest

from internvl_megatron.scaling.counts import forward_flops, layer_flops, output_layer_flops, tile_flops
from internvl_megatron.scaling.step_time import (
    RowSizes,
    StepCase,
    WindowWork,
    all_splits,
    best_split,
    counted_window,
)
from tests.support.models import small_model

MODEL = small_model()
TILE = tile_flops(MODEL)


def rows_of(tiles, tokens=64):
    """Equal rows but for their tiles."""
    counts = np.array(tiles)
    return RowSizes(np.full_like(counts, tokens), np.full_like(counts, 900), np.full_like(counts, 10), counts)


def column(*split):
    return np.array(split)[:, None]


def test_phases_follow_one_another_and_wait_for_the_slowest():
    work = WindowWork(
        encode=np.array([1.0, 4.0]),
        forward=np.array([[[2.0, 3.0]]]),  # one stage, one row, two replicas
        backward=np.array([[[5.0, 5.0]]]),
        backprop=np.array([9.0, 7.0]),
    )
    assert work.critical_path == 4.0 + (3.0 + 5.0) + 9.0


def test_parts_add_up_to_the_model():
    total = forward_flops(MODEL, 64, 3, 900)
    layers = 4 * layer_flops(MODEL.language, 64, 900)
    assert total.vision + total.projector == 3 * TILE
    assert total.language == layers + output_layer_flops(MODEL.language, 64)


def test_all_ranks_share_the_tiles_of_a_window():
    case = StepCase(MODEL, pipeline_size=2, tensor_size=2, encoders="all_ranks")
    work = counted_window(case, rows_of([[3], [0], [8]]), column(2, 2))
    assert sorted(work.encode[:, 0]) == [2 * TILE, 3 * TILE, 3 * TILE, 3 * TILE]
    assert (work.backprop == 2 * work.encode).all()
    layer = layer_flops(MODEL.language, 64, 900)
    assert (work.forward[0] == 2 * layer / 2).all()
    assert (work.forward[1] == (2 * layer + output_layer_flops(MODEL.language, 10)) / 2).all()


def test_the_first_stage_encodes_row_by_row():
    case = StepCase(MODEL, pipeline_size=2, tensor_size=2, encoders="first_stage", vision_cost=1.5)
    work = counted_window(case, rows_of([[3], [0], [8]]), column(1, 3))
    assert not work.encode.any()
    layer = layer_flops(MODEL.language, 64, 900) / 2
    assert work.forward[0, :, 0, 0].tolist() == [layer + 1.5 * TILE * tiles for tiles in (2, 0, 4)]


def test_replicas_share_tiles_but_not_passes():
    rows = rows_of([[3, 0], [0, 1]])
    shared = counted_window(StepCase(MODEL, 2, 1, "all_ranks"), rows, column(2, 2))
    assert shared.encode[:, 0].tolist() == [TILE] * 4
    own = counted_window(StepCase(MODEL, 2, 1, "first_stage"), rows, column(2, 2))
    layers = 2 * layer_flops(MODEL.language, 64, 900)
    assert own.forward[0, :, :, 0].tolist() == [[layers + 3 * TILE, layers], [layers, layers + TILE]]


def test_all_splits():
    splits = all_splits(7, 3)
    assert splits.shape == (3, comb(6, 2))
    assert len({tuple(split) for split in splits.T.tolist()}) == splits.shape[1]
    assert (splits.sum(axis=0) == 7).all()
    assert splits.min() == 1
    assert all_splits(5, 1).tolist() == [[5]]


def test_best_split_leaves_room_for_the_encoder():
    model = small_model(num_layers=12)
    rows = rows_of([[4]] * 8)
    tiles_in_layers = 4 * TILE / layer_flops(model.language, 64, 900)
    decoupled = best_split(StepCase(model, 2, 1, "all_ranks"), rows)
    first_stage = best_split(StepCase(model, 2, 1, "first_stage"), rows)
    assert decoupled == (6, 6)
    assert decoupled[0] - first_stage[0] == pytest.approx(tiles_in_layers / 2, abs=1)


def test_no_split_is_better_than_the_best():
    model = small_model(num_layers=10)
    rng = np.random.default_rng(0)
    rows = rows_of(rng.integers(0, 5, (6, 1, 4)))
    case = StepCase(model, 3, 1, "first_stage")
    splits = all_splits(10, 3)
    paths = counted_window(case, rows, splits).critical_path.mean(axis=0)
    assert best_split(case, rows) == tuple(splits[:, paths.argmin()].tolist())
