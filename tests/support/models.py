"""Small models of both families, as ours and as transformers' reference."""

from typing import Any

import torch

from internvl_megatron.config.schema import LanguageConfig, ModelConfig, VisionConfig
from tests.support.rows import IMAGE_TOKEN
from tools.huggingface_baseline import transformers_config


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
    from transformers import InternVLForConditionalGeneration

    config = transformers_config(model, image_token)
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
