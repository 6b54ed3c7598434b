"""Records of a jsonl file, read one at a time by byte offset."""

import os
from pathlib import Path
from typing import Any

from internvl_megatron.data.json_object import parse_object
from internvl_megatron.data.jsonl_index import JsonlIndex, index_in_memory
from internvl_megatron.errors import DataError


class JsonlFile:
    """Records of a jsonl file, found by byte offset and read one at a time. Blank lines are not records.

    It holds no descriptor, so processes and threads may share it, and may be pickled.
    """

    def __init__(self, path: Path, index: JsonlIndex | None = None, name: str | None = None) -> None:
        """Use an index, or make one in memory, which is for small files.

        Args:
            path: of the file.
            index: of it.
            name: for messages; None = the path.

        Raises:
            DataError: there is no record.
        """
        self.path = path
        self._name = str(path) if name is None else name
        self._index = index_in_memory(path) if index is None else index
        if not len(self._index):
            raise DataError(f"{self._name}: has no records")

    def __len__(self) -> int:
        """Number of records."""
        return len(self._index)

    def where(self, index: int) -> str:
        """`file:line` of a record, line counted from 1."""
        return f"{self._name}:{self._index.line(index)}"

    def read(self, index: int) -> dict[str, Any]:
        """The JSON object of record `index`.

        Raises:
            DataError: the line is not one, or the file is not the one that was indexed.
        """
        return parse_object(self._line(index), self.where(index), "each line")

    def _line(self, index: int) -> bytes:
        """The bytes of a record's line."""
        start, end = self._index.span(index)
        before = min(start, 1)  # the line break before it is read as well, to see that it is there
        try:
            with self.path.open("rb", buffering=0) as file:
                content = os.pread(file.fileno(), end - start + before, start - before)
        except OSError as error:
            raise DataError(f"{self.where(index)}: cannot be read ({error.strerror})") from error
        is_last = index == len(self) - 1
        if (
            len(content) < end - start + before
            or content[:before].strip(b"\n")
            or not (is_last or content[-1:] == b"\n")
        ):
            raise DataError(
                f"{self.where(index)}: is not where it was when the file was indexed; put the file back as it was, or start "
                "again, and it is indexed anew"
            )
        return content[before:].partition(b"\n")[0]
