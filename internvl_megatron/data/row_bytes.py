"""Rows as bytes, to send them from one rank to the others: a JSON header and the raw arrays. Nothing is unpickled."""

import json
import struct
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import numpy as np

from internvl_megatron.data.images import ImageRef
from internvl_megatron.data.packing import Row, SampleSource

_ARRAYS = {
    "token_ids": "<i4",
    "targets": "<i4",
    "weights": "<f4",
    "positions": "<i4",
    "segment_lengths": "<i4",
    "image_starts": "<i4",
    "tile_starts": "<i4",
}
"""Arrays of a row and their type in the buffer, in its order."""

_HEADER_SIZE = struct.Struct("<Q")


def rows_to_bytes(rows: Sequence[Row]) -> bytes:
    """All rows in one buffer; `rows_from_bytes` gives them back exactly."""
    header = json.dumps([_row_header(row) for row in rows]).encode()
    arrays = [np.ascontiguousarray(getattr(row, name), dtype=kind) for row in rows for name, kind in _ARRAYS.items()]
    return b"".join([_HEADER_SIZE.pack(len(header)), header, *(array.tobytes() for array in arrays)])


def rows_from_bytes(buffer: bytes) -> list[Row]:
    """Rows out of a buffer made by `rows_to_bytes`."""
    (header_bytes,) = _HEADER_SIZE.unpack_from(buffer)
    offset = _HEADER_SIZE.size + header_bytes
    rows = []
    for header in json.loads(buffer[_HEADER_SIZE.size : offset]):
        arrays: dict[str, np.ndarray] = {}
        for name, kind in _ARRAYS.items():
            array = np.frombuffer(buffer, dtype=kind, count=header["lengths"][name], offset=offset)
            arrays[name] = array.astype(array.dtype.newbyteorder("="))  # a copy that can be written
            offset += array.nbytes
        images = tuple(ImageRef(path, (cols, rows), *rest) for path, (cols, rows), *rest in header["images"])
        rows.append(Row(sources=tuple(SampleSource(*source) for source in header["sources"]), images=images, **arrays))
    assert offset == len(buffer), f"{len(buffer)} bytes, rows end at {offset}"
    return rows


def _row_header(row: Row) -> dict[str, Any]:
    """The part of a row that is not arrays, and the arrays' lengths."""
    return {
        "lengths": {name: len(getattr(row, name)) for name in _ARRAYS},
        "sources": [astuple(source) for source in row.sources],
        "images": [astuple(image) for image in row.images],
    }
