"""Load a trained run, whatever layout trained it, on the ranks that are there, and answer with it."""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from internvl_megatron.checkpoint import folders, save_load, weights
from internvl_megatron.config.overrides import CONFIG_FILE, from_json
from internvl_megatron.config.plan import tensor_problems
from internvl_megatron.config.schema import DataConfig, Fp8Config, KernelConfig, ParallelConfig, RunConfig
from internvl_megatron.data.tokenizer import load_tokenizer
from internvl_megatron.device import Device, DeviceName, open_device
from internvl_megatron.errors import CheckpointError, ConfigError
from internvl_megatron.inference.generate import Generator
from internvl_megatron.inference.prompt import Prompt
from internvl_megatron.inference.settings import Generation, Limits
from internvl_megatron.logs import configure_logging
from internvl_megatron.model.build import build_model
from internvl_megatron.parallel.groups import make_groups
from internvl_megatron.parallel.layout import Layout
from internvl_megatron.ranks import RankInfo, joined

TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Setup:
    """How a generator uses its ranks. Those beyond `tensor_size` x `pipeline_size` make more replicas, which share the prompts."""

    tensor_size: int = 1
    pipeline_size: int = 1
    limits: Limits = field(default_factory=Limits)


def answer_prompts(
    info: RankInfo, run_folder: Path, prompts: Sequence[Prompt], max_new_tokens: int, device: DeviceName = "auto"
) -> list[str]:
    """Answer prompts with a run's newest checkpoint; the body of one rank."""
    with open_generator(info, run_folder, device) as generator:
        return generator.answer(prompts, max_new_tokens)


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


@contextmanager
def open_generator(
    info: RankInfo,
    folder: Path,
    device_name: DeviceName = "auto",
    change: Callable[[RunConfig], RunConfig] = lambda config: config,
    setup: Setup | None = None,
) -> Iterator[Generator]:
    """A generator around a run's newest checkpoint, or around converted weights.

    Raises:
        CheckpointError: there is no finished checkpoint, or it is damaged.
        ConfigError: the run's saved configuration cannot be read, or the model cannot be divided as it should be.
    """
    setup = setup or Setup()
    configure_logging(info.rank)
    logging.getLogger("internvl_megatron").setLevel(logging.WARNING)
    if info.local_world_size > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // info.local_world_size))
    device = open_device(device_name, info.local_rank)
    config, checkpoint = weights_to_load(folder, device)
    config = divided(change(config), setup, info.world_size)
    tokenizer = load_tokenizer(config.data.tokenizer)
    layout = Layout(
        setup.tensor_size, setup.pipeline_size, info.world_size // (setup.tensor_size * setup.pipeline_size)
    )
    with joined(info, device, TIMEOUT_SECONDS):
        groups = make_groups(layout, device, TIMEOUT_SECONDS)
        model = build_model(config, groups, device, initialize=False)
        save_load.load_weights(checkpoint, config.model, model, groups)
        yield Generator(config, model, groups, tokenizer, device, setup.limits)


def divided(config: RunConfig, setup: Setup, num_ranks: int) -> RunConfig:
    """The configuration with its model divided over ranks; where layers do not divide, earlier stages have one more: the last
    one has the output layer.

    Raises:
        ConfigError: it cannot be divided like that.
    """
    tensor, pipeline, num_layers = setup.tensor_size, setup.pipeline_size, config.model.language.num_layers
    problems = []
    if min(tensor, pipeline) < 1 or num_ranks % (tensor * pipeline):
        problems.append(
            f"tensor_size={tensor} x pipeline_size={pipeline} ranks a replica do not divide the {num_ranks} ranks; change "
            "them, or start a multiple of their product (--nproc)"
        )
    if pipeline > num_layers:
        problems.append(f"pipeline_size={pipeline}: the language model has {num_layers} layers")
    if problems:
        raise ConfigError("\n".join(problems))
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
