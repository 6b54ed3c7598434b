"""InternViT's learned table of positions, and its resizing to another grid of patches."""

import torch
import torch.nn.functional as F
from torch import Tensor


def interpolate_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """Resize the patch part of a position table [1, 1 + P, C] to another grid (bicubic, fp32), the CLS entry kept."""
    side = round((table.shape[1] - 1) ** 0.5)
    if (rows, columns) == (side, side):
        return table
    grid = table[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1].float(), grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
