"""Parts of the vision tower that are plain functions of tensors."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from internvl_megatron.model.position_table import interpolate_positions
from internvl_megatron.model.vision import normalize_pixels, pixel_shuffle


def test_pixel_shuffle_is_version_2_of_internvl() -> None:
    """Cell (m, k) = concat(x[2m, 2k], x[2m, 2k + 1], x[2m + 1, 2k], x[2m + 1, 2k + 1]); cells row by row."""
    x = torch.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    shuffled = pixel_shuffle(x, 2)
    assert shuffled.shape == (2, 6, 12)
    for m in range(2):
        for k in range(3):
            parts = [x[:, 2 * m, 2 * k], x[:, 2 * m, 2 * k + 1], x[:, 2 * m + 1, 2 * k], x[:, 2 * m + 1, 2 * k + 1]]
            assert torch.equal(shuffled[:, 3 * m + k], torch.cat(parts, dim=-1)), f"cell ({m}, {k})"


def test_pixel_shuffle_is_not_torchs_channel_order() -> None:
    x = torch.arange(1 * 4 * 4 * 3).reshape(1, 4, 4, 3).float()
    channel_major = F.pixel_unshuffle(x.permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2)
    shuffled = pixel_shuffle(x, 2)
    assert torch.equal(shuffled.sort(dim=-1).values, channel_major.sort(dim=-1).values), (
        "the same numbers in each cell"
    )
    assert not torch.equal(shuffled, channel_major), "in another order"


def test_normalize_pixels() -> None:
    tiles = torch.randint(0, 256, (3, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    wanted = (tiles.numpy() / 255 - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(normalize_pixels(tiles, torch.float32).numpy(), wanted, rtol=0, atol=1e-6)
    assert normalize_pixels(tiles, torch.bfloat16).dtype == torch.bfloat16


def test_positions_of_the_stored_grid_are_used_as_they_are() -> None:
    table = torch.randn(1, 17, 6, generator=torch.Generator().manual_seed(0))
    assert interpolate_positions(table, 4, 4) is table


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (2, 2), (3, 5)])
def test_positions_of_another_grid_are_interpolated_and_the_class_position_is_kept(rows: int, columns: int) -> None:
    table = torch.randn(1, 17, 6, generator=torch.Generator().manual_seed(0))
    resized = interpolate_positions(table, rows, columns)
    assert resized.shape == (1, 1 + rows * columns, 6)
    assert torch.equal(resized[:, 0], table[:, 0])
    for channel in range(6):
        grid = table[0, 1:, channel].reshape(1, 1, 4, 4)
        wanted = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
        torch.testing.assert_close(resized[0, 1:, channel], wanted.flatten())


def test_interpolation_is_done_in_fp32_and_keeps_a_constant() -> None:
    resized = interpolate_positions(torch.full((1, 17, 2), 0.3, dtype=torch.bfloat16), 7, 7)
    assert resized.dtype == torch.float32
    torch.testing.assert_close(resized, torch.full_like(resized, float(torch.tensor(0.3).bfloat16())))
