"""V2PE, variable visual position encoding: image tokens advance by less than 1 (InternVL3 paper, sec. 2.1).

Positions are kept as integers in units of 1/256, exact at any length, where bf16 and even fp32 would round.
"""

from collections.abc import Sequence

import numpy as np

UNITS_PER_POSITION = 256
"""Numerators of one whole position: text advances by this much."""

STRIDES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Steps an image token may take, in units of 1/256 (delta from 1/256 to 1)."""


def draw_stride(rng: np.random.Generator) -> int:
    """One of `STRIDES`, all equally likely."""
    return STRIDES[int(rng.integers(len(STRIDES)))]


def v2pe_numerators(
    length: int, image_starts: Sequence[int], image_lengths: Sequence[int], strides: Sequence[int]
) -> np.ndarray:
    """Positions of one sample's tokens, in units of 1/256, starting at 0.

    Text, `<img>` and `</img>` advance by 1, the context tokens of image i by strides[i]/256. `</img>` comes one whole
    position after the image's last token rounded up, so text is always at whole positions (the published V2PE code).

    Args:
        length: tokens of the sample.
        image_starts: index of each image's first context token, ascending; `<img>` stands before it.
        image_lengths: context tokens of each image.
        strides: step of each image's context tokens, in units of 1/256.

    Returns:
        int32 [length].
    """
    steps = np.full(length, UNITS_PER_POSITION, dtype=np.int64)
    steps[:1] = 0
    end_before = 0
    for start, tokens, stride in zip(image_starts, image_lengths, strides, strict=True):
        end = start + tokens
        assert end_before < start <= end <= length, f"image tokens {start}..{end} do not fit ({end_before}, {length})"
        steps[start:end] = stride
        if end < length:
            steps[end] = UNITS_PER_POSITION + -(stride * tokens) % UNITS_PER_POSITION
        end_before = end
    numerators = np.cumsum(steps)
    assert length == 0 or numerators[-1] <= np.iinfo(np.int32).max, f"{length} tokens overflow int32 positions"
    return numerators.astype(np.int32)
