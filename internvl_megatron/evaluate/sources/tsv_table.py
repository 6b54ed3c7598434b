"""VLMEvalKit's tables: tab-separated, a question a row, pictures in base64 inside. Rows are found by byte offset, and pictures
are read when they are wanted: a table may be larger than memory.

Instead of a picture a row may have the index of the row that has it (MMBench's rotated questions), or a list of several.
"""

import base64
import binascii
import csv
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from internvl_megatron.errors import DataError
from internvl_megatron.evaluate.sources.picture import Picture, file_version
from internvl_megatron.evaluate.sources.record import Record, spelled_list

PICTURES = "image"
"""Column of the pictures."""

_CHUNK_BYTES = 2**24
_LONGEST_INDEX = 64
"""Characters; what is longer is a picture (VLMEvalKit `image_base.py`)."""


@dataclass(frozen=True, slots=True)
class _Span:
    """A row: bytes of the file, and its first line counted from 1."""

    start: int
    end: int
    line: int


def read_tsv(path: Path, needed: Sequence[str]) -> list[Record]:
    """Records of a table.

    Args:
        path: of it.
        needed: columns that must be there.

    Raises:
        DataError: the table is not there, lacks a column, or has a malformed row; names file, line and column.
    """
    csv.field_size_limit(sys.maxsize)  # a picture is one field
    version = file_version(path)
    header_span, *spans = _rows(path)
    columns = _cells(path, header_span)
    lacking = [name for name in needed if name not in columns]
    if lacking:
        raise DataError(
            f"{path}: has no column {lacking[0]!r}; columns are {', '.join(columns)}; is it another benchmark's table?"
        )
    place = columns.index(PICTURES) if PICTURES in columns else None
    short: dict[str, tuple[_Span, str]] = {}
    rows: list[tuple[_Span, dict[str, str | None], str]] = []
    for span in spans:
        cells = _cells(path, span)
        if len(cells) != len(columns):
            raise DataError(
                f"{path}:{span.line}: has {len(cells)} fields, the table {len(columns)} columns; download it again"
            )
        fields = {name: cell or None for name, cell in zip(columns, cells, strict=True) if name != PICTURES}
        picture = cells[place] if place is not None else ""
        kind = "" if not picture else picture if len(picture) <= _LONGEST_INDEX else f"{_count(picture)} pictures"
        rows.append((span, fields, kind))
        if "index" in fields and fields["index"] is not None:
            short[fields["index"]] = (span, kind)
    return [_record(path, version, place, span, fields, kind, short) for span, fields, kind in rows]


def _count(cell: str) -> int:
    listed = spelled_list(cell)
    return 1 if listed is None else len(listed)


def _record(
    path: Path,
    version: str,
    place: int | None,
    span: _Span,
    fields: dict[str, str | None],
    kind: str,
    by_index: dict[str, tuple[_Span, str]],
) -> Record:
    """A row with its pictures, which may be another row's."""
    where, source = f"{path}:{span.line}", span
    if kind and not kind.endswith(" pictures"):
        if kind not in by_index or not by_index[kind][1].endswith(" pictures"):
            raise DataError(f"{where}: field 'image': is the index {kind!r}, and no row of that index has a picture")
        source, kind = by_index[kind]
    count = int(kind.split()[0]) if kind else 0
    pictures = tuple(
        Picture(where, f"{version} {source.start} {number}", read=partial(_picture, path, source, place or 0, number))
        for number in range(count)
    )
    return Record(fields, where, {PICTURES: pictures})


def _picture(path: Path, span: _Span, place: int, number: int) -> bytes:
    """The bytes of a picture."""
    cell = _cells(path, span)[place]
    listed = spelled_list(cell)
    try:
        return base64.b64decode(cell if listed is None else str(listed[number]), validate=True)
    except binascii.Error as error:
        raise DataError(
            f"{path}:{span.line}: field 'image': is not base64 ({error}); download the table again"
        ) from error


def _cells(path: Path, span: _Span) -> list[str]:
    """The cells of a row."""
    with path.open("rb", buffering=0) as file:
        file.seek(span.start)
        content = file.read(span.end - span.start)
    try:
        (cells,) = csv.reader(io.StringIO(content.decode("utf-8"), newline=""), delimiter="\t", strict=True)
    except (UnicodeDecodeError, csv.Error, ValueError) as error:
        raise DataError(f"{path}:{span.line}: is no row of a table ({error}); download it again") from error
    return cells


def _rows(path: Path) -> list[_Span]:
    """Where rows are: they end at line breaks outside quotes, which stand in pairs."""
    spans: list[_Span] = []
    start, line = 0, 1
    for end, next_line in _row_ends(path):
        spans.append(_Span(start, end, line))
        start, line = end, next_line
    spans = [span for span in spans if span.end - span.start > 1]  # blank lines
    if len(spans) < 2:
        raise DataError(f"{path}: has no rows; download it again")
    return spans


def _row_ends(path: Path) -> Iterator[tuple[int, int]]:
    """The byte behind each row, and the line that begins there."""
    offset, num_quotes, line = 0, 0, 1
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            content = np.frombuffer(chunk, dtype=np.uint8)
            breaks, quotes = np.flatnonzero(content == ord("\n")), np.flatnonzero(content == ord('"'))
            before = np.searchsorted(quotes, breaks) + num_quotes
            for number in np.flatnonzero(before % 2 == 0).tolist():
                yield offset + int(breaks[number]) + 1, line + number + 1
            offset, num_quotes, line = offset + len(chunk), num_quotes + len(quotes), line + len(breaks)
    if num_quotes % 2:
        raise DataError(f"{path}: a quotation mark is never closed: the table is cut off; download it again")
    yield offset, line
