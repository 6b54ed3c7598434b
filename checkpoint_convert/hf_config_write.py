"""config.json of Hugging Face checkpoints, written in either layout.

From the model, over what the source's own config.json said where layout and sizes are the same, so that fields this project
does not know survive. Otherwise from the same facts, translated.
"""

import copy
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from checkpoint_convert.hf_config import CHAT_TYPE, TRANSFORMERS_TYPE, Fields, layout_of, read_model
from checkpoint_convert.mapping import Layout
from internvl_megatron.checkpoint.weights import same_weights
from internvl_megatron.config.schema import LanguageConfig, ModelConfig
from internvl_megatron.errors import CheckpointError

_REMOTE_CODE = {
    "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
    "AutoModel": "modeling_internvl_chat.InternVLChatModel",
    "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
}
"""`auto_map` of the released checkpoints: names in files of OpenGVLab's that stand beside their weights."""


@dataclass(frozen=True)
class ServingFacts:
    """What a config.json says that training does not use, but whoever serves the model does."""

    dtype: str
    """torch's name of the weights' number format."""
    image_token_id: int
    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | list[int] | None = None
    max_position_embeddings: int = 32768
    rope_scaling: dict[str, Any] | None = None
    """Applied by Hugging Face beyond `max_position_embeddings` only; training has none. With `rope_type`."""
    drop_path_rate: float = 0.0
    dynamic_tiles: dict[str, Any] = field(default_factory=lambda: dict(DYNAMIC_TILES))


_FREE = {
    "attention_dropout", "attn_implementation", "auto_map", "dropout", "hidden_dropout_prob", "image_fold",
    "initializer_range", "max_window_layers", "pad2square", "projection_dropout", "sliding_window", "template",
    "use_cache", "use_flash_attn",
}  # fmt: skip
"""Fields that say nothing of the weights: an origin's own stay."""

DYNAMIC_TILES = {"dynamic_image_size": True, "use_thumbnail": True, "min_dynamic_patch": 1, "max_dynamic_patch": 12}
"""How the released models cut images."""

_CLASS_TILES = {"dynamic_image_size": False, "use_thumbnail": False, "min_dynamic_patch": 1, "max_dynamic_patch": 6}
"""What OpenGVLab's class takes for the fields that a config.json does not have."""

QWEN_ROPE_SCALING = {"rope_type": "dynamic", "factor": 2.0}
"""In the released Qwen-based configurations. It changes nothing up to 32768 tokens."""


def read_serving_facts(config: Fields, dtype: str, image_token_id: int) -> ServingFacts:
    """The facts of an InternVL config.json, or of a language model's own.

    Raises:
        CheckpointError: a field is of the wrong type, or the image token is another than the tokenizer's.
    """
    if config.size("image_token_id", image_token_id) != image_token_id:
        raise CheckpointError(
            f"{config.path}: image_token_id is {config.values['image_token_id']}, the tokenizer's is {image_token_id}: they "
            "do not belong together"
        )
    language, vision = config, None
    for name in ("llm_config", "text_config"):
        if name in config.values:
            language, vision = config.section(name), config.section("vision_config")
    rate = None if vision is None else vision.values.get("drop_path_rate")
    stored = language.section("rope_parameters", {}).values or language.section("rope_scaling", {}).values
    scaling = {key: value for key, value in stored.items() if key not in ("rope_theta", "type")}
    kind = scaling.setdefault("rope_type", stored.get("type", "default"))
    return ServingFacts(
        dtype=dtype,
        image_token_id=image_token_id,
        bos_token_id=language.token_ids("bos_token_id"),
        eos_token_id=language.token_ids("eos_token_id"),
        pad_token_id=language.token_ids("pad_token_id"),
        max_position_embeddings=language.size("max_position_embeddings", 32768),
        rope_scaling=None if kind == "default" else scaling,
        drop_path_rate=float(rate) if isinstance(rate, int | float) else 0.0,
        dynamic_tiles=_dynamic_tiles(config),
    )


def _dynamic_tiles(config: Fields) -> dict[str, Any]:
    if config.values.get("model_type") != CHAT_TYPE:
        return dict(DYNAMIC_TILES)
    return {name: config.values.get(name, value) for name, value in _CLASS_TILES.items()}


