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

from internvl_megatron.device import AttentionKernel, LayerKernel
from internvl_megatron.model.adapter import Adapter, Block, SplitInputs, SplitOutputs
from internvl_megatron.model.attention import PackedAttention


def shared_settings(dtype: torch.dtype) -> dict[str, Any]:
    """Settings of Megatron Core that are the same for both sides of the model.

    Its other fusions stay off: bias-GELU computes the tanh form, which is not InternViT's GELU; bias-dropout has nothing to
    fuse without dropout; and gradient accumulation is switched on where the gradient buffer is made (`train.optimizer`).
    """
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


FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""What a norm's parameters are called inside the linear layer they are fused with, and where the norm is a module."""


def plain_name(name: str) -> str:
    """A parameter's name where norms are modules of their own: its name in checkpoints, whatever layers are made of."""
    for fused, plain in FUSED_NORMS.items():
        name = name.replace(fused, plain)
    return name


def without_bias(column: Any) -> Any:
    """For InternViT-6B: no bias on q, k, v although its other linear layers have one, which no config field says."""

    def build(*args: Any, bias: bool, **kwargs: Any) -> torch.nn.Module:
        del bias
        return column(*args, bias=False, **kwargs)

    return build


def adding_bias(linear: Any) -> Any:
    """Let a linear layer add its bias inside the matrix product, where Megatron Core's blocks ask for it by itself to fuse it
    with what follows: here that has another form."""

    def build(*args: Any, skip_bias_add: bool, **kwargs: Any) -> torch.nn.Module:
        del skip_bias_add
        return linear(*args, skip_bias_add=False, **kwargs)

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
    adapter: Adapter | None = None
    """Low-rank adapters beside linear layers. They take what a norm gives, which a norm that is fused with a linear layer keeps
    for itself: they do not go together."""

    def first(self, block: Block) -> Any:
        """What fills the slot of a block's linear layer behind its norm."""
        if self.adapter is None:
            return self.norm_and_column or self.column
        assert self.norm_and_column is None, "an adapter needs its input, which this layer's norm keeps"
        return self.adapter.beside(self.column, SplitOutputs, block)

    def last(self, block: Block) -> Any:
        """What fills the slot of a block's linear layer in front of its residual."""
        return self.row if self.adapter is None else self.adapter.beside(self.row, SplitInputs, block)

    @property
    def own_norm(self) -> Any:
        """What fills a layer's slots for norms."""
        return IdentityOp if self.norm_and_column else self.norm

    @property
    def plain_names(self) -> dict[str, str]:
        """Beginnings of names inside a layer that checkpoints have in another way."""
        return FUSED_NORMS if self.norm_and_column else {}


TORCH = Linears()
"""Megatron Core's linear layers and torch's norms: run anywhere."""


def linears_of(kernel: LayerKernel) -> Linears:
    """What layers are made of. Transformer Engine is imported here, where it is asked for, and nowhere on a CPU."""
    if kernel == "torch":
        return TORCH
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    return Linears(
        column=TEColumnParallelLinear,
        row=TERowParallelLinear,
        norm=TENorm,
        norm_and_column=TELayerNormColumnParallelLinear,
    )


def transformer_engine_linear(
    in_size: int, out_size: int, dtype: torch.dtype, device: torch.device
) -> torch.nn.Module:
    """A linear layer that every rank has all of, for FP8."""
    import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]

    module = te.Linear(in_size, out_size, params_dtype=dtype, device=device, init_method=lambda weight: None)
    for parameter in module.parameters():
        setattr(parameter, "tensor_model_parallel", False)  # it says they are split, over one rank
    return module


def feed_forward(linears: Linears) -> Any:
    """Builder of the MLP slot; gating and activation come from the config."""
    submodules = MLPSubmodules(
        linear_fc1=adding_bias(linears.first("mlp")), linear_fc2=adding_bias(linears.last("mlp"))
    )
    return partial(MLP.as_mlp_submodule, submodules)


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
                    linear_qkv=linears.first("attention"),
                    core_attention=partial(PackedAttention, kernel=kernel),
                    linear_proj=linears.last("attention"),
                ),
            ),
            self_attn_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType] - as Megatron's own specs do
            pre_mlp_layernorm=linears.own_norm,
            mlp=feed_forward(linears),
            mlp_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
            sharded_state_dict_keys_map=linears.plain_names,
        ),
    )
