"""What is measured on one GPU: models of released sizes, number formats, packed rows, and how many layers fit.

Rows are drawn as `scaling/drawn_rows.py` says, half of their tokens image tokens, with V2PE positions whose step is drawn per image. A
model that does not fit with its optimizer state gives up memory for time as `WAYS` says, and where that is not enough keeps
its vision encoder, projector, embedding and head, and as many layers as fit. `dry` is everything at a width that a CPU can do.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np

from internvl_megatron.config.models import INTERNVIT_6B, INTERNVL3
from internvl_megatron.config.overrides import apply_overrides
from internvl_megatron.config.schema import (
    DataConfig,
    Fp8Config,
    LanguageConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    VisionConfig,
)
from internvl_megatron.data.positions import STRIDES, UNITS_PER_POSITION, v2pe_numerators
from internvl_megatron.data.rows import Row
from internvl_megatron.device import DeviceName
from internvl_megatron.scaling.counts import parameter_counts
from internvl_megatron.scaling.drawn_rows import TILE_TOKENS, PackedRow, draw_rows
from internvl_megatron.scaling.memory import OTHER_BYTES, USED_SHARE, tile_activation_bytes
from internvl_megatron.scaling.saved_tensors import FP8_WEIGHT_BYTES, LayerShape, saved_bytes
from tools.image_text_rows import small_row

Size = Literal["1B", "2B", "8B"]
SIZES: tuple[Size, ...] = ("1B", "2B", "8B")

Precision = Literal["bf16", "fp8_current", "fp8_blockwise", "fp8_delayed"]
PRECISIONS: dict[Precision, Fp8Config] = {
    "bf16": Fp8Config(),
    # The language model alone: rounding costs InternViT-300M, 1024 wide, more than products in FP8 save it (`benchmark gpu vision`).
    "fp8_current": Fp8Config(language="current"),
    "fp8_blockwise": Fp8Config(language="blockwise"),
    "fp8_delayed": Fp8Config(language="delayed"),
}

IMAGE_TOKEN = 151667
"""`<IMG_CONTEXT>` of the released tokenizer."""
IMAGE_SHARE = 0.5
TILES_PER_ROW = {4096: 16, 16384: 48}
"""Tile budgets by the token budget: an image of 13 tiles fits the smaller, the larger is InternVL2.5's."""
ROWS_PER_STEP = {4096: 8, 16384: 4}
ROW_LENGTHS = tuple(TILES_PER_ROW)
SEED = 1


@dataclass(frozen=True)
class Way:
    """What is given up for memory."""

    moments: Literal["fp32", "bf16"] = "fp32"
    """Of AdamW."""
    vision_recompute: Literal["none", "full"] = "full"
    """Without, tiles are encoded for few rows at a time, whose activations stay until the rows are through."""
    chunk_tiles: int = 16
    """Tiles side by side in the encoder: more keep a GPU busier."""

    @property
    def name(self) -> str:
        """For the command line."""
        return f"{self.moments}-{self.vision_recompute}-{self.chunk_tiles}"

    @property
    def state_bytes(self) -> int:
        """Of a parameter: bf16 weight, and in fp32 gradient, weight and, maybe, two moments of Adam."""
        return 18 if self.moments == "fp32" else 14


KEPT_TILES = Way("bf16", "none", 16)
"""Rows of 4K one by one, and their tiles' activations kept: the encoder is not run again, which is 4 % of the 8B's FLOPs."""
WAYS = (
    Way("fp32", "none", 32),
    Way("fp32", "full", 32),
    Way("fp32", "full", 24),
    KEPT_TILES,
    Way("bf16", "full", 24),
)
"""The first that the whole model fits with is taken, else the last."""


