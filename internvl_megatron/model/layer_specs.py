"""Which module sits in which slot of a Megatron Core layer: the one place where that is chosen."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from internvl_megatron.device import AttentionKernel
from internvl_megatron.model.attention import PackedAttention


def shared_settings(dtype: torch.dtype) -> dict[str, Any]:
    """Settings of Megatron Core that are the same for both sides of the model."""
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # Parameters are filled by `build`, the same way under every layout.
        "perform_initialization": False,
        "use_cpu_initialization": False,
        # Losses are divided by their global weight before backward; nothing may divide them again.
        "calculate_per_token_loss": True,
        # Kernels of packages that may be absent.
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
    }


def recompute_settings(what: Literal["none", "selective", "full"]) -> dict[str, Any]:
    """Megatron Core's settings for activations that are computed again: of attention alone, or of every layer."""
    if what == "none":
        return {}
    if what == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def plain_norm(config: TransformerConfig, hidden_size: int, eps: float) -> torch.nn.Module:
    """LayerNorm or RMSNorm of torch whose parameters Megatron Core treats correctly under sequence parallelism.

    Its own wrapper refuses sequence parallelism: there every rank sees only its tokens, so the gradients of the norm's
    parameters must be summed over the tensor-parallel group, which the `sequence_parallel` mark asks for.
    """
    norm = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
    module = norm(hidden_size, eps=eps, dtype=config.params_dtype)
    for parameter in module.parameters():
        setattr(parameter, "sequence_parallel", config.sequence_parallel)
    return module


def without_bias(column: Any) -> Any:
    """For InternViT-6B: no bias on q, k, v although its other linear layers have one, which no config field says."""

    def build(*args: Any, bias: bool, **kwargs: Any) -> torch.nn.Module:
        del bias
        return column(*args, bias=False, **kwargs)

    return build


@dataclass(frozen=True)
class Linears:
    """Linear layers and norms of a transformer layer: builders with the signatures of Megatron Core's slots."""

    column: Any = ColumnParallelLinear
    """Split along its outputs: q, k, v and the MLP's first."""
    row: Any = RowParallelLinear
    """Split along its inputs: attention's output projection and the MLP's second."""
    norm: Any = plain_norm
    """Before attention and before the MLP, and the last one of a block."""
    norm_and_column: Any = None
    """A norm and the linear layer behind it as one module, where there is such a thing."""

    @property
    def own_norm(self) -> Any:
        """What fills a layer's slots for norms."""
        return IdentityOp if self.norm_and_column else self.norm

    @property
    def behind_norm(self) -> Any:
        """What fills the slots of linear layers behind a norm."""
        return self.norm_and_column or self.column


TORCH = Linears()
"""Megatron Core's linear layers and torch's norms: run anywhere."""


def feed_forward(linears: Linears) -> Any:
    """Builder of the MLP slot; gating and activation come from the config."""
    return partial(MLP.as_mlp_submodule, MLPSubmodules(linear_fc1=linears.behind_norm, linear_fc2=linears.row))


def language_block(layers: Sequence[Linears], kernel: AttentionKernel) -> TransformerBlockSubmodules:
    """Qwen2 decoder layers for one pipeline stage, and the final norm (built on the last stage only).

    Args:
        layers: what each of them is made of.
        kernel: for attention.
    """
    return TransformerBlockSubmodules(
        layer_specs=[_language_layer(linears, kernel) for linears in layers], layer_norm=layers[-1].norm
    )


def _language_layer(linears: Linears, kernel: AttentionKernel) -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=linears.own_norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linears.behind_norm,
                    core_attention=partial(PackedAttention, kernel=kernel),
                    linear_proj=linears.row,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType] - as Megatron's own specs do
            pre_mlp_layernorm=linears.own_norm,
            mlp=feed_forward(linears),
            mlp_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
        ),
    )
