"""config.json of Hugging Face checkpoints, read into our model sizes.

Every number that decides what is computed must be there, or be the default of the class that reads it; what this project
does not compute (another activation, LoRA, a norm after the encoder, ..) is an error, not ignored.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_convert.mapping import Layout
from internvl_megatron.config.schema import LanguageConfig, ModelConfig, VisionConfig
from internvl_megatron.config.value_rules import LARGEST_SIZE, model_problems
from internvl_megatron.errors import CheckpointError

CONFIG_FILE = "config.json"

CHAT_TYPE, TRANSFORMERS_TYPE = "internvl_chat", "internvl"

LANGUAGE_TYPES = ("qwen2", "llama", "internlm2", "internlm3")
"""Model types of language models whose computation is ours: Qwen2, or the same without biases."""

VISION_TYPES = ("intern_vit_6b", "internvl_vision")


@dataclass(frozen=True)
class Fields:
    """An object of a JSON file; errors name the file and the field."""

    path: Path
    values: dict[str, Any]
    prefix: str = ""

    def section(self, name: str, default: Any = ...) -> "Fields":
        """An object inside this one."""
        return Fields(self.path, self._get(name, dict, default), f"{self.prefix}{name}.")

    def size(self, name: str, default: Any = ...) -> Any:
        """A whole number from 1 on, not absurdly large; or the default."""
        value = self._get(name, int, default)
        if value is not None and not 1 <= value <= LARGEST_SIZE:
            raise CheckpointError(f"{self.path}: {self.prefix}{name} must be 1 to {LARGEST_SIZE}")
        return value

    def number(self, name: str, default: Any = ...) -> float:
        """A finite number above 0."""
        value = self._get(name, (int, float), default)
        if not sys.float_info.min < value < sys.float_info.max:
            raise CheckpointError(f"{self.path}: {self.prefix}{name} must be a number above 0")
        return float(value)

    def flag(self, name: str, default: Any = ...) -> bool:
        """True or false."""
        return self._get(name, bool, default)

    def text(self, name: str, default: Any = ...) -> str:
        """A text."""
        return self._get(name, str, default)

    def side(self, name: str, default: Any = ...) -> int:
        """A size in pixels: a number, or two equal ones."""
        value = self.values.get(name, default)
        if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        return Fields(self.path, {**self.values, name: value}, self.prefix).size(name)

    def token_ids(self, name: str) -> int | list[int] | None:
        """A token's id, several, or none."""
        value = self._get(name, (int, list), None)
        for one in value if isinstance(value, list) else []:
            if type(one) is not int:
                raise CheckpointError(f"{self.path}: {self.prefix}{name} is {value!r}, which are not token ids")
        return value

    def expect(self, name: str, only: Any, why: str) -> None:
        """Refuse a value this project does not compute; a missing field has the only allowed value."""
        value = self.values.get(name, only)
        if value != only:
            raise CheckpointError(f"{self.path}: {self.prefix}{name} is {value!r}, only {only!r} is supported: {why}")

    def _get(self, name: str, kind: Any, default: Any) -> Any:
        """A field's value; `...` as its default says that it must be there."""
        value = self.values.get(name)
        if value is None:
            if default is ...:
                raise CheckpointError(
                    f"{self.path}: {self.prefix}{name} is missing; take the config.json of the release"
                )
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"{self.path}: {self.prefix}{name} is {value!r}, which is not of the right type")
        return value


