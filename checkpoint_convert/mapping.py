"""The one table of parameter names: ours, and those of transformers' `InternVLForConditionalGeneration`.

Our names are those of `Model.named_parameters`: independent of the layout, with one number per layer. The Hugging Face
names are transformers' run-time names (`InternVLForConditionalGeneration.state_dict()`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from checkpoint_convert.transforms import GateUp, GroupedQKV, PaddedVocab, Same, Transform
from internvl_megatron.config.plan import padded_vocab_size
from internvl_megatron.config.schema import ModelConfig
from internvl_megatron.errors import CheckpointError


@dataclass(frozen=True)
class Entry:
    """One of our parameters and the Hugging Face tensors it is made of."""

    name: str
    hf_names: tuple[str, ...]
    transform: Transform


def mapping(model: ModelConfig) -> list[Entry]:
    """Every parameter of the model, each exactly once."""
    return [*_vision(model), *_projector(), *_language(model)]


def from_huggingface(tensors: Mapping[str, Tensor], model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Full (unsharded) parameters under our names.

    Raises:
        CheckpointError: tensors are missing, left over, or do not fit together (`Model.load_full` compares shapes).
    """
    entries = mapping(model)
    expected = {name for entry in entries for name in entry.hf_names}
    missing, surplus = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
    if missing or surplus:
        raise CheckpointError(
            f"the weights do not fit the model: {len(missing)} tensors are missing ({', '.join(missing[:3])}), "
            f"{len(surplus)} are unknown ({', '.join(surplus[:3])}). Choose the recipe of the checkpoint's size."
        )
    for entry in entries:
        parts = [tensors[name] for name in entry.hf_names]
        try:
            whole = entry.transform.join(parts)
        except RuntimeError as error:
            shapes = ", ".join(f"{name} {tuple(part.shape)}" for name, part in zip(entry.hf_names, parts, strict=True))
            raise CheckpointError(f"{entry.name} cannot be made of {shapes} ({error})") from error
        yield entry.name, whole


def to_huggingface(parameters: Mapping[str, Tensor], model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The inverse of `from_huggingface`, from full parameters."""
    for entry in mapping(model):
        yield from zip(entry.hf_names, entry.transform.split(parameters[entry.name]), strict=True)


def _vision(model: ModelConfig) -> Iterator[Entry]:
    vision = model.vision
    qkv = GroupedQKV(vision.num_heads, vision.hidden_size // vision.num_heads)
    ours, theirs = "vision", "model.vision_tower"
    embeddings = f"{theirs}.embeddings"
    yield Entry(f"{ours}.class_embedding", (f"{embeddings}.cls_token",), Same())
    yield Entry(f"{ours}.position_embedding", (f"{embeddings}.position_embeddings",), Same())
    for leaf in ("weight", "bias"):
        projection = (f"{embeddings}.patch_embeddings.projection.{leaf}",)
        yield Entry(f"{ours}.patch_embedding.{leaf}", projection, Same())
    norm_leaves = ("weight", "bias") if vision.norm == "layer_norm" else ("weight",)
    for index in range(vision.num_layers):
        layer, hf = f"{ours}.encoder.layers.{index}", f"{theirs}.encoder.layer.{index}"
        for leaf in norm_leaves:
            yield Entry(f"{layer}.input_layernorm.{leaf}", (f"{hf}.layernorm_before.{leaf}",), Same())
            yield Entry(f"{layer}.pre_mlp_layernorm.{leaf}", (f"{hf}.layernorm_after.{leaf}",), Same())
        for leaf in ("weight", "bias") if vision.qkv_bias else ("weight",):
            parts = tuple(f"{hf}.attention.{part}_proj.{leaf}" for part in "qkv")
            yield Entry(f"{layer}.self_attention.linear_qkv.{leaf}", parts, qkv)
        for part in "qk" if vision.qk_norm else "":
            name = f"{layer}.self_attention.{part}_norm.weight"
            yield Entry(name, (f"{hf}.attention.{part}_norm.weight",), Same())
        for leaf in ("weight", "bias"):
            out = (f"{hf}.attention.projection_layer.{leaf}",)
            yield Entry(f"{layer}.self_attention.linear_proj.{leaf}", out, Same())
            yield Entry(f"{layer}.mlp.linear_fc1.{leaf}", (f"{hf}.mlp.fc1.{leaf}",), Same())
            yield Entry(f"{layer}.mlp.linear_fc2.{leaf}", (f"{hf}.mlp.fc2.{leaf}",), Same())
        yield Entry(f"{layer}.ls1", (f"{hf}.lambda_1",), Same())
        yield Entry(f"{layer}.ls2", (f"{hf}.lambda_2",), Same())


def _projector() -> Iterator[Entry]:
    for part, hf_part in (("norm", "layer_norm"), ("linear_1", "linear_1"), ("linear_2", "linear_2")):
        for leaf in ("weight", "bias"):
            hf_name = f"model.multi_modal_projector.{hf_part}.{leaf}"
            yield Entry(f"vision.projector.{part}.{leaf}", (hf_name,), Same())


def _language(model: ModelConfig) -> Iterator[Entry]:
    language = model.language
    vocab = PaddedVocab(language.vocab_size, padded_vocab_size(language.vocab_size))
    qkv = GroupedQKV(language.num_kv_heads, language.head_size)
    theirs = "model.language_model"
    yield Entry("language.embedding.word_embeddings.weight", (f"{theirs}.embed_tokens.weight",), vocab)
    for index in range(language.num_layers):
        layer, hf = f"language.decoder.layers.{index}", f"{theirs}.layers.{index}"
        yield Entry(f"{layer}.input_layernorm.weight", (f"{hf}.input_layernorm.weight",), Same())
        yield Entry(f"{layer}.pre_mlp_layernorm.weight", (f"{hf}.post_attention_layernorm.weight",), Same())
        for leaf in ("weight", "bias") if language.qkv_bias else ("weight",):
            parts = tuple(f"{hf}.self_attn.{part}_proj.{leaf}" for part in "qkv")
            yield Entry(f"{layer}.self_attention.linear_qkv.{leaf}", parts, qkv)
        yield Entry(f"{layer}.self_attention.linear_proj.weight", (f"{hf}.self_attn.o_proj.weight",), Same())
        gate_up = (f"{hf}.mlp.gate_proj.weight", f"{hf}.mlp.up_proj.weight")
        yield Entry(f"{layer}.mlp.linear_fc1.weight", gate_up, GateUp())
        yield Entry(f"{layer}.mlp.linear_fc2.weight", (f"{hf}.mlp.down_proj.weight",), Same())
    yield Entry("language.decoder.final_layernorm.weight", (f"{theirs}.norm.weight",), Same())
    yield Entry("language.output_layer.weight", ("lm_head.weight",), vocab)
