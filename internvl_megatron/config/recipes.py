"""A run is a function: it returns a complete configuration, which overrides may change field by field."""

import difflib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from internvl_megatron.config.models import INTERNVL3
from internvl_megatron.config.overrides import apply_overrides, field_paths, from_json, with_values
from internvl_megatron.config.recipe_settings import LAYOUTS, MODEL_SOURCE, STAGES, Stage, recipe_settings
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


def released(stage: Stage, size: str, num_ranks: int | None = None) -> RunConfig:
    """A stage of InternVL3's training at a released size; `recipe_settings.py` has its values and their sources.

    Args:
        stage: native pre-training, supervised fine-tuning, preference optimization, or a process reward model.
        size: `1B` to `78B`.
        num_ranks: GPUs, which choose a layout; None = the fewest it is made for.
    """
    name = f"internvl3_{size.lower()}_{stage}"
    config = RunConfig(name=name, model=INTERNVL3[size], data=DataConfig(), folder=f"runs/{name}")
    return with_values(
        config, {path: setting.value for path, setting in recipe_settings(stage, size, num_ranks).items()}
    )


RELEASED: dict[str, tuple[Stage, str]] = {
    f"internvl3_{size.lower()}_{stage}": (stage, size) for stage in STAGES for size in INTERNVL3
}
"""Names of the recipes that are made of a stage and a size."""

RECIPES: dict[str, Callable[[], RunConfig]] = {
    **{recipe.__name__: recipe for recipe in (demo_digits,)},
    **{name: partial(released, *of) for name, of in RELEASED.items()},
}


def summary(name: str) -> str:
    """A recipe in one line."""
    if name not in RELEASED:
        return (RECIPES[name].__doc__ or "").strip().splitlines()[0]
    stage, size = RELEASED[name]
    what = {
        "pretrain": "native pre-training from bare parts",
        "sft": "supervised fine-tuning",
        "mpo": "mixed preference optimization",
        "prm": "process reward model",
    }[stage]
    return f"InternVL3-{size}, {what}, from {min(LAYOUTS[size])} GPUs of 80 GB"


def sources(name: str, num_ranks: int | None = None) -> dict[str, str]:
    """Where a recipe's values come from, by the field's path; of recipes that are functions of their own, nothing."""
    if name not in RELEASED:
        return {}
    stage, size = RELEASED[name]
    of_model = {path: MODEL_SOURCE for path in field_paths() if path.startswith("model.")}
    return of_model | {path: setting.source for path, setting in recipe_settings(stage, size, num_ranks).items()}


def fewest_ranks(name: str) -> int:
    """Ranks that a recipe starts from: those it is made for, or those of one copy of the language model."""
    if name in RELEASED:
        return min(LAYOUTS[RELEASED[name][1]])
    parallel = find_recipe(name).parallel
    return parallel.tensor_size * parallel.pipeline_size * parallel.context_size


def find_recipe(name: str, num_ranks: int | None = None) -> RunConfig:
    """The configuration of a recipe, in its layout for so many ranks if it has several.

    Raises:
        ConfigError: there is no such recipe; names the nearest.
    """
    if name in RELEASED:
        return released(*RELEASED[name], num_ranks)
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"there is no recipe {name!r}; did you mean {near!r}? `recipes` lists all")
    return RECIPES[name]()


def named_config(name: str, num_ranks: int | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration that a command line names: a recipe, or a run's config.json, and what is changed of it.

    Raises:
        ConfigError: there is no such recipe, file or setting.
    """
    config = from_json(Path(name)) if name.endswith(".json") else find_recipe(name, num_ranks)
    return apply_overrides(config, overrides)
