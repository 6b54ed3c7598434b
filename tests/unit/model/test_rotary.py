"""Rotary tables from positions in units of 1/256, against fp64."""

import numpy as np
import pytest
import torch

from internvl_megatron.model.rotary import POSITION_UNITS, rotary_tables, rotate

HEAD_SIZE, THETA = 16, 1e6


def exact_angles(numerators: np.ndarray) -> np.ndarray:
    """position * theta^(-2i/d) in fp64."""
    frequencies = THETA ** (-np.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
    return numerators[:, None] / POSITION_UNITS * frequencies[None]


def tables_of(numerators: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = rotary_tables(torch.from_numpy(numerators.astype(np.int32)), HEAD_SIZE, THETA).cos_and_sin
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (len(numerators), 1, 1, HEAD_SIZE // 2)
    return cos[:, 0, 0].numpy(), sin[:, 0, 0].numpy()


def test_fused_kernels_get_the_angles_of_a_whole_head() -> None:
    numerators = torch.tensor([0, 100, 256, 1000], dtype=torch.int32)
    cos, sin = tables_of(numerators.numpy())
    angles = rotary_tables(numerators, HEAD_SIZE, THETA).of_both_halves[:, 0, 0]
    halves = angles.chunk(2, dim=-1)
    for half in halves:
        np.testing.assert_array_equal(half.cos().numpy(), cos)
        np.testing.assert_array_equal(half.sin().numpy(), sin)


@pytest.mark.parametrize("first", [0, 1000, 30000])
def test_tables_equal_the_closed_form(first: int) -> None:
    numerators = first * POSITION_UNITS + np.arange(0, 20 * POSITION_UNITS, 7)
    cos, sin = tables_of(numerators)
    # An fp32 angle of this size is off by half a unit in its last place, and the frequencies by as much.
    tolerance = 4 * float(np.spacing(np.float32(first + 20)))
    np.testing.assert_allclose(cos, np.cos(exact_angles(numerators)), rtol=0, atol=tolerance)
    np.testing.assert_allclose(sin, np.sin(exact_angles(numerators)), rtol=0, atol=tolerance)


# V2PE: <img> at `start`, then image tokens at start + delta * k; numerators of the first and the last of them.
VECTORS = [
    (49, 256, 1, 12545, 50.0),
    (49, 256, 256, 50 * 256, 305.0),
    (10, 3328, 16, 2576, 218.0),
    (10, 3328, 1, 2561, 23.0),
    (30000, 3328, 1, 30000 * 256 + 1, 30013.0),
]


@pytest.mark.parametrize(("start", "num_tokens", "stride", "first", "last"), VECTORS)
def test_v2pe_vectors(start: int, num_tokens: int, stride: int, first: int, last: float) -> None:
    numerators = start * POSITION_UNITS + stride * np.arange(1, num_tokens + 1)
    assert numerators[0] == first
    assert numerators[-1] / POSITION_UNITS == last
    cos, _ = tables_of(numerators)
    np.testing.assert_allclose(
        cos, np.cos(exact_angles(numerators)), rtol=0, atol=4 * float(np.spacing(np.float32(last)))
    )


@pytest.mark.parametrize("start", [65536, 200_000, 2**23 - 1])
def test_fractions_survive_beyond_the_exact_range_of_fp32(start: int) -> None:
    """The step between neighbours at 1/256 is that at position 0, though start + 1/256 has no fp32 number."""
    numerators = np.array([start * POSITION_UNITS, start * POSITION_UNITS + 1])
    cos, sin = tables_of(numerators)
    # The angle between the two, from cosines and sines: free of the error both have in common.
    step = np.arcsin(sin[1, 0] * cos[0, 0] - cos[1, 0] * sin[0, 0])
    spacing = float(np.spacing(np.float32(start)))
    assert abs(step - 1 / POSITION_UNITS) <= spacing, "the fastest frequency turns by 1/256"
    if start < 2**17:
        assert np.float32(start + 1 / 256) == np.float32(start), "a plain fp32 position would have lost the step"


def test_rotate_turns_half_pairs_and_keeps_the_dtype() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 1, 3, HEAD_SIZE, generator=generator)
    numerators = torch.tensor([0, 100, 256, 1000, 5000], dtype=torch.int32)
    tables = rotary_tables(numerators, HEAD_SIZE, THETA)
    angles = torch.from_numpy(exact_angles(numerators.numpy()))[:, None, None]
    pairs = torch.complex(x[..., : HEAD_SIZE // 2].double(), x[..., HEAD_SIZE // 2 :].double())
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(rotate(x, tables), torch.cat([turned.real, turned.imag], dim=-1).float())
    assert rotate(x.bfloat16(), tables).dtype == torch.bfloat16
    torch.testing.assert_close(rotate(x, tables)[0], x[0], rtol=0, atol=0)
