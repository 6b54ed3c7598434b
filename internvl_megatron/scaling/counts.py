"""Parameters and floating-point operations of a model, in closed form, by part.

Letters follow the spec: H, F, L of the vision encoder (width, feed-forward width, layers), D, G, M of the language model
(width, feed-forward width, layers), V its vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from internvl_megatron.config.schema import LanguageConfig, ModelConfig, RunConfig, VisionConfig, padded_vocab_size

Trained = Literal["weights", "adapters", "nothing"]
"""What a step trains of a part of the model."""

BACKWARD_AND_FORWARD = 3
"""A training step's matrix products over those of its forward pass: one more for inputs, one more for weights."""

_PIXEL_CHANNELS = 3


@dataclass(frozen=True)
class PartCounts:
    """A number for each part of the model."""

    vision: int
    projector: int
    language: int

    @property
    def total(self) -> int:
        """All three parts."""
        return self.vision + self.projector + self.language


@dataclass(frozen=True)
class LanguageFlops:
    """FLOPs of a forward pass through all of the language model, for one of each."""

    per_token: int
    """For a token in the layers, attention not counted."""
    per_prediction: int
    """For a position in the output layer."""
    per_attention_pair: int
    """For two tokens of a sample; causal attention looks at half of the pairs, so this counts half of one."""


def parameter_counts(model: ModelConfig, padded_vocab: bool = False) -> PartCounts:
    """Parameters of each part; input embedding and output layer are two tables.

    Args:
        model: sizes.
        padded_vocab: count the rows the tables really have in memory instead of the real vocabulary.
    """
    vocab_rows = padded_vocab_size(model.language.vocab_size) if padded_vocab else model.language.vocab_size
    return PartCounts(
        vision=_vision_parameters(model.vision),
        projector=_projector_parameters(model),
        language=_language_parameters(model.language, vocab_rows),
    )


@dataclass(frozen=True)
class TrainedParts:
    """What a step trains, and so how much of a backward pass each part of the model needs."""

    vision: Trained = "weights"
    projector: Trained = "weights"
    language: Trained = "weights"

    @classmethod
    def of(cls, config: RunConfig) -> "TrainedParts":
        """As a run has it: of a part with adapters they are alone."""
        parts, lora = config.optimizer, config.lora
        return cls(
            vision=_trained(parts.vision.trainable, lora.vision_rank),
            projector=_trained(parts.projector.trainable, None),
            language=_trained(parts.language.trainable, lora.language_rank),
        )


def _trained(trainable: bool, adapter_rank: int | None) -> Trained:
    if not trainable:
        return "nothing"
    return "weights" if adapter_rank is None else "adapters"


ALL_PARTS = TrainedParts()


@dataclass(frozen=True)
class _Products:
    """FLOPs of matrix products in a forward pass: with weights, and of activations with each other."""

    weights: int
    attention: int

    def step(self, trained: Trained, is_above_trained: bool) -> int:
        """FLOPs of forward and backward passes, in a part with or without trained parts below it.

        Backward, a product with weights is one product for the gradient of its input and one for that of its weights; in attention
        both factors are activations. What is frozen has no gradients of weights, and with nothing trained below it no backward pass.
        """
        if trained == "nothing" and not is_above_trained:
            return self.weights + self.attention
        weights = BACKWARD_AND_FORWARD if trained == "weights" else BACKWARD_AND_FORWARD - 1
        return weights * self.weights + BACKWARD_AND_FORWARD * self.attention


def forward_flops(model: ModelConfig, num_tokens: int, num_tiles: int, attention_pairs: int) -> PartCounts:
    """FLOPs of the matrix products of one forward pass, 2 per multiply-add, with the output layer at every token.

    Counted: linear layers, the patch embedding, attention scores and weighted sums. Attention in the language model is
    causal and counted as half of all pairs; in the vision encoder every token of a tile sees every other, class token
    included. The output layer counts the real vocabulary. Not counted: padding tokens, norms, activations, rotary
    embedding, softmax, loss, and the same for every layout.

    Args:
        model: sizes.
        num_tokens: tokens through the language model, image tokens included, padding not.
        num_tiles: tiles through the vision encoder.
        attention_pairs: sum over all samples of their length squared (`StepAgreement.attention_pairs`).
    """
    language = model.language
    layers = language.num_layers * layer_flops(language, num_tokens, attention_pairs)
    return PartCounts(
        vision=num_tiles * _encoder_flops(model.vision),
        projector=num_tiles * _projector_flops(model),
        language=layers + output_layer_flops(language, num_tokens),
    )


def tile_flops(model: ModelConfig) -> int:
    """FLOPs of one tile through vision encoder and projector in a forward pass."""
    return _encoder_flops(model.vision) + _projector_flops(model)


def layer_flops[Number: (int, np.ndarray)](
    language: LanguageConfig, num_tokens: Number, attention_pairs: Number
) -> Number:
    """FLOPs of one layer of the language model in a forward pass; numbers as in `forward_flops`."""
    # Scores and weighted sum take 4 * heads * head size for a pair; causal attention looks at half of the pairs.
    attention = 2 * attention_pairs * language.num_heads * language.head_size
    return 2 * num_tokens * _language_layer_weights(language) + attention


def output_layer_flops[Number: (int, np.ndarray)](language: LanguageConfig, num_tokens: Number) -> Number:
    """FLOPs of the output layer in a forward pass over so many tokens; the trainer asks for supervised ones alone."""
    return 2 * num_tokens * language.hidden_size * language.vocab_size


