"""Rounding to 8-bit floating point and back: the values a matrix product in FP8 would see, in their own dtype.

Shapes: an operand is [R, C]; a product sums over one of its two dimensions. The scales are those of Transformer Engine 2.20
(`recipe_common.cuh`, `ptx_arch_spec.cuh`, `delayed_scaling.cu`), with its defaults:

    current    one scale, the format's largest number over the tensor's largest magnitude
    delayed    the same, with the largest magnitude of earlier steps (`fp8_history`); larger values saturate
    blockwise  a power of two for every 128 values along the summed dimension, for every 128 x 128 of a weight
    mxfp8      a power of two for every 32 values along the summed dimension, stored as an exponent alone (e8m0)

Values beyond the format's range become its largest number, infinities too. NaN stays NaN and does not count as a magnitude, so
that the joint gradient norm still shows it.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Recipe = Literal["delayed", "current", "blockwise", "mxfp8"]
Kind = Literal["input", "weight", "gradient"]
"""Which of a linear layer's tensors: its input, its weight, or the gradient of its output."""
KINDS: tuple[Kind, ...] = ("input", "weight", "gradient")

BLOCK_SIZE = {"blockwise": 128, "mxfp8": 32}
LARGEST_EXPONENT = 127
"""Of an e8m0 scale; the smallest is its negative."""


def fp8_dtype(recipe: Recipe, kind: Kind) -> torch.dtype:
    """e4m3, but e5m2 for gradients that have one scale: their values are further apart."""
    per_tensor = recipe in ("delayed", "current")
    return torch.float8_e5m2 if per_tensor and kind == "gradient" else torch.float8_e4m3fn


def amax(values: Tensor) -> Tensor:
    """Largest magnitude, fp32 []; NaN does not count."""
    return _magnitudes(values).amax().float()


def rounded(
    values: Tensor, recipe: Recipe, kind: Kind, summed_dim: Literal[0, 1], largest: Tensor | None = None
) -> Tensor:
    """An operand [R, C] after a trip through FP8, in its own dtype (in bf16 the scaled-back values are rounded again).

    Args:
        values: the operand, fp32 or bf16.
        recipe: how values are scaled.
        kind: what the operand is.
        summed_dim: over which of its dimensions the product sums; blocks lie along it. The last one may be shorter.
        largest: fp32 [], the magnitude that becomes the format's largest number (`delayed`); 0 = not known yet, scale 1.
    """
    dtype = fp8_dtype(recipe, kind)
    if recipe == "delayed":
        assert largest is not None, "delayed scaling needs the largest magnitude of earlier steps"
        return _through_fp8(values, _scale(largest, dtype), dtype)
    if recipe == "current":
        return _through_fp8(values, _scale(amax(values), dtype), dtype)
    size = BLOCK_SIZE[recipe]
    square = recipe == "blockwise" and kind == "weight"
    block = (size if square or summed_dim == 0 else 1, size if square or summed_dim == 1 else 1)
    blocks = _in_blocks(values, block)
    largest = _magnitudes(blocks).amax((1, 3), keepdim=True).float()
    if recipe == "blockwise":
        result = _through_fp8(blocks, _power_of_two_scale(largest, dtype, values.dtype), dtype)
    else:
        exponent = _mx_exponent(largest, dtype)
        one = torch.ones_like(largest)
        result = _through_fp8(blocks, torch.ldexp(one, -exponent), dtype, torch.ldexp(one, exponent))
    rows, columns = values.shape
    return result.flatten(2).flatten(0, 1)[:rows, :columns]


def _magnitudes(values: Tensor) -> Tensor:
    return values.abs().nan_to_num_(nan=0.0, posinf=torch.inf)


def _in_blocks(values: Tensor, block: tuple[int, int]) -> Tensor:
    """[R, C] as [R / r, r, C / c, c], filled up with zeros."""
    rows, columns = values.shape
    missing_rows, missing_columns = -rows % block[0], -columns % block[1]
    if missing_rows or missing_columns:
        values = F.pad(values, (0, missing_columns, 0, missing_rows))
    return values.reshape(-1, block[0], values.shape[1] // block[1], block[1])


def _scale(largest: Tensor, dtype: torch.dtype, if_too_large: float = torch.finfo(torch.float32).max) -> Tensor:
    """What values are multiplied with so that the largest fills the format; 1 where there is none, or an infinite one."""
    # Not `number / tensor`, which torch makes `tensor.reciprocal() * number`: rounded twice, it misses exact powers of two.
    scale = torch.full_like(largest, torch.finfo(dtype).max) / largest
    scale = torch.where(scale.isinf(), if_too_large, scale)
    return torch.where((largest > 0) & largest.isfinite(), scale, 1.0)


def _power_of_two_scale(largest: Tensor, dtype: torch.dtype, values_dtype: torch.dtype) -> Tensor:
    """`_scale` without its mantissa: the power of two at or below it."""
    _, exponent = torch.frexp(_scale(largest, dtype, torch.finfo(values_dtype).max))
    return torch.ldexp(torch.ones_like(largest), exponent - 1)


def _mx_exponent(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Exponent of the power of two that values are divided by, so that the largest does not exceed the format's."""
    mantissa, exponent = torch.frexp(largest * (1 / torch.finfo(dtype).max))
    exponent = torch.where(mantissa > 0.5, exponent, exponent - 1)  # the mantissa is in [0.5, 1): round up
    exponent = torch.where(largest > 0, exponent, -LARGEST_EXPONENT)
    exponent = torch.where(largest.isinf(), LARGEST_EXPONENT, exponent)
    return exponent.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)


def _through_fp8(values: Tensor, scale: Tensor, dtype: torch.dtype, scale_back: Tensor | None = None) -> Tensor:
    limit = torch.finfo(dtype).max
    # torch turns what is beyond e4m3's range into NaN; hardware conversions, as Transformer Engine uses them, saturate.
    quantized = (values.float() * scale).clamp_(-limit, limit).to(dtype)
    back = scale.reciprocal() if scale_back is None else scale_back
    return (quantized.float() * back).to(values.dtype)
