"""Load a trained run on one rank, whatever layout trained it, and answer with it."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from internvl_megatron.checkpoint import folders, save_load
from internvl_megatron.config.overrides import CONFIG_FILE, from_json
from internvl_megatron.config.schema import ParallelConfig
from internvl_megatron.data.tokenizer import load_tokenizer
from internvl_megatron.device import DeviceName, open_device
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


@contextmanager
def open_generator(info: RankInfo, run_folder: Path, device_name: DeviceName) -> Iterator[Generator]:
    """A generator around a run's newest checkpoint.

    Raises:
        CheckpointError: the run has no finished checkpoint, or it is damaged.
        ConfigError: the run's saved configuration cannot be read.
    """
    configure_logging(info.rank)
    logging.getLogger("internvl_megatron").setLevel(logging.WARNING)
    checkpoints = folders.finished(run_folder / folders.CHECKPOINTS)
    if not checkpoints:
        raise CheckpointError(f"{run_folder}: no finished checkpoint; train first, or give another run's folder")
    config = replace(from_json(run_folder / CONFIG_FILE), parallel=ParallelConfig())
    tokenizer = load_tokenizer(config.data.tokenizer)
    device = open_device(device_name, info.local_rank)
    with joined(info, device, TIMEOUT_SECONDS):
        groups = make_groups(Layout(1, 1, 1), device, TIMEOUT_SECONDS)
        model = build_model(config, groups, device)
        save_load.load_weights(checkpoints[-1], model, groups)
        yield Generator(config, model, tokenizer, device)
