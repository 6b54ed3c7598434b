"""Sums of the bits of tensors: exact, so they tell whether two are the same, however these are divided."""

import torch
from torch import Tensor

_CHUNK = 2**24
"""Elements summed at a time: integers are widened to 64 bits first."""


def bit_sum(values: Tensor, dtype: torch.dtype) -> int:
    """Sum of a tensor's bit patterns in a number format, as integers: exact, so parts of a tensor may be summed in any order."""
    integers = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    parts = values.reshape(-1).split(_CHUNK)
    return sum(int(part.to(dtype).view(integers).sum(dtype=torch.int64)) for part in parts)
