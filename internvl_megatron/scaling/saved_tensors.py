"""What a layer of the language model keeps of a row until its backward pass, on one rank, module by module.

Transformer Engine's layers are **modelled**: read from its source (2.20.2, what its modules save for backward), seen on no GPU. Scales
and amax of FP8 are left out. torch's are those that run on a CPU, where they are counted (`tools.dry_run`). A tensor that two modules keep
counts with the first.

Letters: T tensor-parallel, C context-parallel ranks; D width, H queries' and G keys' values of a token, F of the feed-forward layer.
"""

from dataclasses import dataclass
from typing import Literal

from internvl_megatron.config.schema import LanguageConfig, RunConfig

LayerKind = Literal["torch", "transformer_engine"]
BF16, FP32, FP8 = 2, 4, 1
FP8_WEIGHT_BYTES = 2
"""Of a parameter in a layer in FP8, beside its own: as it is multiplied forward and, transposed, backward."""


@dataclass(frozen=True)
class SavedBytes:
    """Bytes of one layer and one row."""

    norm_and_qkv: float
    attention: float
    projection: float
    norm_and_gate_up: float
    activation: float
    down: float

    @property
    def total(self) -> float:
        """Of the layer."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class LayerShape:
    """A layer's part on one rank."""

    language: LanguageConfig
    tokens_per_row: int
    tensor_size: int = 1
    context_size: int = 1
    sequence_parallel: bool = False

    @property
    def tokens(self) -> float:
        """Of the rank, where heads are divided over tensor-parallel ranks."""
        return self.tokens_per_row / self.context_size

    @property
    def tokens_between(self) -> float:
        """Of the rank between layers, where widths are whole."""
        return self.tokens / (self.tensor_size if self.sequence_parallel else 1)

    @property
    def query_width(self) -> float:
        """Values of a token in the rank's queries."""
        return self.language.num_heads * self.language.head_size / self.tensor_size

    @property
    def key_width(self) -> float:
        """The same of its keys: there is a head at least on every rank that attends."""
        ranks = self.tensor_size * self.context_size
        return max(self.language.num_kv_heads, ranks) * self.language.head_size / self.tensor_size


def layer_shape(config: RunConfig) -> LayerShape:
    """Of a configuration."""
    parallel = config.parallel
    return LayerShape(
        config.model.language,
        config.data.tokens_per_row,
        parallel.tensor_size,
        parallel.context_size,
        parallel.sequence_parallel,
    )


def saved_bytes(shape: LayerShape, kind: LayerKind, in_fp8: bool = False) -> SavedBytes:
    """Closed form, parameters in bf16."""
    return _of_torch(shape) if kind == "torch" else _of_transformer_engine(shape, FP8 if in_fp8 else BF16)


def _of_transformer_engine(shape: LayerShape, product_bytes: int) -> SavedBytes:
    """`LayerNormLinear`: its input, a number a token, what the norm makes of it, as it is multiplied. `Linear`: its input likewise.
    `DotProductAttention` (cuDNN): queries, keys, values, output, and a sum a token and head. The activation (Megatron Core's fused
    SwiGLU): gate and up. Rotary embedding keeps nothing of a row."""
    width, feed_forward = shape.language.hidden_size, shape.language.ffn_hidden_size / shape.tensor_size
    queries, heads = shape.query_width, shape.query_width / shape.language.head_size
    norm = shape.tokens_between * ((BF16 + product_bytes) * width + FP32)
    attention = shape.tokens * (BF16 * (2 * queries + 2 * shape.key_width) + FP32 * heads)
    # Attention's own output, unless it was traded for tokens or is rounded.
    is_another = shape.context_size > 1 or product_bytes != BF16
    return SavedBytes(
        norm_and_qkv=norm,
        attention=attention,
        projection=shape.tokens * product_bytes * queries * is_another,
        norm_and_gate_up=norm,
        activation=shape.tokens * BF16 * 2 * feed_forward,
        down=shape.tokens * product_bytes * feed_forward,
    )


def _of_torch(shape: LayerShape) -> SavedBytes:
    """A norm's input and what it is scaled to, both in fp32, and its output; keys and values once for every query's head; attention's
    output in two orders; gate and up, the gate's activation, up once more, and the product."""
    width, feed_forward = shape.language.hidden_size, shape.language.ffn_hidden_size / shape.tensor_size
    queries, heads = shape.query_width, shape.query_width / shape.language.head_size
    norm = shape.tokens_between * ((2 * FP32 + BF16) * width + FP32)
    # Queries that were traded lie in the memory of the message, beside keys and values that are copied from there.
    message = 2 * shape.key_width if shape.context_size > 1 and shape.key_width < queries else 0.0
    return SavedBytes(
        norm_and_qkv=norm,
        attention=shape.tokens * (BF16 * (4 * queries + message) + FP32 * heads),
        projection=shape.tokens * BF16 * queries,
        norm_and_gate_up=norm,
        activation=shape.tokens * BF16 * 4 * feed_forward,
        down=shape.tokens * BF16 * feed_forward,
    )