@dataclass(frozen=True)
class Case:
    """One measurement of a training step."""

    size: Size
    precision: Precision
    tokens_per_row: int
    num_layers: int
    """Of the language model; fewer than the released size's where they do not fit."""
    overrides: tuple[str, ...] = ()
    """`section.field=value` on top of everything."""
    is_dry: bool = False
    way: Way = Way()

    @property
    def name(self) -> str:
        """For files and tables."""
        return f"{self.size} {self.precision} {self.tokens_per_row // 1024}K"

    @property
    def full_layers(self) -> int:
        """Layers of the whole language model."""
        return model_of(self.size, self.is_dry).language.num_layers

    @property
    def model(self) -> ModelConfig:
        """Cut to its layers."""
        model = model_of(self.size, self.is_dry)
        return replace(model, language=replace(model.language, num_layers=self.num_layers))

    def config(self, device: DeviceName) -> RunConfig:
        """A run of it."""
        return apply_overrides(
            run_config(self.name, self.model, self.tokens_per_row, PRECISIONS[self.precision], device, self.way),
            self.overrides,
        )

    @property
    def rows(self) -> list[Row]:
        """Of every step: the same ones each time."""
        return benchmark_rows(self.model, ROWS_PER_STEP[self.tokens_per_row], self.tokens_per_row)


def run_config(
    name: str, model: ModelConfig, tokens_per_row: int, fp8: Fp8Config, device: DeviceName, way: Way = Way()
) -> RunConfig:
    """A training run on one device; `tokens_per_row` at 256 tokens a tile."""
    window = window_rows(tokens_per_row, way.chunk_tiles) if way.vision_recompute == "none" else None
    return RunConfig(
        name=name,
        model=model,
        data=DataConfig(
            meta="none",  # rows are drawn, not read
            tokenizer="none",
            tokens_per_row=tokens_per_row * model.vision.tokens_per_tile // TILE_TOKENS,
            tiles_per_row=TILES_PER_ROW[tokens_per_row],
        ),
        parallel=ParallelConfig(
            vision_chunk_tiles=way.chunk_tiles,
            vision_recompute=way.vision_recompute,
            vision_window_rows=window,
            pad_rows=False,
        ),
        fp8=fp8,
        loss=LossConfig(weighting="token"),
        optimizer=OptimizerConfig(learning_rate=1e-5, moments=way.moments),
        rows_per_step=ROWS_PER_STEP[tokens_per_row],
        dtype="bf16",
        device=device,
    )


def model_of(size: Size, is_dry: bool) -> ModelConfig:
    """A released size, or a tiny model that stands for it."""
    if not is_dry:
        return INTERNVL3[size]
    return ModelConfig(
        vision=dry_vision(),
        language=LanguageConfig(
            hidden_size=128,
            num_layers={"1B": 2, "2B": 3, "8B": 4}[size],
            num_heads=2,
            num_kv_heads=1,
            head_size=64,
            ffn_hidden_size=256,
            vocab_size=512,
        ),
    )


def dry_vision(like: Literal["300M", "6B"] = "300M") -> VisionConfig:
    """A tiny encoder with the features of a released one; a tile is 16 tokens of the language model."""
    is_large = like == "6B"
    return VisionConfig(
        hidden_size=128,
        num_layers=2,
        num_heads=2,
        ffn_hidden_size=256,
        tile_pixels=56,
        patch_pixels=7,
        norm=INTERNVIT_6B.norm if is_large else "layer_norm",
        qkv_bias=not is_large,
        qk_norm=is_large,
    )


