"""Rotary positions for V2PE: fp32 cosines and sines from positions in units of 1/256.

V2PE (InternVL3 paper, sec. 2.1, eq. 1-4) moves the position by delta in {1, 1/2 .. 1/256} per image token. Positions
travel as int32 numerators, because bf16 cannot hold 1000 + 1/256 and fp32 stops being exact at 65536 + 1/256.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

POSITION_UNITS = 256
"""Numerators per position: a token at position 49 has numerator 49 * 256."""


@dataclass(frozen=True)
class RotaryTables:
    """Cosines and sines of one packed row, fp32 [S, 1, 1, head_size / 2]."""

    cos: Tensor
    sin: Tensor


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
    angles = angles[:, None, None, :]
    return RotaryTables(cos=angles.cos(), sin=angles.sin())


@cache
def _frequencies(head_size: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i/d), fp32 [d / 2]; always computed on the CPU, whose powers are exact to the last bit but one."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=torch.device("cpu")) / head_size
    return (1.0 / theta**exponents).to(device)


def rotate(x: Tensor, tables: RotaryTables) -> Tensor:
    """Rotate the two halves of every head in fp32 and return the input's dtype; x is [S, B, heads, head_size]."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = (first * tables.cos - second * tables.sin, second * tables.cos + first * tables.sin)
    return torch.cat(rotated, dim=-1).to(x.dtype)
