"""The one table of parameter names: ours, InternVL's and transformers'.

Ours are those of `Model.named_parameters`: independent of the layout, with one number per layer. `internvl-chat` is the
layout of OpenGVLab's `InternVLChatModel`; its 9B stores the language model under InternLM2's names, q, k and v fused.
`transformers` is the layout of `InternVLForConditionalGeneration` as `save_pretrained` writes it; in memory the same
tensors have other names (`on_disk_name` knows them). There, 9B is a Llama: transformers has no InternLM2, and Llama
without biases is what InternLM3 computes.

A row gives the shape over all ranks in the letters of `_sizes`, and how the parameter is made of Hugging Face tensors:
`{q,k,v}` in a name stands for three tensors, `*` for the layer's number.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch

from checkpoint_convert.transforms import GateUp, GroupedQKV, PaddedVocab, Same, ThirdsQKV, Transform
from internvl_megatron.config.schema import ModelConfig, padded_vocab_size
from internvl_megatron.errors import CheckpointError

Layout = Literal["internvl-chat", "transformers"]

Kind = Literal["same", "vision_qkv", "language_qkv", "gate_up", "vocab"]


class Row(NamedTuple):
    """One kind of parameter."""

    ours: str
    shape: str
    chat: str
    transformers: str
    kind: Kind = "same"
    only_with: str = ""
    """Feature a model must have for it to have the parameter (`_features`)."""


VISION = (
    Row("class_embedding", "1 1 H", "embeddings.class_embedding", "embeddings.cls_token"),
    Row("position_embedding", "1 N H", "embeddings.position_embedding", "embeddings.position_embeddings"),
    Row("patch_embedding.weight", "H 3 P P", "embeddings.patch_embedding.weight", "embeddings.patch_embeddings.projection.weight"),
    Row("patch_embedding.bias", "H", "embeddings.patch_embedding.bias", "embeddings.patch_embeddings.projection.bias"),
    Row("encoder.layers.*.input_layernorm.weight", "H", "encoder.layers.*.norm1.weight", "encoder.layer.*.layernorm_before.weight"),
    Row("encoder.layers.*.input_layernorm.bias", "H", "encoder.layers.*.norm1.bias", "encoder.layer.*.layernorm_before.bias", only_with="layer_norm"),
    Row("encoder.layers.*.self_attention.linear_qkv.weight", "3H H", "encoder.layers.*.attn.qkv.weight", "encoder.layer.*.attention.{q,k,v}_proj.weight", "vision_qkv"),
    Row("encoder.layers.*.self_attention.linear_qkv.bias", "3H", "encoder.layers.*.attn.qkv.bias", "encoder.layer.*.attention.{q,k,v}_proj.bias", "vision_qkv", "vision_qkv_bias"),
    Row("encoder.layers.*.self_attention.q_norm.weight", "H", "encoder.layers.*.attn.q_norm.weight", "encoder.layer.*.attention.q_norm.weight", only_with="qk_norm"),
    Row("encoder.layers.*.self_attention.k_norm.weight", "H", "encoder.layers.*.attn.k_norm.weight", "encoder.layer.*.attention.k_norm.weight", only_with="qk_norm"),
    Row("encoder.layers.*.self_attention.linear_proj.weight", "H H", "encoder.layers.*.attn.proj.weight", "encoder.layer.*.attention.projection_layer.weight"),
    Row("encoder.layers.*.self_attention.linear_proj.bias", "H", "encoder.layers.*.attn.proj.bias", "encoder.layer.*.attention.projection_layer.bias"),
    Row("encoder.layers.*.ls1", "H", "encoder.layers.*.ls1", "encoder.layer.*.lambda_1"),
    Row("encoder.layers.*.pre_mlp_layernorm.weight", "H", "encoder.layers.*.norm2.weight", "encoder.layer.*.layernorm_after.weight"),
    Row("encoder.layers.*.pre_mlp_layernorm.bias", "H", "encoder.layers.*.norm2.bias", "encoder.layer.*.layernorm_after.bias", only_with="layer_norm"),
    Row("encoder.layers.*.mlp.linear_fc1.weight", "F H", "encoder.layers.*.mlp.fc1.weight", "encoder.layer.*.mlp.fc1.weight"),
    Row("encoder.layers.*.mlp.linear_fc1.bias", "F", "encoder.layers.*.mlp.fc1.bias", "encoder.layer.*.mlp.fc1.bias"),
    Row("encoder.layers.*.mlp.linear_fc2.weight", "H F", "encoder.layers.*.mlp.fc2.weight", "encoder.layer.*.mlp.fc2.weight"),
    Row("encoder.layers.*.mlp.linear_fc2.bias", "H", "encoder.layers.*.mlp.fc2.bias", "encoder.layer.*.mlp.fc2.bias"),
    Row("encoder.layers.*.ls2", "H", "encoder.layers.*.ls2", "encoder.layer.*.lambda_2"),
)  # fmt: skip

PROJECTOR = (
    Row("norm.weight", "U", "0.weight", "layer_norm.weight"),
    Row("norm.bias", "U", "0.bias", "layer_norm.bias"),
    Row("linear_1.weight", "D U", "1.weight", "linear_1.weight"),
    Row("linear_1.bias", "D", "1.bias", "linear_1.bias"),
    Row("linear_2.weight", "D D", "3.weight", "linear_2.weight"),
    Row("linear_2.bias", "D", "3.bias", "linear_2.bias"),
)

# The fourth column is what Qwen2, Llama and InternLM3 share; the third is InternLM2's, whose fused rows are Megatron's.
LANGUAGE = (
    Row("embedding.word_embeddings.weight", "V D", "model.tok_embeddings.weight", "model.embed_tokens.weight", "vocab"),
    Row("decoder.layers.*.input_layernorm.weight", "D", "model.layers.*.attention_norm.weight", "model.layers.*.input_layernorm.weight"),
    Row("decoder.layers.*.self_attention.linear_qkv.weight", "Q D", "model.layers.*.attention.wqkv.weight", "model.layers.*.self_attn.{q,k,v}_proj.weight", "language_qkv"),
    Row("decoder.layers.*.self_attention.linear_qkv.bias", "Q", "model.layers.*.attention.wqkv.bias", "model.layers.*.self_attn.{q,k,v}_proj.bias", "language_qkv", "language_qkv_bias"),
    Row("decoder.layers.*.self_attention.linear_proj.weight", "D A", "model.layers.*.attention.wo.weight", "model.layers.*.self_attn.o_proj.weight"),
    Row("decoder.layers.*.pre_mlp_layernorm.weight", "D", "model.layers.*.ffn_norm.weight", "model.layers.*.post_attention_layernorm.weight"),
    Row("decoder.layers.*.mlp.linear_fc1.weight", "2M D", "model.layers.*.feed_forward.{w1,w3}.weight", "model.layers.*.mlp.{gate,up}_proj.weight", "gate_up"),
    Row("decoder.layers.*.mlp.linear_fc2.weight", "D M", "model.layers.*.feed_forward.w2.weight", "model.layers.*.mlp.down_proj.weight"),
    Row("decoder.final_layernorm.weight", "D", "model.norm.weight", "model.norm.weight"),
    Row("output_layer.weight", "V D", "output.weight", "lm_head.weight", "vocab"),
)  # fmt: skip

PREFIXES: dict[Layout, dict[str, str]] = {
    "internvl-chat": {"vision": "vision_model.", "projector": "mlp1.", "language": "language_model."},
    "transformers": {"vision": "vision_tower.", "projector": "multi_modal_projector.", "language": "language_model."},
}
"""What a part's names start with. A part that is a checkpoint of its own has its names without it."""