def write_config(model: ModelConfig, layout: Layout, facts: ServingFacts, origin: Fields | None) -> dict[str, Any]:
    """A config.json for an export.

    Args:
        model: sizes.
        layout: of the export.
        facts: see there.
        origin: config.json of the checkpoint the weights came from; its unknown fields stay if it is of the same layout and
            of a model of the same sizes.
    """
    config = _chat_config(model, facts) if layout == "internvl-chat" else _transformers_config(model, facts)
    if origin is None or layout_of(origin) != layout or not same_weights(read_model(origin), model):
        return config
    return _merged(copy.deepcopy(origin.values), config)


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` over `old`, section by section, but for what either may say; each keeps its own spelling of the rotary
    settings and the number format."""
    if "rope_parameters" in old:
        new = {name: value for name, value in new.items() if name not in ("rope_theta", "rope_scaling")}
    if "dtype" in old and "torch_dtype" in new:
        new = {"dtype" if name == "torch_dtype" else name: value for name, value in new.items()}
    merged = dict(old)
    for name, value in new.items():
        both_sections = isinstance(value, dict) and isinstance(old.get(name), dict)
        if name not in old or (name not in _FREE and not both_sections):
            merged[name] = value
        elif name not in _FREE:
            merged[name] = _merged(old[name], value)
    return merged


def _chat_config(model: ModelConfig, facts: ServingFacts) -> dict[str, Any]:
    vision, language = model.vision, model.language
    if facts.rope_scaling is not None:  # OpenGVLab's code is of the time when it was called `type`
        old = {"type" if name == "rope_type" else name: value for name, value in facts.rope_scaling.items()}
        facts = replace(facts, rope_scaling=old)
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": dict(_REMOTE_CODE),
        "downsample_ratio": 1 / vision.shuffle_factor,
        **facts.dynamic_tiles,
        "force_image_size": vision.tile_pixels,
        "hidden_size": language.hidden_size,
        "image_fold": None,
        "llm_config": _language_config(language, facts, "qwen2" if language.family == "qwen2" else "internlm2"),
        "model_type": CHAT_TYPE,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "tie_word_embeddings": False,
        "torch_dtype": facts.dtype,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "attention_dropout": 0.0,
            "drop_path_rate": facts.drop_path_rate,
            "dropout": 0.0,
            "hidden_act": "gelu",
            "hidden_size": vision.hidden_size,
            "image_size": vision.tile_pixels,
            "initializer_factor": vision.layer_scale_init,
            "initializer_range": 1e-10,
            "intermediate_size": vision.ffn_hidden_size,
            "layer_norm_eps": vision.norm_eps,
            "model_type": "intern_vit_6b",
            "norm_type": vision.norm,
            "num_attention_heads": vision.num_heads,
            "num_channels": 3,
            "num_hidden_layers": vision.num_layers,
            "patch_size": vision.patch_pixels,
            "qk_normalization": vision.qk_norm,
            "qkv_bias": vision.qkv_bias,
            "torch_dtype": facts.dtype,
            "use_flash_attn": True,
        },
    }


def _transformers_config(model: ModelConfig, facts: ServingFacts) -> dict[str, Any]:
    vision, language = model.vision, model.language
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": 1 / vision.shuffle_factor,
        "image_seq_length": vision.tokens_per_tile,
        "image_token_id": facts.image_token_id,
        "model_type": TRANSFORMERS_TYPE,
        "projector_hidden_act": "gelu",
        "text_config": _language_config(language, facts, "qwen2" if language.family == "qwen2" else "llama"),
        # The class would tie them.
        "tie_word_embeddings": False,
        "torch_dtype": facts.dtype,
        "vision_config": {
            "architectures": ["InternVLVisionModel"],
            "attention_bias": vision.qkv_bias,
            "attention_dropout": 0.0,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0,
            "hidden_size": vision.hidden_size,
            "image_size": [vision.tile_pixels] * 2,
            "initializer_range": 1e-10,
            "intermediate_size": vision.ffn_hidden_size,
            "layer_norm_eps": vision.norm_eps,
            "layer_scale_init_value": vision.layer_scale_init,
            "model_type": "internvl_vision",
            "norm_type": vision.norm,
            "num_attention_heads": vision.num_heads,
            "num_channels": 3,
            "num_hidden_layers": vision.num_layers,
            "patch_size": [vision.patch_pixels] * 2,
            "projection_dropout": 0.0,
            "torch_dtype": facts.dtype,
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
            "use_qk_norm": vision.qk_norm,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }


def _language_config(
    language: LanguageConfig, facts: ServingFacts, kind: Literal["qwen2", "llama", "internlm2"]
) -> dict[str, Any]:
    classes = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM", "internlm2": "InternLM2ForCausalLM"}
    shared = {
        "architectures": [classes[kind]],
        "bos_token_id": facts.bos_token_id,
        "eos_token_id": facts.eos_token_id,
        "hidden_act": "silu",
        "hidden_size": language.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": language.ffn_hidden_size,
        "max_position_embeddings": facts.max_position_embeddings,
        "model_type": kind,
        "num_attention_heads": language.num_heads,
        "num_hidden_layers": language.num_layers,
        "num_key_value_heads": language.num_kv_heads,
        "pad_token_id": facts.pad_token_id,
        "rms_norm_eps": language.norm_eps,
        "rope_scaling": facts.rope_scaling,
        "rope_theta": language.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": facts.dtype,
        "use_cache": True,
        "vocab_size": language.vocab_size,
    }
    own: dict[str, dict[str, Any]] = {
        "qwen2": {
            "attention_dropout": 0.0,
            "max_window_layers": 70,
            "sliding_window": None,
            "use_sliding_window": False,
        },
        "llama": {"attention_bias": language.qkv_bias, "attention_dropout": 0.0, "mlp_bias": False},
        "internlm2": {"attn_implementation": "eager", "bias": language.qkv_bias},
    }
    if language.head_size * language.num_heads != language.hidden_size or kind == "llama":
        own[kind]["head_dim"] = language.head_size
    return shared | own[kind]
