"""Attention of packed rows by one scaled-dot-product call per segment."""

import itertools

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


def test_a_segment_sees_itself_alone() -> None:
    """Outputs of a segment do not change with what the others hold, and give them no gradient."""
    ends = (0, 1, 4, TOKENS)
    row = PackedRow(segment_ends=ends, num_padding_tokens=0)
    query, key, value = (torch.randn(TOKENS, HEADS, SIZE, requires_grad=True) for _ in range(3))
    attended = _per_segment(query, key, value, row)
    for start, end in itertools.pairwise(ends):
        outside = torch.ones(TOKENS, dtype=torch.bool)
        outside[start:end] = False
        noise = torch.randn(TOKENS, HEADS, SIZE) * outside[:, None, None]
        changed = _per_segment(query + noise, key + noise, value + noise, row)
        assert torch.equal(changed[start:end], attended[start:end])
        assert not torch.allclose(changed[outside], attended[outside])
        for gradient in torch.autograd.grad(attended[start:end].sum(), (query, key, value), retain_graph=True):
            assert not gradient[outside].any()
