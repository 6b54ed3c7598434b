"""Critical paths of small cases against sums worked out by hand."""

from math import comb

import numpy as np
import pytest

from internvl_megatron.scaling.bubble_time import BubbleWork
from internvl_megatron.scaling.counts import forward_flops, layer_flops, output_layer_flops, tile_flops
from internvl_megatron.scaling.step_time import (
    RowSizes,
    StepCase,
    WindowWork,
    all_splits,
    best_split,
    counted_steps,
    counted_window,
    critical_paths,
    plan_of_step,
)
from tests.support.models import small_model

MODEL = small_model()
TILE = tile_flops(MODEL)


def rows_of(tiles, tokens=64):
    """Equal rows but for their tiles, [M, D] or [M, D, steps]."""
    counts = np.array(tiles)
    counts = counts if counts.ndim == 3 else counts[..., None]
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
    case = StepCase(MODEL, pipeline_size=2, tensor_size=2, encoders="phases_apart")
    work = counted_window(case, rows_of([[3], [0], [8]]), column(2, 2))
    assert sorted(work.encode[:, 0, 0]) == [2 * TILE, 3 * TILE, 3 * TILE, 3 * TILE]
    assert (work.backprop == 2 * work.encode).all()
    layer = layer_flops(MODEL.language, 64, 900)
    assert (work.forward[0] == 2 * layer / 2).all()
    assert (work.forward[1] == (2 * layer + output_layer_flops(MODEL.language, 10)) / 2).all()


def test_the_first_stage_encodes_row_by_row():
    case = StepCase(MODEL, pipeline_size=2, tensor_size=2, encoders="first_stage", vision_cost=1.5)
    work = counted_window(case, rows_of([[3], [0], [8]]), column(1, 3))
    assert not work.encode.any()
    layer = layer_flops(MODEL.language, 64, 900) / 2
    assert work.forward[0, :, 0, 0, 0].tolist() == [layer + 1.5 * TILE * tiles for tiles in (2, 0, 4)]


def test_replicas_share_tiles_but_not_passes():
    rows = rows_of([[3, 0], [0, 1]])
    shared = counted_window(StepCase(MODEL, 2, 1, "phases_apart"), rows, column(2, 2))
    assert shared.encode[:, 0, 0].tolist() == [TILE] * 4
    own = counted_window(StepCase(MODEL, 2, 1, "first_stage"), rows, column(2, 2))
    layers = 2 * layer_flops(MODEL.language, 64, 900)
    assert own.forward[0, :, :, 0, 0].tolist() == [[layers + 3 * TILE, layers], [layers, layers + TILE]]


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
    decoupled = best_split(StepCase(model, 2, 1, "phases_apart"), rows)
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


def test_no_filled_split_is_better_than_the_best():
    model = small_model(num_layers=10)
    rows = rows_of(np.random.default_rng(0).integers(0, 5, (6, 2, 4)))
    case = StepCase(model, 3, 1, "in_bubbles")
    splits = all_splits(10, 3)
    paths = critical_paths(case, rows, splits).mean(axis=0)
    assert best_split(case, rows) == tuple(splits[:, paths.argmin()].tolist())


def test_all_tiles_are_encoded_somewhere_and_rows_run_once():
    rng = np.random.default_rng(1)
    rows = rows_of(rng.integers(0, 9, (6, 3, 5)))
    case = StepCase(MODEL, 2, 2, "in_bubbles", chunk_tiles=2)
    steps = counted_steps(case, rows, column(2, 2))
    windows = counted_window(case, rows, column(2, 2)).steps()
    for step, (work, window) in enumerate(zip(steps, windows, strict=True)):
        assert isinstance(work, BubbleWork)
        num_tiles = rows.tiles[..., step].sum()
        num_dummies = work.encode.sum() / TILE - num_tiles
        assert 0 <= num_dummies <= 2 * 12  # ranks without a tile in the first or the last chunk
        assert work.encode.max() <= 2 * TILE
        assert (work.backprop == 2 * work.encode).all()
        assert np.sort(work.forward, axis=1).tolist() == np.sort(window.forward, axis=1).tolist()
        assert work.backward.sum() == window.backward.sum()


def test_a_rows_tiles_are_in_the_slot_of_its_passes():
    """Rows of different lengths, of which only the longest has tiles: its replica's pipeline takes it when they are due."""
    tokens, tiles = np.array([[64, 64, 640, 64, 64]]).T[..., None], np.array([[0, 0, 9, 0, 0]]).T[..., None]
    rows = RowSizes(tokens, 10 * tokens, 0 * tokens, tiles)
    (work,) = counted_steps(StepCase(MODEL, 2, 1, "in_bubbles"), rows, column(2, 2))
    assert isinstance(work, BubbleWork)
    (slot,) = set(work.plan.slot_of_chunk.tolist())
    assert work.forward[0, slot, 0, 0] == work.forward.max() > work.forward[0, slot - 1, 0, 0]


@pytest.mark.parametrize(
    ("stages", "tiles"),
    [(4, [[3], [0], [8], [1]]), (1, [[3], [0]]), (2, [[0], [0], [0]])],
    ids=["few rows", "no pipeline", "no tiles"],
)
def test_where_nothing_can_be_filled_phases_are_apart(stages, tiles):
    model, rows = small_model(num_layers=8), rows_of(tiles)
    filled, apart = (StepCase(model, stages, 1, encoders) for encoders in ("in_bubbles", "phases_apart"))
    assert plan_of_step(filled, rows.tiles[..., 0], np.ones(rows.tiles.shape[:2])) is None
    splits = all_splits(8, stages)
    assert critical_paths(filled, rows, splits).tolist() == critical_paths(apart, rows, splits).tolist()


def test_filling_pays():
    """At few tiles to a row every bubble is long enough: what is left of the encoder are its shares of two rows."""
    model = small_model(num_layers=8)
    tokens = 200 * 64
    rows = rows_of(np.full((8, 1, 1), 4), tokens)
    case = StepCase(model, 4, 1, "in_bubbles")
    (path,) = critical_paths(case, rows, column(2, 2, 2, 2))[0]
    (window,) = counted_window(case, rows, column(2, 2, 2, 2)).steps()
    pipeline = WindowWork(0 * window.encode, window.forward, window.backward, 0 * window.backprop).critical_path[0]
    assert path == pytest.approx(pipeline + TILE + 2 * TILE)
    assert path < window.critical_path[0] == pytest.approx(pipeline + 8 * (TILE + 2 * TILE))
