"""Rounding to FP8 against closed forms, and against loops over blocks that choose every value from a list."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from internvl_megatron.model.fp8_format import KINDS, Kind, Recipe, amax, rounded

LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}


def _numbers(name: str) -> np.ndarray:
    """All finite values of a format, ascending, from its definition."""
    exponent_bits, mantissa_bits = (4, 3) if name == "e4m3" else (5, 2)
    bias, values = 2 ** (exponent_bits - 1) - 1, set()
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            small = math.ldexp(fraction, 1 - bias)
            values.add(math.ldexp(1 + fraction, exponent - bias) if exponent else small)
    finite = [value for value in values if value <= LARGEST[name]]
    return np.array(sorted({sign * value for value in finite for sign in (1, -1)}))


NUMBERS = {name: _numbers(name) for name in LARGEST}


def _nearest(value: float, name: str) -> float:
    """The format's number nearest to a value; of two, the one whose mantissa is even; beyond the range, the last one."""
    numbers = NUMBERS[name]
    above = int(np.searchsorted(numbers, value))
    if above in (0, len(numbers)):
        return float(numbers[max(0, above - 1)])
    low, high = float(numbers[above - 1]), float(numbers[above])
    if value - low != high - value:
        return low if value - low < high - value else high
    positive = int(np.searchsorted(numbers[numbers >= 0], abs(low)))  # place among the codes of its sign
    return low if positive % 2 == 0 else high


def _plain(values: np.ndarray, recipe: str, kind: str, summed_dim: int) -> np.ndarray:
    """fp32 [R, C] rounded with loops."""
    name = "e5m2" if recipe == "current" and kind == "gradient" else "e4m3"
    size = {"current": max(values.shape), "blockwise": 128, "mxfp8": 32}[recipe]
    square = recipe == "current" or (recipe == "blockwise" and kind == "weight")
    height, width = (size if square or summed_dim == dim else 1 for dim in (0, 1))
    result = np.empty_like(values)
    for top in range(0, values.shape[0], height):
        for left in range(0, values.shape[1], width):
            block = values[top : top + height, left : left + width]
            largest = np.float32(np.abs(block).max())
            scale = np.float32(1.0)
            if recipe == "mxfp8":
                scale = (
                    np.float32(2.0 ** -math.ceil(math.log2(np.float32(largest * np.float32(1 / 448)))))
                    if largest
                    else scale
                )
            elif largest:
                scale = np.float32(LARGEST[name]) / largest
                if recipe == "blockwise":
                    scale = np.float32(2.0 ** math.floor(math.log2(scale)))
            one = np.vectorize(lambda value, scale=scale: _nearest(float(np.float32(value * scale)), name))
            result[top : top + height, left : left + width] = one(block).astype(np.float32) * (np.float32(1) / scale)
    return result


