"""A run is a function: it returns a complete configuration, which overrides may change field by field."""

import difflib
from collections.abc import Callable

from internvl_megatron.config.models import INTERNVL3_1B
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
    """InternVL3-1B, supervised fine-tuning on packed 16K rows.

    InternVL3's own hyper-parameters were never published. These are of InternVL3.5's SFT script (learning rate,
    schedule, weight decay, clipping) with InternVL2.5's 16K rows and 48 tiles: proxies, not the original.
    """
    return RunConfig(
        name="internvl3_1b_sft",
        model=INTERNVL3_1B,
        data=DataConfig(tokens_per_row=16384, tiles_per_row=48),
        # A tile's activations in InternViT-300M are about 1 GB: they are computed again in backward, as upstream does,
        # and only a few rows' images are encoded at a time.
        parallel=ParallelConfig(vision_recompute=True, vision_window_rows=4),
        optimizer=OptimizerConfig(learning_rate=8e-5),
        checkpoint=CheckpointConfig(save_every_steps=500),
        folder="runs/internvl3_1b_sft",
        num_steps=8000,
        rows_per_step=512,
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {recipe.__name__: recipe for recipe in (demo_digits, internvl3_1b_sft)}


def find_recipe(name: str) -> RunConfig:
    """The configuration of a recipe.

    Raises:
        ConfigError: there is no such recipe; names the nearest.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"there is no recipe {name!r}; did you mean {near!r}? `recipes` lists all")
    return RECIPES[name]()
