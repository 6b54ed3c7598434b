"""A run is a function: it returns a complete configuration, which overrides may change field by field."""

import difflib
from collections.abc import Callable
from dataclasses import replace

from internvl_megatron.config.models import INTERNVL3
from internvl_megatron.config.schema import (
    CheckpointConfig,
    DataConfig,
    LanguageConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    VisionConfig,
)
from internvl_megatron.errors import ConfigError


def demo_digits() -> RunConfig:
    """The README's demo: a 1.8M-parameter InternVL3 learns to read real handwritten digits on four CPU ranks."""
    vision = VisionConfig(
        hidden_size=128, num_layers=4, num_heads=4, ffn_hidden_size=512, tile_pixels=28, patch_pixels=7
    )
    language = LanguageConfig(
        hidden_size=128, num_layers=4, num_heads=4, num_kv_heads=2, head_size=32, ffn_hidden_size=384, vocab_size=400
    )
    return RunConfig(
        name="demo_digits",
        model=ModelConfig(vision=vision, language=language),
        data=DataConfig(
            meta="runs/demo/data/train_meta.json",
            eval_meta="runs/demo/data/heldout_meta.json",
            tokenizer="runs/demo/data/tokenizer",
            tokens_per_row=1792,
            tiles_per_row=96,
            max_tiles=6,  # two pictures of up to three digits share them
            system_prompt="",
            v2pe="random",
        ),
        parallel=ParallelConfig(tensor_size=2, pipeline_size=2, vision_chunk_tiles=64),
        loss=LossConfig(weighting="square"),
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.05, beta2=0.99),
        checkpoint=CheckpointConfig(save_every_steps=350),
        folder="runs/demo",
        num_steps=700,
        rows_per_step=2,
        dtype="fp32",
        device="cpu",
        eval_every_steps=100,
        eval_rows=2,
    )


def internvl3_1b_sft() -> RunConfig:
    """InternVL3-1B, supervised fine-tuning on packed 16K rows."""
    return _sft("1B")


def internvl3_2b_sft() -> RunConfig:
    """InternVL3-2B, supervised fine-tuning."""
    return _sft("2B")


def internvl3_8b_sft() -> RunConfig:
    """InternVL3-8B, supervised fine-tuning, TP2."""
    return _sft("8B", drop_path_rate=0.1, tensor_size=2)


def internvl3_9b_sft() -> RunConfig:
    """InternVL3-9B (InternLM3), supervised fine-tuning, TP2; set model.language.vocab_size to the checkpoint's."""
    return _sft("9B", drop_path_rate=0.1, tensor_size=2)


def internvl3_14b_sft() -> RunConfig:
    """InternVL3-14B, supervised fine-tuning, TP4."""
    return _sft("14B", drop_path_rate=0.1, tensor_size=4)


def internvl3_38b_sft() -> RunConfig:
    """InternVL3-38B, supervised fine-tuning, TP8 x PP2."""
    return _sft("38B", drop_path_rate=0.4, tensor_size=8, pipeline_size=2)


def internvl3_78b_sft() -> RunConfig:
    """InternVL3-78B, supervised fine-tuning, TP8 x PP4."""
    return _sft("78B", drop_path_rate=0.4, tensor_size=8, pipeline_size=4)


def _sft(size: str, drop_path_rate: float = 0.0, tensor_size: int = 1, pipeline_size: int = 1) -> RunConfig:
    """Supervised fine-tuning of a released size on packed 16K rows.

    InternVL3's own hyper-parameters were never published. These are of InternVL3.5's SFT script (learning rate,
    schedule, weight decay, clipping, drop path) with InternVL2.5's 16K rows and 48 tiles: proxies, not the original. The
    layouts are starting points that were not measured.
    """
    model = INTERNVL3[size]
    name = f"internvl3_{size.lower()}_sft"
    return RunConfig(
        name=name,
        model=replace(model, vision=replace(model.vision, drop_path_rate=drop_path_rate)),
        data=DataConfig(tokens_per_row=16384, tiles_per_row=48),
        # A tile's activations in InternViT-300M are about 1 GB: they are computed again in backward, as upstream does,
        # and only a few rows' images are encoded at a time.
        parallel=ParallelConfig(
            tensor_size=tensor_size,
            pipeline_size=pipeline_size,
            sequence_parallel=tensor_size > 1,
            # The 6B encoder's parameters, gradients and Adam state are 16 bytes for each of 5.5 billion on every rank otherwise.
            vision_sharding="sharded" if model.vision.hidden_size > 1024 else "replicated",
            vision_recompute="full",
            vision_window_rows=4,
        ),
        optimizer=OptimizerConfig(learning_rate=8e-5),
        checkpoint=CheckpointConfig(save_every_steps=500),
        folder=f"runs/{name}",
        num_steps=8000,
        rows_per_step=512,
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        demo_digits,
        internvl3_1b_sft,
        internvl3_2b_sft,
        internvl3_8b_sft,
        internvl3_9b_sft,
        internvl3_14b_sft,
        internvl3_38b_sft,
        internvl3_78b_sft,
    )
}


def find_recipe(name: str) -> RunConfig:
    """The configuration of a recipe.

    Raises:
        ConfigError: there is no such recipe; names the nearest.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"there is no recipe {name!r}; did you mean {near!r}? `recipes` lists all")
    return RECIPES[name]()
