"""On a GPU: fast kernels against plain fp32 ones. Marked `gpu`; each skips, saying so, where there is none."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from internvl_megatron.device import ATTENTION_PACKAGES, AttentionKernel, is_installed, open_device
from internvl_megatron.model.attention import PackedAttention, PackedRow
from internvl_megatron.model.rotary import rotary_tables, rotate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
]

LENGTHS = (300, 17, 1, 700, 6)
HEADS, KV_HEADS, HEAD_SIZE = 8, 2, 64


def _attend(kernel: AttentionKernel, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of query, key and value, all fp32."""
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    device = open_device("cuda")
    sizes = (HEADS, KV_HEADS, KV_HEADS)
    inputs = [
        device.put(torch.randn(total, 1, heads, HEAD_SIZE, generator=generator)).to(dtype).requires_grad_()
        for heads in sizes
    ]
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    on_device = device.put(ends.to(torch.int32))
    row = PackedRow(
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        segment_ends=tuple(ends.tolist()),
        rotary=rotary_tables(device.put(torch.arange(total, dtype=torch.int32) * 64), HEAD_SIZE, 1e6),
    )
    config: Any = SimpleNamespace(
        num_attention_heads=HEADS, num_query_groups=KV_HEADS, kv_channels=HEAD_SIZE, apply_rope_fusion=False
    )
    one = SimpleNamespace(size=lambda: 1)
    alone: Any = SimpleNamespace(hcp=[one, one], tp=one)
    attention = PackedAttention(config, 1, AttnMaskType.causal, "self", kernel=kernel, pg_collection=alone)
    output = attention(*inputs, None, packed_seq_params=row)
    output.backward(device.put(torch.randn(output.shape, generator=generator)).to(dtype))
    gradients = [tensor.grad for tensor in inputs if tensor.grad is not None]
    return [tensor.float() for tensor in (output.detach(), *gradients)]


@pytest.mark.parametrize("kernel", ["transformer_engine", "flash_attn", "torch_varlen"])
def test_packed_kernels_equal_one_call_per_segment(kernel: AttentionKernel) -> None:
    module = ATTENTION_PACKAGES[kernel]
    if not is_installed(module):
        pytest.skip(f"{module} is not installed")
    for fast, exact in zip(_attend(kernel, torch.bfloat16), _attend("sdpa", torch.float32), strict=True):
        assert (fast - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("fused", [False, True])
def test_rotation_and_its_gradient_equal_the_cpus(fused: bool) -> None:
    if fused and not is_installed("transformer_engine"):
        pytest.skip("Transformer Engine is not installed")
    device = open_device("cuda")
    positions = torch.arange(0, 40000 * 256, 4099, dtype=torch.int32)
    generator = torch.Generator().manual_seed(1)
    x, gradient = (torch.randn(len(positions), 1, 2, HEAD_SIZE, generator=generator) for _ in range(2))
    results = []
    for put, by_kernel in ((torch.as_tensor, False), (device.put, fused)):
        leaf = put(x.clone()).detach().requires_grad_()
        turned = rotate(leaf, rotary_tables(put(positions), HEAD_SIZE, 1e6), by_kernel)
        turned.backward(put(gradient))
        assert leaf.grad is not None, "a rotation has a gradient"
        results.append((turned.detach().cpu(), leaf.grad.cpu()))
    # An angle of 40000 rad in fp32 is good to 2e-3.
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=0)


def test_transformer_engine_equals_torch() -> None:
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine is not installed")
    import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]

    generator = torch.Generator().manual_seed(2)
    device = open_device("cuda")
    fused = te.LayerNormLinear(256, 512, params_dtype=torch.float32, device="cuda")
    norm, linear = torch.nn.LayerNorm(256, eps=1e-5).to("cuda"), torch.nn.Linear(256, 512).to("cuda")
    with torch.no_grad():
        linear.weight.copy_(fused.weight)
        linear.bias.copy_(fused.bias)
    x = device.put(torch.randn(128, 256, generator=generator))
    results = []
    for module in (fused, torch.nn.Sequential(norm, linear)):
        leaf = x.clone().requires_grad_()
        output = module(leaf)
        output.square().mean().backward()
        results.append((output.detach(), leaf.grad))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < 1e-2, "but for TF32"
