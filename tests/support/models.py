"""Small models of both families, as ours and as transformers' reference."""

from typing import Any

import torch

from internvl_megatron.config.schema import LanguageConfig, ModelConfig, VisionConfig
from tests.support.rows import IMAGE_TOKEN


def small_model(vision_family: str = "300m", /, **language: Any) -> ModelConfig:
    """A model small enough for CPU tests, with every feature of its vision family ("300m" or "6b")."""
    features: dict[str, Any] = (
        {"norm": "layer_norm", "qkv_bias": True, "qk_norm": False}
        if vision_family == "300m"
        else {"norm": "rms_norm", "qkv_bias": False, "qk_norm": True}
    )
    vision = VisionConfig(
        hidden_size=40, num_layers=2, num_heads=5, ffn_hidden_size=80, tile_pixels=28, patch_pixels=7, **features
    )
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 16,
        "ffn_hidden_size": 96,
        "vocab_size": 150,
    }
    return ModelConfig(vision=vision, language=LanguageConfig(**sizes | language))


def huggingface_model(model: ModelConfig, seed: int = 0, fill: bool = True, image_token: int = IMAGE_TOKEN) -> Any:
    """transformers' InternVL with random weights (norms and LayerScale too, so that nothing hides behind ones)."""
    from transformers import (
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLVisionConfig,
        LlamaConfig,
        Qwen2Config,
    )

    vision, language = model.vision, model.language
    vision_config = InternVLVisionConfig(
        hidden_size=vision.hidden_size,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_heads,
        intermediate_size=vision.ffn_hidden_size,
        attention_bias=vision.qkv_bias,
        use_qk_norm=vision.qk_norm,
        norm_type=vision.norm,
        layer_norm_eps=vision.norm_eps,
        image_size=[vision.tile_pixels] * 2,
        patch_size=[vision.patch_pixels] * 2,
        layer_scale_init_value=vision.layer_scale_init,
        use_absolute_position_embeddings=True,
    )
    llama = {"head_dim": language.head_size, "attention_bias": language.qkv_bias}
    text_config = (Qwen2Config if language.family == "qwen2" else LlamaConfig)(
        vocab_size=language.vocab_size,
        hidden_size=language.hidden_size,
        num_hidden_layers=language.num_layers,
        num_attention_heads=language.num_heads,
        num_key_value_heads=language.num_kv_heads,
        intermediate_size=language.ffn_hidden_size,
        rms_norm_eps=language.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": language.rope_theta},
        tie_word_embeddings=False,
        use_cache=False,
        **(llama if language.family == "internlm" else {}),
    )
    config = InternVLConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=image_token,
        image_seq_length=vision.tokens_per_tile,
        downsample_ratio=1 / vision.shuffle_factor,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    reference = InternVLForConditionalGeneration(config).eval()
    if not fill:
        return reference
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            spread = 0.2 if parameter.dim() == 1 or "embed" in name else parameter.shape[-1] ** -0.5
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + spread * torch.randn_like(parameter))
    return reference