@pytest.mark.parametrize("recipe", ["current", "blockwise", "mxfp8"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("summed_dim", [0, 1])
def test_every_value_is_what_loops_find(recipe: Any, kind: Any, summed_dim: Any) -> None:
    generator = np.random.default_rng(1)
    shape = (150, 40) if summed_dim == 0 else (40, 150)  # last blocks are shorter
    values = (generator.standard_normal(shape) * 10 ** generator.uniform(-6, 3, shape)).astype(np.float32)
    values[3] = 0.0
    ours = rounded(torch.from_numpy(values), recipe, kind, summed_dim)
    np.testing.assert_array_equal(ours.numpy(), _plain(values, recipe, kind, summed_dim))


def test_numbers_of_the_formats_stay() -> None:
    """With 448 (57344) in the tensor the scale is 1, and nothing is left to round."""
    cases: list[tuple[Kind, str]] = [("input", "e4m3"), ("gradient", "e5m2")]
    for kind, name in cases:
        values = torch.from_numpy(NUMBERS[name]).float()[None]
        torch.testing.assert_close(rounded(values, "current", kind, 1), values, rtol=0, atol=0)


def test_powers_of_two_do_not_change_with_the_scale() -> None:
    """Scales of blocks are powers of two, so blocks that differ by one are rounded alike."""
    values = torch.randn(2, 128)
    for recipe in ("blockwise", "mxfp8"):
        expected = rounded(values, recipe, "input", 1)
        torch.testing.assert_close(rounded(values * 2.0**-9, recipe, "input", 1) * 2.0**9, expected, rtol=0, atol=0)


def test_the_largest_number_fills_a_block() -> None:
    """448 times a power of two is a number of the format under the scale that fits it; a scale half as large would round 1.125."""
    for exponent in range(-20, 20):
        values = torch.full((1, 32), 1.125 * 2.0 ** (exponent - 6))
        values[0, 0] = 448 * 2.0**exponent
        for recipe in ("blockwise", "mxfp8"):
            torch.testing.assert_close(rounded(values, recipe, "input", 1), values, rtol=0, atol=0)


def test_blocks_have_scales_of_their_own() -> None:
    """A value too small for the scale of its neighbour survives in another block; with one scale it is lost."""
    values = torch.full((1, 256), 1e-6)
    values[0, 0] = 400.0
    cases: list[tuple[Recipe, int]] = [("blockwise", 128), ("mxfp8", 32)]
    for recipe, size in cases:
        result = rounded(values, recipe, "input", 1)
        assert (result[0, 1:size] == 0).all()
        torch.testing.assert_close(result[0, size:], values[0, size:], rtol=0.07, atol=0)
    assert (rounded(values, "current", "input", 1)[0, 1:] == 0).all()


def test_weights_in_square_blocks_are_the_same_for_both_products() -> None:
    weight = torch.full((256, 256), 0.003)
    weight[0, 0] = 300.0  # coarse beside it: along its row, along its column, or in its square
    both = [rounded(weight, "blockwise", "weight", dim) for dim in (0, 1)]
    torch.testing.assert_close(*both, rtol=0, atol=0)
    rows = [rounded(weight, "blockwise", "input", dim) for dim in (0, 1)]
    assert (rows[0] != rows[1]).any()


def test_delayed_scaling_takes_the_magnitude_it_is_given() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0, 500.0]])
    torch.testing.assert_close(
        rounded(values, "delayed", "input", 1, torch.tensor(500.0)),
        rounded(values, "current", "input", 1),
        rtol=0,
        atol=0,
    )
    saturated = rounded(values, "delayed", "input", 1, torch.tensor(3.5))
    torch.testing.assert_close(saturated, torch.tensor([[1.0, 2.0, 3.0, 3.5]]), rtol=0, atol=1e-6)
    unknown = rounded(values * 1e-6, "delayed", "gradient", 1, torch.tensor(0.0))  # scale 1
    expected = torch.tensor([[0.0, 0.0, 0.0, 5e-4]])
    torch.testing.assert_close(unknown, expected, rtol=0.13, atol=0)


@pytest.mark.parametrize("recipe", ["current", "blockwise", "mxfp8"])
def test_zeros_infinities_and_nan(recipe: Any) -> None:
    assert (rounded(torch.zeros(2, 128), recipe, "input", 1) == 0).all()
    tiny = rounded(torch.full((1, 32), 1e-44), recipe, "input", 1)
    assert tiny.isfinite().all()
    spoiled = torch.ones(2, 128)
    spoiled[0, 5], spoiled[1, 7] = float("nan"), -1.0
    result = rounded(spoiled, recipe, "input", 1)
    assert result[0, 5].isnan()
    assert result.isnan().sum() == 1, "NaN spoils its own place alone"
    torch.testing.assert_close(result[1], spoiled[1], rtol=0, atol=0)
    assert float(amax(spoiled)) == 1.0
    infinite = torch.ones(1, 32)
    infinite[0, 0] = float("inf")
    result = rounded(infinite, recipe, "input", 1)
    if recipe == "mxfp8":  # 448 times the largest scale, which is beyond fp32
        assert result[0, 0].isinf()
    else:  # scale 1; hardware conversions saturate
        assert float(result[0, 0]) == 448.0
        assert (result[0, 1:] == 1).all()


def test_bf16_stays_bf16() -> None:
    values: Tensor = torch.randn(128, 128, dtype=torch.bfloat16)
    for recipe in ("current", "blockwise", "mxfp8"):
        result = rounded(values, recipe, "weight", 1)
        assert result.dtype == torch.bfloat16
        expected = rounded(values.float(), recipe, "weight", 1)
        torch.testing.assert_close(result.float(), expected, rtol=2**-8, atol=0)
