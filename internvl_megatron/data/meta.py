"""InternVL's meta file: the JSON that lists the data sets of a run."""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_megatron.errors import DataError
from internvl_megatron.object_store import is_url

_REQUIRED_KEYS = ("root", "annotation", "data_augment", "repeat_time")
_OPTIONAL_KEYS = ("length", "max_dynamic_patch", "group", "split")


@dataclass(frozen=True, slots=True)
class DatasetEntry:
    """One data set of a meta file, checked."""

    name: str
    root: Path | str
    """Folder image paths are relative to, or its URL; not used of a store, whose media are in it."""
    annotation: Path | str
    """The jsonl file, or its URL, or the folder of a store of samples or of packed rows."""
    repeat_time: float
    """Below 1: only the first such share of the lines is used. Otherwise whole: the lines are used so many times."""
    data_augment: bool
    """JPEG augmentation of the images."""
    max_tiles: int | None
    """Replaces `DataConfig.max_tiles` (`max_dynamic_patch` in the file); None = it does not."""
    group: str | None = None
    """Data sets that share a weight of `DataConfig.group_weights`."""
    split: str | None = None
    """Of a WebDataset store, the split to use; None = 'train'."""


def read_meta(meta_path: str | Path) -> list[DatasetEntry]:
    """Read and check a meta file. Relative paths in it are relative to its own folder.

    Raises:
        DataError: with every problem of the file, one a line.
    """
    path = Path(meta_path)
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); set data.meta to an InternVL meta file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not a valid meta file ({error})") from error
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path}: must be a JSON object with one entry per data set")
    problems = [f"{path}: {name}: {text}" for name, entry in content.items() for text in _problems(entry)]
    if problems:
        raise DataError("\n".join(problems))
    return [_entry(name, entry, path.parent) for name, entry in content.items()]


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refused if a key is there twice (JSON readers silently keep the last)."""
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} given more than once")
    return dict(pairs)


def _is_number(value: object, *kinds: type) -> bool:
    """Whether a JSON value is a number of one of the kinds; true and false are not numbers."""
    return isinstance(value, kinds) and not isinstance(value, bool)


def _problems(entry: object) -> list[str]:
    """What is wrong with one data set's entry."""
    if not isinstance(entry, dict):
        return [f"must be an object with {', '.join(_REQUIRED_KEYS)}"]
    known = (*_REQUIRED_KEYS, *_OPTIONAL_KEYS)
    problems = [f"'{key}' is missing" for key in _REQUIRED_KEYS if key not in entry]
    for key in entry:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)
            problems.append(f"'{key}' is not a known key; did you mean '{nearest[0]}'?")
    checks = {
        "root": (lambda value: isinstance(value, str), "must be a string"),
        "annotation": (
            lambda value: isinstance(value, str) and value,
            "must be the path of a jsonl file or of a WebDataset store",
        ),
        "data_augment": (lambda value: isinstance(value, bool), "must be true or false"),
        "repeat_time": (_valid_repeat_time, "must be a fraction between 0 and 1 or a whole number from 1"),
        "length": (lambda value: _is_number(value, int), "must be a whole number"),
        "max_dynamic_patch": (lambda value: _is_number(value, int) and value >= 1, "must be a whole number from 1"),
        "group": (lambda value: isinstance(value, str) and value, "must be the name of a group"),
        "split": (lambda value: isinstance(value, str) and value, "must be the name of a split"),
    }
    problems += [
        f"'{key}' {demand}, not {json.dumps(entry[key])}"
        for key, (is_valid, demand) in checks.items()
        if key in entry and not is_valid(entry[key])
    ]
    return problems


def _valid_repeat_time(value: Any) -> bool:
    """Whether a repeat_time is a fraction of the lines or a whole number of passes (NaN and infinity are neither)."""
    return _is_number(value, int, float) and (0 < value < 1 or (1 <= value < 1e6 and float(value).is_integer()))


def _entry(name: str, entry: dict[str, Any], folder: Path) -> DatasetEntry:
    """A checked entry, its paths made relative to the meta file's folder."""
    return DatasetEntry(
        name=name,
        root=entry["root"] if is_url(entry["root"]) else folder / entry["root"],
        annotation=entry["annotation"] if is_url(entry["annotation"]) else folder / entry["annotation"],
        repeat_time=float(entry["repeat_time"]),
        data_augment=entry["data_augment"],
        max_tiles=entry.get("max_dynamic_patch"),
        group=entry.get("group"),
        split=entry.get("split"),
    )
