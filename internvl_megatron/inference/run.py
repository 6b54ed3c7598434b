"""Load a trained run, whatever layout trained it, on the ranks that are there, and answer with it."""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from checkpoint_convert.hf_config import CONFIG_FILE as HF_CONFIG_FILE
from checkpoint_convert.sources import HuggingFaceSource
from internvl_megatron.checkpoint import folders, save_load, weights
from internvl_megatron.config.overrides import CONFIG_FILE, from_json
from internvl_megatron.config.plan import tensor_problems
from internvl_megatron.config.schema import DataConfig, Fp8Config, KernelConfig, ParallelConfig, RunConfig
from internvl_megatron.data.positions import UNITS_PER_POSITION
from internvl_megatron.data.tokenizer import load_tokenizer
from internvl_megatron.device import Device, DeviceName, open_device
from internvl_megatron.errors import CheckpointError, ConfigError
from internvl_megatron.inference.generate import Generator
from internvl_megatron.inference.prompt import Prompt
from internvl_megatron.inference.scoring import score_continuations
from internvl_megatron.inference.settings import Generation, Setup
from internvl_megatron.logs import configure_logging
from internvl_megatron.model.build import build_model
from internvl_megatron.parallel.groups import Groups, make_groups
from internvl_megatron.parallel.layout import Layout
from internvl_megatron.ranks import RankInfo, joined

TIMEOUT_SECONDS = 600


