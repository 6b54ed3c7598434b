"""What the tools that look at data have in common: their arguments, the settings these stand for, and files written whole."""

import argparse
import os
from dataclasses import replace
from pathlib import Path

from internvl_megatron.config.overrides import CONFIG_FILE, apply_overrides, from_json
from internvl_megatron.config.plan import plan
from internvl_megatron.config.recipes import find_recipe
from internvl_megatron.config.schema import BenchmarkConfig, ParallelConfig, RunConfig
from internvl_megatron.data.dataset import Dataset, load_datasets, prepare_records
from internvl_megatron.data.files import write_whole
from internvl_megatron.data.meta import read_meta
from internvl_megatron.data.mixture import dataset_groups
from internvl_megatron.errors import ConfigError

DEFAULT_RECIPE = "internvl3_1b_sft"
"""Its data settings are those of all released sizes."""


def data_parser(description: str) -> argparse.ArgumentParser:
    """A parser of META, --tokenizer, --recipe and overrides; `parse_intermixed_args` takes overrides in any place."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("meta", type=Path, help="InternVL's meta JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings to change")
    parser.add_argument("--tokenizer", help="folder of the run's tokenizer; default: the one the settings name")
    parser.add_argument(
        "--recipe",
        default=DEFAULT_RECIPE,
        help=f"whose settings: name of a recipe (default: {DEFAULT_RECIPE}), or folder of a run",
    )
    return parser


def read_config(options: argparse.Namespace) -> RunConfig:
    """The configuration of the run that would train on the data; how the model is divided over ranks is left out.

    Raises:
        ConfigError: there is no such recipe, run or setting, no tokenizer is named, or settings do not go together.
    """
    is_run = (Path(options.recipe) / CONFIG_FILE).is_file()
    config = from_json(Path(options.recipe) / CONFIG_FILE) if is_run else find_recipe(options.recipe)
    tokenizer = options.tokenizer or config.data.tokenizer
    config = replace(config, data=replace(config.data, meta=str(options.meta), tokenizer=tokenizer))
    config = apply_overrides(config, options.overrides)
    if not config.data.tokenizer:
        raise ConfigError(
            "--tokenizer is missing: give the folder of the run's tokenizer (lengths depend on it); "
            "`python -m tools.build_qwen_tokenizer FOLDER` writes that of the released models"
        )
    # What the tools look at is `data.meta` on one rank.
    config = replace(config, parallel=ParallelConfig(), eval_every_steps=None, benchmarks=BenchmarkConfig())
    config = replace(config, data=replace(config.data, eval_meta=None))
    plan(config, 1)
    return config


def open_datasets(config: RunConfig) -> list[Dataset]:
    """The data sets of the meta file, those without an index indexed.

    Raises:
        DataError: with one line for every entry of the meta file or annotation file that cannot be used.
    """
    data = config.data
    folder = None if data.index_folder is None else Path(data.index_folder)
    entries = read_meta(data.meta)
    dataset_groups(entries, data.group_weights)
    prepare_records(entries, folder, len(os.sched_getaffinity(0)))
    return load_datasets(data.meta, folder)


def check_can_write(path: Path) -> None:
    """Whether a file can be written there, before long work.

    Raises:
        ConfigError: it cannot.
    """
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; name a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}; make it, or choose another")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{path}: folder {path.parent} is not writable; choose another")


def write_report(path: Path, text: str) -> None:
    """Write a file that appears when it is whole.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        write_whole(path, text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another place") from error


def printable(text: str, most_characters: int = 500) -> str:
    """Text from data for a terminal or a report: on one line, without control characters, not too long."""
    shown = text[:most_characters] + ("..." if len(text) > most_characters else "")
    return "".join(part if part.isprintable() else part.encode("unicode_escape").decode() for part in shown)
