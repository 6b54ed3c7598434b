"""Rows as bytes, to send them from one rank to the others: a JSON header and the raw arrays. Nothing is unpickled.

The bytes of several rows, one after the other in any order, are a buffer of rows.
"""

import json
import struct
from dataclasses import astuple
from typing import Any

import numpy as np

from internvl_megatron.data.images import ImageRef
from internvl_megatron.data.rows import Row, SampleSource

_ARRAYS = {
    "token_ids": "<i4",
    "targets": "<i4",
    "weights": "<f4",
    "positions": "<i4",
    "segment_lengths": "<i4",
    "image_starts": "<i4",
    "tile_starts": "<i4",
    "reference_logprobs": "<f8",
}
"""Arrays of a row and their type in the buffer, in its order."""

_HEADER_SIZE = struct.Struct("<Q")


def row_to_bytes(slot: int, row: Row) -> bytes:
    """A row and its slot of the global batch; `rows_from_bytes` gives both back exactly."""
    header = json.dumps(_header(slot, row)).encode()
    arrays = [np.ascontiguousarray(getattr(row, name), dtype=kind) for name, kind in _ARRAYS.items()]
    return b"".join([_HEADER_SIZE.pack(len(header)), header, *(array.tobytes() for array in arrays)])


def rows_from_bytes(buffer: bytes) -> dict[int, Row]:
    """{slot: row} of a buffer of rows, by ascending slot."""
    rows: dict[int, Row] = {}
    offset = 0
    while offset < len(buffer):
        (header_bytes,) = _HEADER_SIZE.unpack_from(buffer, offset)
        offset += _HEADER_SIZE.size + header_bytes
        header = json.loads(buffer[offset - header_bytes : offset])
        arrays: dict[str, np.ndarray] = {}
        for name, kind in _ARRAYS.items():
            array = np.frombuffer(buffer, dtype=kind, count=header["lengths"][name], offset=offset)
            arrays[name] = array.astype(array.dtype.newbyteorder("="))  # a copy that can be written
            offset += array.nbytes
        images = tuple(ImageRef.from_fields(fields) for fields in header["images"])
        sources = tuple(SampleSource(*source) for source in header["sources"])
        assert header["slot"] not in rows, f"two rows for slot {header['slot']}"
        rows[header["slot"]] = Row(sources=sources, images=images, has_pairs=header["has_pairs"], **arrays)
    return dict(sorted(rows.items()))


def _header(slot: int, row: Row) -> dict[str, Any]:
    """The part of a row that is not arrays, and the arrays' lengths."""
    return {
        "slot": slot,
        "lengths": {name: len(getattr(row, name)) for name in _ARRAYS},
        "sources": [astuple(source) for source in row.sources],
        "images": [image.fields() for image in row.images],
        "has_pairs": row.has_pairs,
    }