def step_flops(
    model: ModelConfig,
    num_tokens: int,
    num_tiles: int,
    attention_pairs: int,
    num_supervised_tokens: int,
    trained: TrainedParts = ALL_PARTS,
) -> PartCounts:
    """FLOPs of one training step over all ranks, forward and backward.

    This is the work that the model and what is trained of it need ("model FLOPs"), with the vision encoder counted: three times
    the forward pass of a part that is trained, twice that of a frozen one with something trained below it (attention three times,
    which has no weights), and once that of what gradients do not reach. The output layer is counted where the trainer computes
    it, at the tokens that carry loss. Not in it: what is computed a second time to save memory, passes of MPO's reference,
    padding, dummy tiles, and the products of adapters, which are small.

    Args:
        model: sizes.
        num_tokens: as the two below, see `forward_flops`; all numbers are of the global batch.
        num_tiles: of all images.
        attention_pairs: of all samples.
        num_supervised_tokens: tokens that carry loss, or where else the output layer is to be counted.
        trained: what is trained.
    """
    language, vision = model.language, model.vision
    encoder = _Products(num_tiles * _encoder_weight_flops(vision), num_tiles * _encoder_attention_flops(vision))
    layers = language.num_layers * layer_flops(language, num_tokens, 0)
    decoder = _Products(
        weights=layers + output_layer_flops(language, num_supervised_tokens),
        attention=language.num_layers * layer_flops(language, 0, attention_pairs),
    )
    trains_vision = trained.vision != "nothing"
    trains_images = num_tiles > 0 and (trains_vision or trained.projector != "nothing")
    return PartCounts(
        vision=encoder.step(trained.vision, is_above_trained=False),
        projector=_Products(num_tiles * _projector_flops(model), 0).step(trained.projector, trains_vision),
        language=decoder.step(trained.language, trains_images),
    )


def language_flops(language: LanguageConfig) -> LanguageFlops:
    """What the language model's part of `forward_flops` is made of."""
    num_layers = language.num_layers
    return LanguageFlops(
        per_token=num_layers * layer_flops(language, 1, 0),
        per_prediction=output_layer_flops(language, 1),
        per_attention_pair=num_layers * layer_flops(language, 0, 1),
    )


def language_layer_parameters(language: LanguageConfig) -> int:
    """Of one layer: matrices, biases and two norms."""
    qkv_bias = _qkv_rows(language) if language.qkv_bias else 0
    return _language_layer_weights(language) + qkv_bias + 2 * language.hidden_size


def _patch_values(vision: VisionConfig) -> int:
    """Input values of one patch."""
    return _PIXEL_CHANNELS * vision.patch_pixels**2


def _vision_layer_weights(vision: VisionConfig) -> int:
    """Entries of a layer's weight matrices: q, k, v, output projection, two of the MLP."""
    return 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.ffn_hidden_size


def _vision_parameters(vision: VisionConfig) -> int:
    width = vision.hidden_size
    class_and_positions = width * (1 + 1 + vision.patches_per_side**2)
    patch_embedding = (_patch_values(vision) + 1) * width
    norm = 2 * width if vision.norm == "layer_norm" else width
    qkv_bias = 3 * width if vision.qkv_bias else 0
    qk_norms = 2 * width if vision.qk_norm else 0
    other_biases = width + vision.ffn_hidden_size + width  # output projection, fc1, fc2
    layer_scales = 2 * width
    layer = _vision_layer_weights(vision) + qkv_bias + qk_norms + other_biases + 2 * norm + layer_scales
    return class_and_positions + patch_embedding + vision.num_layers * layer


def _encoder_flops(vision: VisionConfig) -> int:
    """Forward FLOPs of one tile through the vision encoder."""
    return _encoder_weight_flops(vision) + _encoder_attention_flops(vision)


def _encoder_weight_flops(vision: VisionConfig) -> int:
    """Of these, those with weights: the patch embedding, and the linear layers on patches and class token."""
    patches = vision.patches_per_side**2
    layer = 2 * (patches + 1) * _vision_layer_weights(vision)
    return 2 * patches * _patch_values(vision) * vision.hidden_size + vision.num_layers * layer


def _encoder_attention_flops(vision: VisionConfig) -> int:
    """The others: scores and weighted sums."""
    tokens = vision.patches_per_side**2 + 1
    return vision.num_layers * 4 * tokens**2 * vision.hidden_size


def _projector_weights(model: ModelConfig) -> int:
    """Entries of the projector's two matrices."""
    shuffled = model.vision.hidden_size * model.vision.shuffle_factor**2
    return (shuffled + model.language.hidden_size) * model.language.hidden_size


def _projector_flops(model: ModelConfig) -> int:
    """Forward FLOPs of one tile's tokens through the projector."""
    return 2 * model.vision.tokens_per_tile * _projector_weights(model)


def _projector_parameters(model: ModelConfig) -> int:
    norm = 2 * model.vision.hidden_size * model.vision.shuffle_factor**2
    return norm + _projector_weights(model) + 2 * model.language.hidden_size


def _qkv_rows(language: LanguageConfig) -> int:
    return (language.num_heads + 2 * language.num_kv_heads) * language.head_size


def _language_layer_weights(language: LanguageConfig) -> int:
    """Entries of a layer's weight matrices: q, k, v, output projection, three of the gated MLP."""
    attention = (_qkv_rows(language) + language.num_heads * language.head_size) * language.hidden_size
    return attention + 3 * language.hidden_size * language.ffn_hidden_size


def _language_parameters(language: LanguageConfig, vocab_rows: int) -> int:
    tables = 2 * vocab_rows * language.hidden_size
    return tables + language.num_layers * language_layer_parameters(language) + language.hidden_size