def window_rows(tokens_per_row: int, chunk_tiles: int) -> int:
    """Rows whose tiles are about a chunk; at least one."""
    return max(1, chunk_tiles // TILES_PER_ROW[tokens_per_row])


def layers_that_fit(model: ModelConfig, tokens_per_row: int, memory_bytes: float, way: Way = Way()) -> int:
    """Layers of the language model that can be trained on one device, in FP8 as well; at least one.

    An estimate of state and of activations: the language model's of one row, and those of tiles, which exist beside them, or,
    where they are computed again, when the others are gone. Who runs the case takes fewer where it was too high.
    """
    language = model.language

    def parameters(num_layers: int) -> int:
        cut = replace(model, language=replace(language, num_layers=num_layers))
        return parameter_counts(cut, padded_vocab=True).total

    layer_bytes = saved_bytes(LayerShape(language, tokens_per_row), "transformer_engine").total
    tile_bytes = tile_activation_bytes(model.vision)

    def needed(num_layers: int) -> float:
        state = way.state_bytes * parameters(num_layers) + FP8_WEIGHT_BYTES * (parameters(num_layers) - parameters(0))
        if way.vision_recompute == "none":
            tiles = window_rows(tokens_per_row, way.chunk_tiles) * TILES_PER_ROW[tokens_per_row]
            activations = num_layers * layer_bytes + tiles * tile_bytes
        else:
            activations = max(num_layers * layer_bytes, way.chunk_tiles * tile_bytes)
        return state + activations + OTHER_BYTES

    fitting = [count for count in range(1, language.num_layers + 1) if needed(count) <= USED_SHARE * memory_bytes]
    return max(fitting, default=1)


def best_way(model: ModelConfig, tokens_per_row: int, memory_bytes: float) -> tuple[Way, int]:
    """How to train a model on one device, and how many layers of it."""
    tried = [(way, layers_that_fit(model, tokens_per_row, memory_bytes, way)) for way in WAYS]
    return next((found for found in tried if found[1] == model.language.num_layers), tried[-1])


@cache
def _drawn(num_rows: int, tokens_per_row: int, tiles_per_row: int) -> tuple[PackedRow, ...]:
    """Sizes of rows: the same for every model."""
    return tuple(draw_rows(IMAGE_SHARE, num_rows, tokens_per_row, tiles_per_row, SEED))


def benchmark_rows(
    model: ModelConfig, num_rows: int, tokens_per_row: int, tiles_per_row: int | None = None
) -> list[Row]:
    """Packed rows; `tokens_per_row` at 256 tokens a tile, with the tile budget that belongs to it."""
    sizes = _drawn(num_rows, tokens_per_row, tiles_per_row or TILES_PER_ROW[tokens_per_row])
    return [marked(small_row(sizes[seed], model, tokens_per_row, seed), model, seed) for seed in range(num_rows)]


def image_token(model: ModelConfig) -> int:
    """The placeholder of image tokens: the released one, or the last of a smaller vocabulary."""
    return min(IMAGE_TOKEN, model.language.vocab_size - 1)


def marked(row: Row, model: ModelConfig, seed: int) -> Row:
    """The row with the image token where images are and nowhere else, and with V2PE positions, a drawn step per image."""
    per_tile, placeholder = model.vision.tokens_per_tile, image_token(model)
    token_ids = np.where(row.token_ids == placeholder, placeholder - 1, row.token_ids)
    token_ids[(row.tile_starts[:, None] + np.arange(per_tile)).ravel()] = placeholder
    positions = np.zeros_like(row.positions)
    strides = np.random.default_rng(seed).choice(STRIDES, len(row.images))
    lengths = np.array([image.num_tiles * per_tile for image in row.images], np.int64)
    for start, end in zip(row.sample_bounds[:-1], row.sample_bounds[1:], strict=True):
        own = np.flatnonzero((row.image_starts >= start) & (row.image_starts < end))
        # Counted from one token before the sample: a small copy may have lost the text before its image.
        numerators = v2pe_numerators(
            int(end - start) + 1,
            (row.image_starts[own] - start + 1).tolist(),
            lengths[own].tolist(),
            strides[own].tolist(),
        )
        positions[start:end] = np.maximum(numerators[1:] - UNITS_PER_POSITION, 0)
    predicted = np.flatnonzero(row.targets >= 0)
    targets = row.targets.copy()
    targets[predicted] = token_ids[predicted + 1]
    return replace(row, token_ids=token_ids, targets=targets, positions=positions)


def choose(
    sizes: Sequence[Size], precisions: Sequence[Precision], row_lengths: Sequence[int]
) -> list[tuple[Size, Precision, int]]:
    """All combinations, a size's together, short rows first."""
    return [(size, precision, length) for size in sizes for length in sorted(row_lengths) for precision in precisions]


Samples = Literal["packed", "padded"]
Attention = Literal["flash_attention_2", "torch_varlen", "sdpa"]


@dataclass(frozen=True)
class Setting:
    """One way to run the Hugging Face baseline."""

    samples: Samples
    attention: Attention
    """`torch_varlen` is the kernel of flash attention that comes with torch, through transformers' own interface."""
    recomputes: bool = False
    """transformers' gradient checkpointing, of both sides."""

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.samples}, {self.attention}{', recomputed' if self.recomputes else ''}"


def baseline_settings() -> list[Setting]:
    """All that can run here. Padded samples need no flash attention of their own: torch's causal attention is it."""
    found = [Setting("packed", "flash_attention_2")] if importlib.util.find_spec("flash_attn") else []
    return [*found, Setting("packed", "torch_varlen"), Setting("packed", "sdpa"), Setting("padded", "sdpa")]
