"""Load a trained run on one rank, whatever layout trained it, and answer with it."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from internvl_megatron.checkpoint import folders, save_load
from internvl_megatron.config.overrides import CONFIG_FILE, from_json
from internvl_megatron.config.schema import ParallelConfig, RunConfig
from internvl_megatron.data.tokenizer import load_tokenizer
from internvl_megatron.device import open_device
from internvl_megatron.errors import CheckpointError
from internvl_megatron.evaluate.questions import TaskScore, evaluate_questions
from internvl_megatron.inference.generate import Generator, Prompt
from internvl_megatron.logs import configure_logging
from internvl_megatron.model.build import build_model
from internvl_megatron.parallel.groups import make_groups
from internvl_megatron.parallel.layout import Layout
from internvl_megatron.ranks import RankInfo, joined

DeviceName = Literal["auto", "cpu", "cuda"]


def answer_prompts(
    info: RankInfo, run_folder: Path, prompts: Sequence[Prompt], max_new_tokens: int, device: DeviceName = "auto"
) -> list[str]:
    """Answer prompts with a run's newest checkpoint; the body of one rank."""
    return _with_generator(info, run_folder, device, lambda generator: generator.answer(prompts, max_new_tokens))


def answer_questions(
    info: RankInfo, run_folder: Path, questions: Path, answers: Path, device: DeviceName = "auto"
) -> list[TaskScore]:
    """Answer a questions file with a run's newest checkpoint and score it; the body of one rank."""
    return _with_generator(
        info, run_folder, device, lambda generator: evaluate_questions(questions, answers, generator)
    )


def _with_generator[T](info: RankInfo, run_folder: Path, device_name: DeviceName, use: Callable[[Generator], T]) -> T:
    configure_logging(info.rank)
    logging.getLogger("internvl_megatron").setLevel(logging.WARNING)
    device = open_device(device_name, info.local_rank)
    checkpoints = folders.finished(run_folder / folders.CHECKPOINTS)
    if not checkpoints:
        raise CheckpointError(f"{run_folder}: no finished checkpoint; train first, or give another run's folder")
    trained = from_json(run_folder / CONFIG_FILE)
    config: RunConfig = replace(trained, parallel=ParallelConfig())
    with joined(info, device, timeout_seconds=600), torch.no_grad():
        groups = make_groups(Layout(1, 1, 1), device, timeout_seconds=600)
        model = build_model(config, groups, device)
        save_load.load_weights(checkpoints[-1], model, groups)
        return use(Generator(config, model, load_tokenizer(config.data.tokenizer), device))
