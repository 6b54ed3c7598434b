"""Records of JSON files: a list of objects, whole or below a key, or an object a line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internvl_megatron.data.jsonl_file import JsonlFile
from internvl_megatron.errors import DataError
from internvl_megatron.evaluate.sources.picture import file_version
from internvl_megatron.evaluate.sources.record import Record


def read_json_list(path: Path, needed: Sequence[str], key: str | None = None) -> list[Record]:
    """Records of a file that is a list, or an object with the list at `key`.

    Raises:
        DataError: the file is not there or not that, or a record lacks a field; names file, record and field.
    """
    file_version(path)
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not valid JSON ({error}); download it again") from error
    if key is not None:
        content = content.get(key) if isinstance(content, dict) else None
    if not isinstance(content, list) or not content:
        raise DataError(f"{path}: must be a list of records{f' at {key!r}' if key else ''}; is it another file?")
    return [_checked(raw, f"{path}: record {number}", needed) for number, raw in enumerate(content, 1)]


def read_json_lines(path: Path, needed: Sequence[str]) -> list[Record]:
    """Records of a file with one a line.

    Raises:
        DataError: the file is not there, a line is no object, or lacks a field; names file, line and field.
    """
    file_version(path)
    file = JsonlFile(path)
    return [_checked(file.read(number), file.where(number), needed) for number in range(len(file))]


def _checked(raw: Any, where: str, needed: Sequence[str]) -> Record:
    if not isinstance(raw, dict):
        raise DataError(f"{where}: is a JSON {type(raw).__name__}; it must be an object")
    record = Record(raw, where)
    for name in needed:
        if not record.has(name):
            raise record.error(name, f"is not there; fields are {', '.join(raw)}")
    return record
