"""Answers of an evaluation on disk, so that one that was killed goes on where it was.

A line of jsonl for each, with the key of what was asked: weights, settings, question and pictures. An answer is used again if, and only
if, its key is asked for again. Each replica writes a file of its own.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from internvl_megatron.data.json_object import parse_object
from internvl_megatron.errors import ConfigError, DataError

_ENDING = ".jsonl"


class AnswerStore:
    """The answers of a benchmark."""

    def __init__(self, folder: Path) -> None:
        """Use a folder, which need not be there."""
        self.folder = folder

    def read(self) -> dict[str, str]:
        """Answers by their keys. A last line that was cut off, by a kill, is left out.

        Raises:
            DataError: another line is damaged.
        """
        return {entry["key"]: entry["answer"] for entry in self._entries()}

    @contextmanager
    def writer(self, replica: int) -> Iterator["AnswerWriter"]:
        """Add answers of one replica.

        Raises:
            ConfigError: the folder cannot be written, or another evaluation writes to it.
        """
        path = self.folder / f"{replica:05d}{_ENDING}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = path.open("a+b", buffering=0)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another --output") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(
                    f"{path}: another evaluation writes to it; wait for it, or choose another --output"
                ) from error
            _cut_off_half_a_line(file)
            yield AnswerWriter(file)

    def _entries(self) -> Iterator[dict[str, Any]]:
        for path in sorted(self.folder.glob(f"*{_ENDING}")):
            lines = path.read_bytes().splitlines(keepends=True)
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                where = f"{path}:{number}"
                entry = parse_object(line, where, "each line")
                if not isinstance(entry.get("key"), str) or not isinstance(entry.get("answer"), str):
                    raise DataError(f"{where}: must have texts 'key' and 'answer'; remove the line, it is asked again")
                yield entry


class AnswerWriter:
    """Adds lines to a file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def add(self, key: str, **fields: str) -> None:
        """Add an answer. It is with the operating system on return: a killed process loses none."""
        line = json.dumps({"key": key, **fields}, ensure_ascii=False) + "\n"
        self._file.write(line.encode("utf-8", errors="backslashreplace"))


def _cut_off_half_a_line(file: BinaryIO) -> None:
    """What a kill has left of a line would spoil the next one."""
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.ftruncate(file.fileno(), whole)
