"""Weights without a run: every parameter whole, under its layout-free name, in safetensors files.

Made by `python -m checkpoint_convert hf-to-megatron`; any layout starts from it (`checkpoint.load=FOLDER`), because each
rank takes its own part of every parameter. `model.json` says which model it is; `huggingface/` keeps what the source had
beside its weights (configuration, tokenizer, ..), for the way back.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from internvl_megatron.checkpoint.safetensors_folder import DTYPES, INDEX_END, SafetensorsFolder
from internvl_megatron.config.overrides import changed_fields, model_from_json
from internvl_megatron.config.schema import ModelConfig, RunConfig
from internvl_megatron.config.value_rules import model_problems
from internvl_megatron.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from internvl_megatron.model.build import Model

MODEL_FILE = "model.json"
COMPANIONS = "huggingface"
"""Folder, in weights and in runs, of the files a Hugging Face checkpoint has beside its tensors."""

FILE_STEM = "weights"
INDEX_FILE = f"{FILE_STEM}{INDEX_END}"
FORMAT_VERSION = 1

TRAINING_ONLY = {"vision.drop_path_rate", "vision.layer_scale_init", "init_std"}
"""Settings of the model that two runs with the same weights may have differently."""


def is_weights_folder(folder: Path) -> bool:
    """Whether a folder holds weights in this format."""
    return (folder / MODEL_FILE).is_file()


def why_not(folder: Path) -> str:
    """Why a folder cannot be started from, and the way out."""
    if not folder.is_dir():
        return f"{folder}: no such folder"
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return (
            f"{folder}: is a Hugging Face checkpoint; convert it first: "
            f"python -m checkpoint_convert hf-to-megatron {folder} TARGET"
        )
    return (
        f"{folder}: no finished checkpoint; give the folder of a run that has one, one of its checkpoints "
        "(step-NNNNNNNN), or converted weights"
    )


def check_start(config: RunConfig) -> None:
    """See before anything is built whether a run can start from the weights it names.

    Raises:
        CheckpointError: they are of another model, or damaged.
    """
    if config.checkpoint.load is not None and is_weights_folder(Path(config.checkpoint.load)):
        folder = Path(config.checkpoint.load)
        check_same_model(folder, read_model(folder), config.model)


def write_model(folder: Path, model: ModelConfig) -> None:
    """Write the file that says which model the weights are of."""
    content = {"format_version": FORMAT_VERSION, "model": dataclasses.asdict(model)}
    (folder / MODEL_FILE).write_text(json.dumps(content, indent=2) + "\n")


def read_model(folder: Path) -> ModelConfig:
    """The model the weights are of.

    Raises:
        CheckpointError: the file is damaged or of another version.
    """
    path = folder / MODEL_FILE
    try:
        content = json.loads(path.read_text())
        version, model = content["format_version"], content["model"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error!r}); convert the checkpoint again") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {version}, this program reads version {FORMAT_VERSION}")
    try:
        read = model_from_json(model, str(path))
    except ConfigError as error:
        raise CheckpointError(f"{error}; convert the checkpoint again") from error
    if problems := model_problems(read):
        raise CheckpointError(f"{path}: {'; '.join(problems)}; convert the checkpoint again")
    return read


def load_into(folder: Path, model: "Model", config: ModelConfig) -> None:
    """Fill this rank's parameters, but for adapters, from a weights folder, under any layout; no communication.

    Raises:
        CheckpointError: the weights are of another model (names the settings), or the folder is damaged.
    """
    from internvl_megatron.model.adapter import is_adapter  # it imports Megatron Core, which costs seconds

    check_same_model(folder, read_model(folder), config)
    tensors = SafetensorsFolder.open(folder)
    try:
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                continue
            if name not in tensors or tensors[name].dtype not in DTYPES:
                what = tensors[name].dtype if name in tensors else "missing"
                raise CheckpointError(f"{folder}: {name} is {what}; convert the checkpoint again")
            model.load_full(name, parameter, tensors.read(name))
    finally:
        tensors.close()


def same_weights(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two models differ in nothing but settings of their training."""
    return all(name in TRAINING_ONLY for name in changed_fields(one, other))


def check_same_model(folder: Path, stored: ModelConfig, wanted: ModelConfig) -> None:
    """Compare the model of a checkpoint with a run's: more than shapes can tell, like rope_theta.

    Raises:
        CheckpointError: they differ; says what to set.
    """
    differing = [name for name in changed_fields(wanted, stored) if name not in TRAINING_ONLY]
    if differing:
        settings = " ".join(f"model.{name}={_value_at(stored, name)}" for name in differing)
        raise CheckpointError(
            f"{folder}: holds another model than this run's; choose the recipe of its size, or set {settings}"
        )


def companions_of(checkpoint: Path) -> Path | None:
    """Folder of the files beside the weights, of a weights folder, a run, or a checkpoint inside a run."""
    for place in (checkpoint, checkpoint.parent.parent):
        if (place / COMPANIONS).is_dir():
            return place / COMPANIONS
    return None


def copy_companions(checkpoint: Path, run: Path) -> None:
    """Keep in a run what the checkpoint it starts from has beside its weights."""
    source, target = companions_of(checkpoint), run / COMPANIONS
    if source is not None and not target.exists():
        writing = run / f"{COMPANIONS}.writing"
        shutil.rmtree(writing, ignore_errors=True)
        shutil.copytree(source, writing)
        writing.rename(target)


def _value_at(section: object, path: str) -> object:
    for part in path.split("."):
        section = getattr(section, part)
    return section
