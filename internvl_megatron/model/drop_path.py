"""Stochastic depth that depends on (seed, step, tile, layer) and on nothing else.

Megatron Core's random state differs between tensor and pipeline ranks; a tile's draw here is the same whichever rank
encodes it, in whichever chunk, and again when its forward pass is run a second time.
"""

import numpy as np


def residual_scale(rate: float, num_layers: int, tile_ids: np.ndarray, seed: int, step: int) -> np.ndarray | None:
    """Factors on the two residual branches of every layer.

    Args:
        rate: drop probability of the last layer; layers grow linearly from 0 (timm's rule, as InternViT uses it).
        tile_ids: int64 [T], numbers of the tiles in the global batch.

    Returns:
        fp32 [num_layers, 2, T]: 0 with the layer's probability p, else 1 / (1 - p); None where the rate is 0.
    """
    if rate == 0.0:
        return None
    rates = np.linspace(0.0, rate, num_layers)[:, None, None]
    layer = np.arange(num_layers, dtype=np.uint64)[:, None, None]
    branch = np.arange(2, dtype=np.uint64)[None, :, None]
    tile = tile_ids.astype(np.uint64)[None, None, :]
    draw = _uniform((np.uint64(seed), np.uint64(step), layer * np.uint64(2) + branch, tile))
    return np.where(draw < rates, 0.0, 1.0 / (1.0 - rates)).astype(np.float32)


def _uniform(keys: tuple[np.ndarray | np.uint64, ...]) -> np.ndarray:
    """Hash broadcastable 64-bit keys to uniform numbers in [0, 1) (splitmix64 over the keys in turn)."""
    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for key in keys:
            state = (state ^ key) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return (np.asarray(state) >> np.uint64(11)).astype(np.float64) / 2.0**53