def read_json(path: Path) -> Fields:
    """Read a JSON file that holds one object.

    Raises:
        CheckpointError: it is missing or not such a file.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; give the folder of a Hugging Face checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}, not an object")
    return Fields(path, values)


def layout_of(config: Fields) -> Layout:
    """Which of the two layouts a config.json belongs to.

    Raises:
        CheckpointError: neither.
    """
    kind = config.values.get("model_type")
    if kind == CHAT_TYPE:
        return "internvl-chat"
    if kind == TRANSFORMERS_TYPE:
        return "transformers"
    part = "--language" if kind in LANGUAGE_TYPES else "--vision" if kind in VISION_TYPES else ""
    hint = f"; it is a part of a model: hf-to-megatron takes it as {part}" if part else ""
    raise CheckpointError(
        f"{config.path}: model_type is {kind!r}, neither {CHAT_TYPE!r} (OpenGVLab) nor {TRANSFORMERS_TYPE!r} "
        f"(transformers){hint}"
    )


def read_model(config: Fields) -> ModelConfig:
    """Sizes of a whole InternVL checkpoint.

    Raises:
        CheckpointError: a field is missing or of the wrong type, or asks for something this project does not compute.
    """
    chat = layout_of(config) == "internvl-chat"
    vision = config.section("vision_config")
    language = config.section("llm_config" if chat else "text_config")
    if "quantization_config" in config.values:
        raise CheckpointError(f"{config.path}: has a quantization_config; take the unquantised checkpoint")
    if chat:
        config.text("ps_version")  # OpenGVLab's class takes v1 where it is missing
        config.expect("ps_version", "v2", why="version 1 puts the tokens of a tile in another order")
        config.expect("select_layer", -1, why="features come from the last layer")
        for name in ("use_backbone_lora", "use_llm_lora"):
            config.expect(name, 0, why="merge the LoRA weights first")
    else:
        config.expect("vision_feature_layer", -1, why="features come from the last layer")
        config.expect("vision_feature_select_strategy", "default", why="the class token is dropped")
        config.expect("projector_hidden_act", "gelu", why="the projector's activation is GELU (erf)")
    factor = round(1 / config.number("downsample_ratio", 0.5))
    if factor * config.number("downsample_ratio", 0.5) != 1:
        raise CheckpointError(f"{config.path}: downsample_ratio is not one over a whole number")
    model = ModelConfig(
        vision=read_vision(vision, factor, config.size("force_image_size", None)), language=read_language(language)
    )
    check_sizes(config, model)
    return model


def check_sizes(config: Fields, model: ModelConfig) -> None:
    """Refuse sizes that do not go into each other.

    Raises:
        CheckpointError: says which, in our names.
    """
    if problems := model_problems(model):
        raise CheckpointError(f"{config.path}: {'; '.join(problems)}")


def read_vision(config: Fields, shuffle_factor: int, tile_pixels: int | None = None) -> VisionConfig:
    """Sizes of an InternViT, of either layout; `tile_pixels` where another place than this section says so."""
    config.expect("hidden_act", "gelu", why="InternViT's activation is GELU (erf)")
    config.expect("num_channels", 3, why="tiles are RGB")
    native = config.values.get("model_type", "intern_vit_6b") == "internvl_vision"
    if native:
        config.expect("use_mean_pooling", True, why="False adds a norm after the last layer")
        config.expect("use_mask_token", False, why="InternViT has no mask token")
        config.expect("use_absolute_position_embeddings", True, why="InternViT has a position table")
    # OpenGVLab's class takes rms_norm where it is missing, transformers' layer_norm.
    norm: Any = config.text("norm_type", "layer_norm") if native else config.text("norm_type")
    if norm not in ("layer_norm", "rms_norm"):
        raise CheckpointError(f"{config.path}: {config.prefix}norm_type is {norm!r}, neither layer_norm nor rms_norm")
    return VisionConfig(
        hidden_size=config.size("hidden_size"),
        num_layers=config.size("num_hidden_layers"),
        num_heads=config.size("num_attention_heads"),
        ffn_hidden_size=config.size("intermediate_size"),
        norm=norm,
        # transformers' class has no bias unless told; InternVL's has.
        qkv_bias=config.flag("attention_bias", False) if native else config.flag("qkv_bias"),
        qk_norm=config.flag("use_qk_norm", False) if native else config.flag("qk_normalization"),
        norm_eps=config.number("layer_norm_eps", 1e-6),
        tile_pixels=tile_pixels or config.side("image_size"),
        patch_pixels=config.side("patch_size"),
        shuffle_factor=shuffle_factor,
        layer_scale_init=config.number("layer_scale_init_value" if native else "initializer_factor", 0.1),
    )


def read_language(config: Fields) -> LanguageConfig:
    """Sizes of a language model, alone or as a section of an InternVL config.json."""
    kind = language_type(config)
    config.expect("hidden_act", "silu", why="the language model's MLP is SwiGLU")
    config.expect("use_sliding_window", False, why="every token sees its whole sample")
    config.expect("mlp_bias", False, why="only q, k and v have biases")
    _check_rope(config)
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    if config.values.get("head_dim") is None and hidden % heads:
        raise CheckpointError(
            f"{config.path}: {config.prefix}hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
        )
    return LanguageConfig(
        family="qwen2" if kind == "qwen2" else "internlm",
        hidden_size=hidden,
        num_layers=config.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=config.size("num_key_value_heads"),
        head_size=config.size("head_dim", hidden // heads),
        ffn_hidden_size=config.size("intermediate_size"),
        vocab_size=config.size("vocab_size"),
        rope_theta=_rope(config).number("rope_theta"),
        norm_eps=config.number("rms_norm_eps"),
        qkv_bias=_has_qkv_bias(config, kind),
    )


def language_type(config: Fields) -> str:
    """Which kind of language model a section or file describes; InternVL's section may say it by its class only."""
    classes = config.values.get("architectures")
    by_class = {"Qwen2ForCausalLM": "qwen2", "LlamaForCausalLM": "llama"}
    by_class |= {"InternLM2ForCausalLM": "internlm2", "InternLM3ForCausalLM": "internlm3"}
    only_class = str(classes[0]) if isinstance(classes, list) and classes else ""
    kind = config.text("model_type", "") or by_class.get(only_class, only_class)
    if kind not in LANGUAGE_TYPES:
        raise CheckpointError(
            f"{config.path}: {config.prefix}model_type is {kind!r}; supported are {', '.join(LANGUAGE_TYPES)}"
        )
    return kind


def _has_qkv_bias(config: Fields, kind: str) -> bool:
    if kind == "qwen2":
        return True
    name = {"llama": "attention_bias", "internlm2": "bias", "internlm3": "qkv_bias"}[kind]
    return config.flag(name, kind == "internlm2") or config.flag("attention_bias", False)


def _rope(config: Fields) -> Fields:
    """The object that holds rope_theta: transformers 5 puts it into `rope_parameters`."""
    return config.section("rope_parameters") if config.values.get("rope_parameters") is not None else config


def _check_rope(config: Fields) -> None:
    """Refuse a scaling that changes positions a model is trained at; `dynamic` does so only beyond them."""
    for name in ("rope_parameters", "rope_scaling"):
        section = config.section(name, {})
        kind = section.text("rope_type", section.text("type", "default"))
        if kind not in ("default", "dynamic"):
            raise CheckpointError(
                f"{config.path}: {section.prefix}rope_type is {kind!r}; only 'default' and 'dynamic' (which changes nothing "
                "within the trained length) are supported"
            )
