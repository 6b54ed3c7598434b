"""Rotary positions for V2PE: fp32 cosines and sines from positions in units of 1/256.

V2PE (InternVL3 paper, sec. 2.1, eq. 1-4) moves the position by delta in {1, 1/2 .. 1/256} per image token. Positions
travel as int32 numerators, because bf16 cannot hold 1000 + 1/256 and fp32 stops being exact at 65536 + 1/256.
"""

from functools import cache, cached_property

import torch
from torch import Tensor

POSITION_UNITS = 256
"""Numerators per position: a token at position 49 has numerator 49 * 256."""


class RotaryTables:
    """Angles of one packed row, in the form that the kernel of its layers takes: made for the first layer, kept for the others.

    The angles themselves go when that is done: several rows are under way in a pipeline, each with its tables.
    """

    def __init__(self, angles: Tensor) -> None:
        """Take the angles, fp32 [S, 1, 1, head_size / 2], radians."""
        self._angles: Tensor | None = angles

    @cached_property
    def cos_and_sin(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines, like the angles."""
        angles = self._take()
        return angles.cos(), angles.sin()

    @cached_property
    def of_both_halves(self) -> Tensor:
        """The angles of a whole head, fp32 [S, 1, 1, head_size], as fused kernels want them."""
        angles = self._take()
        return torch.cat([angles, angles], dim=-1)

    def _take(self) -> Tensor:
        assert self._angles is not None, "all layers of a row are rotated by the same kernel"
        angles, self._angles = self._angles, None
        return angles


def rotary_tables(numerators: Tensor, head_size: int, theta: float) -> RotaryTables:
    """Angles position * theta^(-2i/d) in fp32.

    Args:
        numerators: int32 [S], positions in units of 1/256.
        head_size: d, the size of an attention head.
        theta: base of the rotary frequencies.
    """
    frequencies = _frequencies(head_size, theta, numerators.device)
    # Whole and fractional part apart: each is exact in fp32, their sum would not be beyond position 65535.
    whole = torch.div(numerators, POSITION_UNITS, rounding_mode="floor").float()
    fraction = torch.remainder(numerators, POSITION_UNITS).float() / POSITION_UNITS
    angles = torch.outer(whole, frequencies) + torch.outer(fraction, frequencies)
    return RotaryTables(angles[:, None, None, :])


@cache
def _frequencies(head_size: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i/d), fp32 [d / 2]; always computed on the CPU, whose powers are exact to the last bit but one."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=torch.device("cpu")) / head_size
    return (1.0 / theta**exponents).to(device)


def rotate(x: Tensor, tables: RotaryTables, fused: bool = False) -> Tensor:
    """Rotate the two halves of every head in fp32.

    Args:
        x: [S, B, heads, head_size].
        tables: of the S tokens.
        fused: by Transformer Engine's kernel, on a GPU. It takes angles and knows nothing of positions, so that V2PE's
            fractions are as good to it as whole ones.

    Returns:
        [S, B, heads, head_size] in the input's dtype.
    """
    if fused:
        from transformer_engine.pytorch.attention.rope import (  # pyright: ignore[reportMissingImports]
            apply_rotary_pos_emb,
        )

        return apply_rotary_pos_emb(x, tables.of_both_halves, tensor_format="sbhd", fused=True)
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = tables.cos_and_sin
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(rotated, dim=-1).to(x.dtype)
