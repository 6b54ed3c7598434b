"""Load a trained run on one rank, whatever layout trained it, and answer with it."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from internvl_megatron.checkpoint import folders, save_load, weights
from internvl_megatron.config.overrides import CONFIG_FILE, from_json
from internvl_megatron.config.schema import DataConfig, Fp8Config, ParallelConfig, RunConfig
from internvl_megatron.data.tokenizer import load_tokenizer
from internvl_megatron.device import Device, DeviceName, open_device
from internvl_megatron.errors import CheckpointError
from internvl_megatron.inference.generate import Generator
from internvl_megatron.inference.prompt import Prompt
from internvl_megatron.logs import configure_logging
from internvl_megatron.model.build import build_model
from internvl_megatron.parallel.groups import make_groups
from internvl_megatron.parallel.layout import Layout
from internvl_megatron.ranks import RankInfo, joined

TIMEOUT_SECONDS = 600


def answer_prompts(
    info: RankInfo, run_folder: Path, prompts: Sequence[Prompt], max_new_tokens: int, device: DeviceName = "auto"
) -> list[str]:
    """Answer prompts with a run's newest checkpoint; the body of one rank."""
    with open_generator(info, run_folder, device) as generator:
        return generator.answer(prompts, max_new_tokens)


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
    device_name: DeviceName,
    change: Callable[[RunConfig], RunConfig] = lambda config: config,
) -> Iterator[Generator]:
    """A generator around a run's newest checkpoint, or around converted weights.

    Raises:
        CheckpointError: there is no finished checkpoint, or it is damaged.
        ConfigError: the run's saved configuration cannot be read.
    """
    configure_logging(info.rank)
    logging.getLogger("internvl_megatron").setLevel(logging.WARNING)
    device = open_device(device_name, info.local_rank)
    config, checkpoint = weights_to_load(folder, device)
    config = change(config)
    tokenizer = load_tokenizer(config.data.tokenizer)
    with joined(info, device, TIMEOUT_SECONDS):
        groups = make_groups(Layout(1, 1, 1), device, TIMEOUT_SECONDS)
        model = build_model(config, groups, device, initialize=False)
        save_load.load_weights(checkpoint, config.model, model, groups)
        yield Generator(config, model, tokenizer, device)


def weights_to_load(folder: Path, device: Device) -> tuple[RunConfig, Path]:
    """The configuration for one rank, and the checkpoint, of a run (its newest), of a checkpoint of a run, or of
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
    return replace(from_json(run / CONFIG_FILE), parallel=ParallelConfig(), fp8=Fp8Config()), checkpoints[-1]