_RUN_TIME_PREFIXES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", ""),
)


@dataclass(frozen=True)
class Entry:
    """One of our parameters and the Hugging Face tensors it is made of."""

    name: str
    shape: tuple[int, ...]
    """Over all ranks."""
    hf_names: tuple[str, ...]
    transform: Transform

    @cached_property
    def hf_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the Hugging Face tensors."""
        parts = self.transform.split(torch.empty(self.shape, device=torch.device("meta")))
        return tuple(tuple(part.shape) for part in parts)

    @property
    def part(self) -> str:
        """Part of the model: vision, projector or language."""
        return "projector" if self.name.startswith("vision.projector.") else self.name.partition(".")[0]


def mapping(model: ModelConfig, layout: Layout) -> list[Entry]:
    """Every parameter of the model, each exactly once."""
    return list(_entries(model, layout))


def on_disk_name(name: str) -> str:
    """transformers' on-disk name of a tensor, from that or from its name in memory (`model.` in front of the parts)."""
    in_memory = name.startswith(
        ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.", "lm_head.")
    )
    if in_memory:
        for before, after in _RUN_TIME_PREFIXES:
            if name.startswith(before):
                return after + name.removeprefix(before)
    return name


def in_memory_name(name: str) -> str:
    """transformers' name of a tensor in memory, from that on disk."""
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.", 1)


