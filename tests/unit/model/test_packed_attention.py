"""Attention of packed rows by one scaled-dot-product call per segment."""

import torch

from internvl_megatron.model.attention import PackedRow, _per_segment

TOKENS, HEADS, SIZE = 6, 2, 4


def test_a_row_of_nothing_but_padding_has_a_part_in_backward() -> None:
    """With overlap Megatron Core waits for the gradient of every parameter in the last backward pass."""
    query, key, value = (torch.randn(TOKENS, HEADS, SIZE, requires_grad=True) for _ in range(3))
    _per_segment(query, key, value, PackedRow(segment_ends=(0, TOKENS), num_padding_tokens=TOKENS)).sum().backward()
    assert all(tensor.grad is not None for tensor in (query, key, value))


def test_padding_behind_samples_costs_no_attention() -> None:
    query, key, value = (torch.randn(TOKENS, HEADS, SIZE) for _ in range(3))
    attended = _per_segment(query, key, value, PackedRow(segment_ends=(0, 4, TOKENS), num_padding_tokens=2))
    assert attended[:4].any()
    assert not attended[4:].any()
