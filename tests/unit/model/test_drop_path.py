"""Drop-path draws: right rates, independent of each other, functions of (seed, step, tile, layer, branch) alone."""

import numpy as np

from internvl_megatron.model.drop_path import residual_scale

RATE, LAYERS, TILES = 0.4, 5, 20_000


def draws(**changes: int) -> np.ndarray:
    arguments = {"seed": 42, "step": 3} | changes
    scale = residual_scale(RATE, LAYERS, np.arange(TILES), **arguments)
    assert scale is not None
    return scale


def test_rate_zero_is_none() -> None:
    assert residual_scale(0.0, LAYERS, np.arange(3), seed=0, step=0) is None


def test_rates_grow_linearly_and_the_mean_is_kept() -> None:
    scale = draws()
    assert scale.shape == (LAYERS, 2, TILES)
    assert scale.dtype == np.float32
    for layer, rate in enumerate(np.linspace(0, RATE, LAYERS)):
        for branch in range(2):
            kept = scale[layer, branch] > 0
            deviation = np.sqrt(rate * (1 - rate) / TILES)
            assert abs(kept.mean() - (1 - rate)) <= 4 * deviation + 1e-12, f"layer {layer}, branch {branch}"
            np.testing.assert_allclose(scale[layer, branch][kept], 1 / (1 - rate), rtol=1e-6)


def test_draws_of_layers_branches_steps_seeds_and_neighbours_are_independent() -> None:
    dropped = {"this": draws() == 0, "next step": draws(step=4) == 0, "other seed": draws(seed=43) == 0}
    series = {
        f"{name}, layer {la}, branch {b}": d[la, b]
        for name, d in dropped.items()
        for la in range(1, 5)
        for b in (0, 1)
    }
    series["this, layer 4, branch 0, next tile"] = np.roll(dropped["this"][4, 0], 1)
    names = list(series)
    correlation = np.corrcoef([series[name] for name in names])
    np.fill_diagonal(correlation, 0)
    worst = np.unravel_index(np.abs(correlation).argmax(), correlation.shape)
    assert abs(correlation[worst]) < 5 / np.sqrt(TILES), f"{names[worst[0]]} and {names[worst[1]]}"


def test_a_tiles_draw_does_not_depend_on_the_tiles_beside_it() -> None:
    chosen = np.array([17, 3, 11_000, 3])
    alone = residual_scale(RATE, LAYERS, chosen, seed=42, step=3)
    np.testing.assert_array_equal(alone, draws()[:, :, chosen])