def generate_rank(
    info: RankInfo,
    folder: Path,
    prompts: Sequence[Prompt],
    settings: Generation,
    device: DeviceName = "auto",
    setup: Setup | None = None,
    is_streamed: bool = False,
) -> list[str]:
    """Texts of the answers to prompts; the body of one rank. Streamed ones are written to the standard output as they grow."""

    def show(_number: int, piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    with open_generator(info, folder, device, setup=setup) as generator:
        answers = generator.generate(prompts, settings, show if is_streamed and info.rank == 0 else None)
    return [answer.text for answer in answers]


def score_rank(
    info: RankInfo,
    folder: Path,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    v2pe_numerator: int = UNITS_PER_POSITION,
    with_end: bool = False,
    device: DeviceName = "auto",
    setup: Setup | None = None,
) -> list[tuple[float, list[tuple[str, float]]]]:
    """Log-probability of each answer to one prompt, and of its tokens with their texts; the body of one rank."""
    with open_generator(info, folder, device, setup=setup) as generator:
        (scores,) = score_continuations(generator, prompts, [answers], v2pe_numerator, with_end)
        tokenizer = generator.tokenizer
    return [
        (
            score.total,
            [(tokenizer.decode([token]), value) for token, value in zip(score.token_ids, score.logprobs, strict=True)],
        )
        for score in scores
    ]


def prompt_logits(
    info: RankInfo, folder: Path, prompt: Prompt, num_positions: int, device: DeviceName = "auto"
) -> np.ndarray:
    """Logits of a prompt's last positions (`Generator.logits`), to compare models; the body of one rank.

    In fp32 and with the default settings of the data pipeline, whatever a run was trained with.
    """

    def plainly(config: RunConfig) -> RunConfig:
        return replace(config, dtype="fp32", data=DataConfig(tokenizer=config.data.tokenizer))

    with open_generator(info, folder, device, plainly) as generator:
        return generator.logits(prompt, num_positions)


@dataclass(frozen=True)
class Place:
    """Where generators live: this rank's device and its process groups."""

    info: RankInfo
    device: Device
    setup: Setup
    groups: Groups


@contextmanager
def open_generator(
    info: RankInfo,
    folder: Path,
    device_name: DeviceName = "auto",
    change: Callable[[RunConfig], RunConfig] = lambda config: config,
    setup: Setup | None = None,
) -> Iterator[Generator]:
    """A generator around a run's newest checkpoint or other weights (`load_generator`)."""
    with open_place(info, device_name, setup or Setup()) as place:
        yield load_generator(folder, place, change)


@contextmanager
def open_place(
    info: RankInfo, device_name: DeviceName, setup: Setup, timeout_seconds: int = TIMEOUT_SECONDS
) -> Iterator[Place]:
    """Join the other ranks for the duration of a block.

    Args:
        info: this rank.
        device_name: what it computes on.
        setup: how ranks are used.
        timeout_seconds: how long ranks wait for each other.

    Raises:
        ConfigError: the ranks cannot be divided into replicas.
    """
    configure_logging(info.rank)
    logging.getLogger("internvl_megatron").setLevel(logging.WARNING)
    if info.local_world_size > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // info.local_world_size))
    tensor, pipeline = setup.tensor_size, setup.pipeline_size
    if min(tensor, pipeline) < 1 or info.world_size % (tensor * pipeline):
        raise ConfigError(
            f"tensor_size={tensor} x pipeline_size={pipeline} ranks a replica do not divide the {info.world_size} ranks; "
            "change them, or start a multiple of their product (--nproc)"
        )
    device = open_device(device_name, info.local_rank)
    with joined(info, device, timeout_seconds):
        layout = Layout(tensor, pipeline, info.world_size // (tensor * pipeline))
        yield Place(info, device, setup, make_groups(layout, device, timeout_seconds))


def load_generator(
    folder: Path, place: Place, change: Callable[[RunConfig], RunConfig] = lambda config: config
) -> Generator:
    """Load a model: of a run (its newest checkpoint), a checkpoint of a run, converted weights, or a Hugging Face checkpoint in
    either layout. Collective over all ranks.

    Raises:
        CheckpointError: there is nothing of the kind, or it is damaged.
        ConfigError: the run's saved configuration cannot be read, or the model cannot be divided over these ranks.
    """
    source = HuggingFaceSource(folder) if is_hugging_face_folder(folder) else None
    if source is None:
        config, checkpoint = weights_to_load(folder, place.device)
    else:
        dtype, data = place.device.preferred_dtype, DataConfig(tokenizer=str(folder))
        config, checkpoint = RunConfig(name=folder.name, model=source.model, data=data, dtype=dtype), folder
    config = divided(change(config), place.setup, place.info.world_size)
    tokenizer = load_tokenizer(config.data.tokenizer)
    model = build_model(config, place.groups, place.device, initialize=False)
    if source is None:
        save_load.load_weights(checkpoint, config.model, model, place.groups)
    else:
        for name, parameter in model.named_parameters():
            model.load_full(name, parameter, source.read(name))
    return Generator(config, model, place.groups, tokenizer, place.device, place.setup.limits)


def is_hugging_face_folder(folder: Path) -> bool:
    """Whether a folder looks like a Hugging Face checkpoint: weights and a `config.json`, and nothing of ours."""
    is_ours = weights.is_weights_folder(folder) or (folder / folders.CHECKPOINTS).is_dir()
    return not is_ours and (folder / HF_CONFIG_FILE).is_file() and any(folder.glob("*.safetensors"))


def divided(config: RunConfig, setup: Setup, num_ranks: int) -> RunConfig:
    """The configuration with its model divided over ranks; where layers do not divide, earlier stages have one more: the last
    one has the output layer.

    Raises:
        ConfigError: it cannot be divided like that.
    """
    tensor, pipeline, num_layers = setup.tensor_size, setup.pipeline_size, config.model.language.num_layers
    if pipeline > num_layers:
        raise ConfigError(f"pipeline_size={pipeline}: the language model has {num_layers} layers; take fewer stages")
    base, more = divmod(num_layers, pipeline)
    layers = tuple(base + (stage < more) for stage in range(pipeline))
    parallel = ParallelConfig(
        tensor_size=tensor, pipeline_size=pipeline, stage_layers=layers if pipeline > 1 else None
    )
    config = replace(config, parallel=parallel, rows_per_step=num_ranks // (tensor * pipeline))
    problems = tensor_problems(config)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def weights_to_load(folder: Path, device: Device) -> tuple[RunConfig, Path]:
    """The configuration for inference, and the checkpoint, of a run (its newest), of a checkpoint of a run, or of
    converted weights.

    Raises:
        CheckpointError: the folder is neither.
        ConfigError: the run's saved configuration cannot be read.
    """
    if weights.is_weights_folder(folder):
        data = DataConfig(tokenizer=str(folder / weights.COMPANIONS))
        model = weights.read_model(folder)
        return RunConfig(name=folder.name, model=model, data=data, dtype=device.preferred_dtype), folder
    is_checkpoint = (folder / folders.MARKER).is_file()
    run = folder.parent.parent if is_checkpoint else folder
    checkpoints = [folder] if is_checkpoint else folders.finished(folder / folders.CHECKPOINTS)
    if not checkpoints:
        raise CheckpointError(weights.why_not(folder))
    # The run's kernels may not be here, and FP8 takes no rows of any length.
    own = {"parallel": ParallelConfig(), "kernels": KernelConfig(), "fp8": Fp8Config()}
    return replace(from_json(run / CONFIG_FILE), **own), checkpoints[-1]
