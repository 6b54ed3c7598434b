"""Layers of a fake world that keep for their backward passes what Transformer Engine's keep: modelled, seen on no GPU.

What they keep is `scaling/saved_tensors.py`'s, tensor by tensor, so that a dry run finds the peak of the real schedule with it. Linear
layers are Megatron Core's, which send the same messages; in FP8 they keep a rounded copy of their input, and two of their weight: once
a run, or once a micro-batch where there are windows (Transformer Engine's own are then not kept from one to the next). Nothing is
computed: all of it is for tensors without memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from internvl_megatron.config.schema import RunConfig
from internvl_megatron.device import Kernels
from internvl_megatron.model.layer_specs import Linears, plain_norm
from internvl_megatron.scaling.saved_tensors import FP8_WEIGHT_BYTES
from tools.fake_world import META, FakeWorldDevice

FP8 = torch.uint8


class ModelledDevice(FakeWorldDevice):
    """A rank of a fake world with a GPU's kernels."""

    def kernels(self, config: RunConfig) -> Kernels:
        """As a GPU with Transformer Engine chooses; a sharded encoder's layers are torch's there too. Rotary embedding keeps as little
        unfused."""
        kind = "transformer_engine"
        vision = "torch" if config.parallel.vision_sharding == "sharded" else kind
        return Kernels(kind, vision, kind, "sdpa", kind, fuse_swiglu=True, fuse_rotary=False)


class _NormKernel(torch.autograd.Function):
    """Keeps its input and a number a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *_gradients: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:2])


class FusedNorm(torch.nn.RMSNorm):
    """RMSNorm as one kernel, Transformer Engine's and torch's on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize."""
        return _NormKernel.apply(x, self.weight)  # pyright: ignore[reportReturnType]


def fused_norm(config: TransformerConfig, hidden_size: int, eps: float) -> torch.nn.Module:
    """As `plain_norm`, whose LayerNorm is one kernel already."""
    norm = plain_norm(config, hidden_size, eps)
    if isinstance(norm, torch.nn.RMSNorm):
        norm.__class__ = FusedNorm
    return norm


class _AttentionKernel(torch.autograd.Function):
    """Keeps queries, keys and values, [tokens, heads, head size] each, its output, and a sum a token and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        sums = query.new_empty(query.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, *_gradients: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def attention(_config: Any, _groups: Any) -> Any:
    """In the place of `transformer_engine_attention`."""

    def attend(query: Tensor, key: Tensor, value: Tensor, **_options: Any) -> Tensor:
        return _AttentionKernel.apply(*(tensor.contiguous() for tensor in (query, key, value)))

    return attend


class _Rounding:
    """What a linear layer in FP8 keeps in place of its input and its weight."""

    def __init__(self) -> None:
        self._weight: Tensor | None = None

    def keep(self, tensor: Tensor) -> Any:
        if not isinstance(tensor, torch.nn.Parameter):
            return SimpleNamespace(shape=tensor.shape, dtype=tensor.dtype, rounded=_rounded(tensor.numel()))
        if self._weight is None:
            self._weight = _rounded(FP8_WEIGHT_BYTES * tensor.numel())
        # A view, for what counts bytes sees operations alone.
        return SimpleNamespace(weight=tensor, rounded=self._weight.view(-1))

    def give(self, kept: Any) -> Tensor:
        return kept.weight if hasattr(kept, "weight") else torch.empty(kept.shape, dtype=kept.dtype, device=META)


def _rounded(count: int) -> Tensor:
    return torch.empty(count, dtype=FP8, device=META)


class _InFp8:
    """A linear layer under `_Rounding`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rounding = _Rounding()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer does."""
        with saved_tensors_hooks(self._rounding.keep, self._rounding.give):
            return super().forward(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


class Fp8Column(_InFp8, ColumnParallelLinear):
    """Split along its outputs."""


class Fp8Row(_InFp8, RowParallelLinear):
    """Split along its inputs."""


@contextmanager
def modelled() -> Iterator[None]:
    """In the block, a model that asks for Transformer Engine's layers is made of these; `dry_run.check_layers` has passed the run."""
    from internvl_megatron.model import attention as own_attention
    from internvl_megatron.model import fp8_layers, language, vision

    bf16 = Linears(norm=fused_norm)
    in_fp8 = Linears(column=Fp8Column, row=Fp8Row, norm=fused_norm)

    def linears(run: RunConfig, part: Any, layer: int, kernels: Kernels) -> Linears:
        del kernels
        return bf16 if fp8_layers.fp8_recipe(run, part, layer) is None else in_fp8

    with (
        patch.object(fp8_layers, "layer_linears", linears),
        patch.object(vision, "plain_norm", fused_norm),
        patch.object(own_attention, "transformer_engine_attention", attention),
        patch.object(language, "fp8_of_language", lambda *_: {}),
        # One kernel each way, which keeps nothing inside itself; compiled, they do not run here.
        patch(
            "megatron.core.fusions.fused_bias_swiglu.swiglu", lambda y: y.new_empty(*y.shape[:-1], y.shape[-1] // 2)
        ),
        patch("megatron.core.fusions.fused_bias_swiglu.swiglu_back", lambda _, y: torch.empty_like(y)),
    ):
        yield
