"""What is wrong with values of a configuration, whatever the number of ranks: numbers, paths, time limits, data, sizes of the model."""

import math
import re
from dataclasses import fields, is_dataclass
from typing import Any

from internvl_megatron.config.group_weights import parse_group_weights
from internvl_megatron.config.schema import ModelConfig, RunConfig
from internvl_megatron.errors import ConfigError

MAY_BE_ZERO = {
    "num_rewinds",
    "drop_path_rate", "learning_rate", "min_learning_rate", "warmup_ratio", "weight_decay", "beta1", "beta2",
    "num_workers", "seed", "learning_rate_scale", "min_tiles", "layer_scale_init", "max_skipped_share",
    "first_bf16_layers", "last_bf16_layers", "warmup_steps", "preference_factor", "quality_factor", "generation_factor",
}  # fmt: skip


SHARES = {"drop_path_rate", "warmup_ratio", "final_decay_ratio", "max_skipped_share", "beta1", "beta2"}
LARGEST_SEED = 2**32 - 1
LARGEST_SIZE = 10**7
MOST_LAYERS = 10**4


def number_problems(section: Any, path: str) -> list[str]:
    """Numbers are finite, positive unless zero means something, and below 1 where they are shares; none is negative."""
    problems = []
    for field in fields(section):
        value, name = getattr(section, field.name), f"{path}{field.name}"
        if is_dataclass(value):
            problems += number_problems(value, f"{name}.")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            continue
        elif not math.isfinite(value):
            problems.append(f"{name}={value} must be a finite number")
        elif value < 0 or (value == 0 and field.name not in MAY_BE_ZERO):
            problems.append(f"{name}={value} must be {'at least 0' if value < 0 else 'greater than 0'}")
        elif field.name in SHARES and value >= 1:
            problems.append(f"{name}={value} must be below 1")
        elif field.name == "seed" and value > LARGEST_SEED:
            problems.append(f"{name}={value} must be at most {LARGEST_SEED}")
    return problems


def folder_problems(config: RunConfig) -> list[str]:
    """Of paths and URLs."""
    paths = {"folder": config.folder, "checkpoint.load": config.checkpoint.load}
    problems = [
        f"{name}={path} is a URL, and a run's files and weights are on a file system that all ranks share: mount the store, or "
        "copy what you need; checkpoint.mirror has copies of checkpoints made"
        for name, path in paths.items()
        if path is not None and "://" in path and "@" not in path
    ]
    mirror = config.checkpoint.mirror
    given = paths | {
        "checkpoint.mirror": mirror,
        "data.meta": config.data.meta,
        "data.eval_meta": config.data.eval_meta,
    }
    problems += [  # without its value: this text ends in a log
        f"{name} has a user or a password before its '@', and settings are written down and logged: leave them to the store's own "
        "configuration (environment variables, ~/.aws, ...)"
        for name, path in given.items()
        if path is not None and re.search(r"://[^/]*@", path)
    ]
    if mirror is not None and "://" not in mirror:
        problems.append(f"checkpoint.mirror={mirror} must be a URL, as s3://bucket/run or file:///mnt/copies/run")
    return problems


def time_limit_problems(config: RunConfig) -> list[str]:
    """Of the limits of the watchdog and of messages between ranks."""
    stall, collective = config.watchdog.stall_seconds, config.parallel.collective_timeout_seconds
    if stall is None or stall < collective:
        return []
    return [
        f"watchdog.stall_seconds={stall} must be below parallel.collective_timeout_seconds={collective}, or a time-out ends the run "
        "before its ranks say where they are"
    ]


def model_problems(model: ModelConfig) -> list[str]:
    """What is wrong with a model's sizes: numbers out of range, and sizes that do not go into each other."""
    problems = number_problems(model, "model.")
    vision, language = model.vision, model.language
    for path, part in (("model.vision", vision), ("model.language", language)):
        for name, value in vars(part).items():
            largest = MOST_LAYERS if name == "num_layers" else LARGEST_SIZE
            if type(value) is int and value > largest:
                problems.append(f"{path}.{name} must be at most {largest}")
    if problems:  # the checks below divide by these numbers
        return problems
    checks = [
        (vision.hidden_size % vision.num_heads, "model.vision.hidden_size", "model.vision.num_heads"),
        (vision.tile_pixels % vision.patch_pixels, "model.vision.tile_pixels", "model.vision.patch_pixels"),
        (vision.patches_per_side % vision.shuffle_factor, "patches per tile side", "model.vision.shuffle_factor"),
        (language.num_heads % language.num_kv_heads, "model.language.num_heads", "model.language.num_kv_heads"),
        (language.head_size % 2, "model.language.head_size", "2 (rotary halves)"),
    ]
    return [f"{what} must be a multiple of {of}" for remainder, what, of in checks if remainder]


def data_problems(config: RunConfig) -> list[str]:
    """Of what is read, how it is cut, and what is trained with it."""
    data, vision = config.data, config.model.vision
    parts = config.optimizer
    problems = []
    if not (parts.vision.trainable or parts.projector.trainable or parts.language.trainable):
        problems.append("optimizer: no part is trainable (vision, projector, language); set one of them to true")
    problems += [
        f"data.{name} is not set: give {what} (data.{name}=PATH)"
        for name, what in (
            ("meta", "InternVL's meta JSON of the training data"),
            ("tokenizer", "a tokenizer's folder"),
        )
        if not getattr(data, name)
    ]
    if data.max_video_frames < data.min_video_frames:
        problems.append(
            f"data.max_video_frames={data.max_video_frames} is below data.min_video_frames={data.min_video_frames}"
        )
    if data.max_tiles < data.min_tiles:
        problems.append(f"data.max_tiles={data.max_tiles} is below data.min_tiles={data.min_tiles}")
    largest = data.max_tiles + (1 if data.use_thumbnail and data.max_tiles > 1 else 0)
    if largest > data.tiles_per_row:
        problems.append(
            f"data.tiles_per_row={data.tiles_per_row} cannot hold one image of data.max_tiles={data.max_tiles} "
            f"({largest} tiles with thumbnail): set it to at least {largest} or lower data.max_tiles"
        )
    if largest * vision.tokens_per_tile > data.tokens_per_row:
        problems.append(
            f"data.tokens_per_row={data.tokens_per_row} cannot hold one image of {largest} tiles "
            f"({largest * vision.tokens_per_tile} tokens): raise it or lower data.max_tiles"
        )
    if data.v2pe == "fixed" and (data.v2pe_numerator & (data.v2pe_numerator - 1) or data.v2pe_numerator > 256):
        problems.append(f"data.v2pe_numerator={data.v2pe_numerator} must be one of 1, 2, 4, 8, 16, 32, 64, 128, 256")
    if data.tokens_per_row % data.sample_multiple_tokens:
        problems.append(
            f"data.tokens_per_row={data.tokens_per_row} must be a multiple of "
            f"data.sample_multiple_tokens={data.sample_multiple_tokens}"
        )
    if data.group_weights is not None:
        try:
            parse_group_weights(data.group_weights)
        except ConfigError as error:
            problems.append(str(error))
    if config.eval_every_steps and not data.eval_meta:
        problems.append("eval_every_steps is set but data.eval_meta is not: give held-out data, or set it to null")
    if data.eval_meta and config.eval_every_steps is None:
        problems.append(
            f"data.eval_meta={data.eval_meta} is set but eval_every_steps is not, so nothing would be evaluated: say after how many "
            "steps (eval_every_steps=N), or set data.eval_meta to null"
        )
    return problems
