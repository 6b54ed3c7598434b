"""InternLM2 and InternLM3 in plain PyTorch, from their published code: the reference for InternVL3-9B.

InternLM2 (OpenGVLab's `modeling_internlm2.py`) projects q, k and v with one fused matrix, `wqkv`, whose rows are, for every
key/value head, its query heads, then the key, then the value. InternLM3 has three matrices and is otherwise the same:
RMSNorm, rotary halves, SwiGLU, no biases. Dynamic rope scaling does nothing within the trained length.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_megatron.config.schema import LanguageConfig

Tensors = dict[str, Tensor]


def internlm2_logits(tensors: Tensors, config: LanguageConfig, token_ids: Tensor, prefix: str = "") -> Tensor:
    """Logits fp32 [T, V] of one sequence from tensors under InternLM2's names."""
    weight = {name.removeprefix(prefix): tensor.float() for name, tensor in tensors.items() if name.startswith(prefix)}
    hidden = weight["model.tok_embeddings.weight"][token_ids]
    queries_per_group = config.num_heads // config.num_kv_heads
    for number in range(config.num_layers):
        layer = {
            name.removeprefix(f"model.layers.{number}."): tensor
            for name, tensor in weight.items()
            if name.startswith(f"model.layers.{number}.")
        }
        x = _rms_norm(hidden, layer["attention_norm.weight"], config.norm_eps)
        fused = (x @ layer["attention.wqkv.weight"].T).view(len(x), config.num_kv_heads, -1, config.head_size)
        query = fused[:, :, :queries_per_group].flatten(1, 2)
        key, value = fused[:, :, -2], fused[:, :, -1]
        hidden = hidden + _attention(query, key, value, config) @ layer["attention.wo.weight"].T
        x = _rms_norm(hidden, layer["ffn_norm.weight"], config.norm_eps)
        gated = F.silu(x @ layer["feed_forward.w1.weight"].T) * (x @ layer["feed_forward.w3.weight"].T)
        hidden = hidden + gated @ layer["feed_forward.w2.weight"].T
    return _rms_norm(hidden, weight["model.norm.weight"], config.norm_eps) @ weight["output.weight"].T


def internlm3_logits(tensors: Tensors, config: LanguageConfig, token_ids: Tensor, prefix: str = "") -> Tensor:
    """Logits fp32 [T, V] of one sequence from tensors under InternLM3's names."""
    weight = {name.removeprefix(prefix): tensor.float() for name, tensor in tensors.items() if name.startswith(prefix)}
    hidden = weight["model.embed_tokens.weight"][token_ids]
    for number in range(config.num_layers):
        layer = {
            name.removeprefix(f"model.layers.{number}."): tensor
            for name, tensor in weight.items()
            if name.startswith(f"model.layers.{number}.")
        }
        x = _rms_norm(hidden, layer["input_layernorm.weight"], config.norm_eps)
        query, key, value = (
            (x @ layer[f"self_attn.{part}_proj.weight"].T).view(len(x), -1, config.head_size) for part in "qkv"
        )
        hidden = hidden + _attention(query, key, value, config) @ layer["self_attn.o_proj.weight"].T
        x = _rms_norm(hidden, layer["post_attention_layernorm.weight"], config.norm_eps)
        gated = F.silu(x @ layer["mlp.gate_proj.weight"].T) * (x @ layer["mlp.up_proj.weight"].T)
        hidden = hidden + gated @ layer["mlp.down_proj.weight"].T
    return _rms_norm(hidden, weight["model.norm.weight"], config.norm_eps) @ weight["lm_head.weight"].T


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _attention(query: Tensor, key: Tensor, value: Tensor, config: LanguageConfig) -> Tensor:
    """[T, heads, d] each, causal; head h reads key/value head h // (heads / groups)."""
    length, repeats = len(query), config.num_heads // config.num_kv_heads
    query, key = _rotate(query, config.rope_theta), _rotate(key, config.rope_theta)
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) / config.head_size**0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1)


def _rotate(x: Tensor, theta: float) -> Tensor:
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half) / half)
    angles = torch.arange(len(x))[:, None] * frequencies
    cos, sin = (torch.cat([part, part], dim=-1)[:, None] for part in (angles.cos(), angles.sin()))
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos + turned * sin