def check_fit(entries: list[Entry], shapes: Mapping[str, tuple[int, ...]], where: str, hint: str = "") -> None:
    """Compare the tensors that are there with those the table asks for.

    Raises:
        CheckpointError: some are missing, left over, or of the wrong shape; lists all of them.
    """
    wanted = {name: shape for entry in entries for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)}
    problems = [f"missing   {name} {list(shape)}" for name, shape in wanted.items() if name not in shapes]
    # A file may call its tensors anything, line ends and terminal codes included.
    problems += [f"unknown   {_printable(name)} {list(shape)}" for name, shape in shapes.items() if name not in wanted]
    problems += [
        f"mis-shaped {name}: {list(shapes[name])}, the model has {list(shape)}"
        for name, shape in wanted.items()
        if name in shapes and shapes[name] != shape
    ]
    if problems:
        lines = "\n  ".join(problems)
        raise CheckpointError(f"{where}: {len(problems)} tensors do not fit the configuration{hint}\n  {lines}")


def _printable(name: str) -> str:
    return name if name.isprintable() else repr(name)


def _entries(model: ModelConfig, layout: Layout) -> Iterator[Entry]:
    sizes, features = _sizes(model), _features(model)
    fused = layout == "internvl-chat" and model.language.family == "internlm"
    tables = (
        ("vision", "vision.", VISION, layout == "internvl-chat", model.vision.num_layers),
        ("projector", "vision.projector.", PROJECTOR, layout == "internvl-chat", 1),
        ("language", "language.", LANGUAGE, fused, model.language.num_layers),
    )
    for part, prefix, rows, uses_chat_column, num_layers in tables:
        hf_prefix = PREFIXES[layout][part]
        before, inside, after = _by_layer([row for row in rows if not row.only_with or features[row.only_with]])
        numbered = [(row, "") for row in before]
        numbered += [(row, str(layer)) for layer in range(num_layers) for row in inside]
        numbered += [(row, "") for row in after]
        for row, layer in numbered:
            hf_name = row.chat if uses_chat_column else row.transformers
            names = tuple(hf_prefix + name.replace("*", layer) for name in _expanded(hf_name))
            yield Entry(
                name=prefix + row.ours.replace("*", layer),
                shape=tuple(sizes[letter] for letter in row.shape.split()),
                hf_names=names,
                transform=_transform(row.kind, len(names), model),
            )


def _by_layer(rows: list[Row]) -> tuple[list[Row], list[Row], list[Row]]:
    """Rows before the layers, of every layer, and after them."""
    inside = [row for row in rows if "*" in row.ours]
    if not inside:
        return rows, [], []
    first, last = rows.index(inside[0]), rows.index(inside[-1])
    return rows[:first], inside, rows[last + 1 :]


def _sizes(model: ModelConfig) -> dict[str, int]:
    """H, F, P, N: the encoder's width, feed-forward width, patch side, positions; U: width of an unshuffled token; D, M, A,
    Q, V: the language model's width, feed-forward width, width of all heads, rows of q, k and v, padded vocabulary."""
    vision, language = model.vision, model.language
    heads = language.num_heads * language.head_size
    letters = {
        "H": vision.hidden_size,
        "F": vision.ffn_hidden_size,
        "P": vision.patch_pixels,
        "N": 1 + vision.patches_per_side**2,
        "U": vision.hidden_size * vision.shuffle_factor**2,
        "D": language.hidden_size,
        "M": language.ffn_hidden_size,
        "A": heads,
        "Q": heads + 2 * language.num_kv_heads * language.head_size,
        "V": padded_vocab_size(language.vocab_size),
    }
    return letters | {"1": 1, "3": 3, "3H": 3 * letters["H"], "2M": 2 * letters["M"]}


def _features(model: ModelConfig) -> dict[str, bool]:
    return {
        "layer_norm": model.vision.norm == "layer_norm",
        "vision_qkv_bias": model.vision.qkv_bias,
        "qk_norm": model.vision.qk_norm,
        "language_qkv_bias": model.language.qkv_bias,
    }


def _expanded(name: str) -> list[str]:
    """`a.{q,k}.b` to `a.q.b`, `a.k.b`."""
    choices = re.search(r"\{([^}]*)\}", name)
    return [name] if choices is None else [name.replace(choices[0], choice) for choice in choices[1].split(",")]


def _transform(kind: Kind, num_tensors: int, model: ModelConfig) -> Transform:
    vision, language = model.vision, model.language
    if kind == "vision_qkv":
        grouped = GroupedQKV(vision.num_heads, vision.hidden_size // vision.num_heads)
        return ThirdsQKV(grouped) if num_tensors == 1 else grouped
    if kind == "language_qkv":
        return Same() if num_tensors == 1 else GroupedQKV(language.num_kv_heads, language.head_size)
    if kind == "gate_up":
        return GateUp()
    if kind == "vocab":
        return PaddedVocab(language.vocab_size, padded_vocab_size(language.vocab_size))
    return Same()
