"""Rows as bytes, to send them from one rank to the others: a JSON header and the raw arrays. Nothing is unpickled.

The bytes of several rows, one after the other in any order, are a buffer of rows.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import numpy as np

from internvl_megatron.data.files import Span
from internvl_megatron.data.images import ImageRef
from internvl_megatron.data.packing import Row, SampleSource
from internvl_megatron.data.video import VideoFrames

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
        images = _images(header["images"])
        sources = tuple(SampleSource(*source) for source in header["sources"])
        assert header["slot"] not in rows, f"two rows for slot {header['slot']}"
        rows[header["slot"]] = Row(sources=sources, images=images, **arrays)
    return dict(sorted(rows.items()))


def _header(slot: int, row: Row) -> dict[str, Any]:
    """The part of a row that is not arrays, and the arrays' lengths."""
    return {
        "slot": slot,
        "lengths": {name: len(getattr(row, name)) for name in _ARRAYS},
        "sources": [astuple(source) for source in row.sources],
        "images": [astuple(image) for image in row.images],
    }


def images_to_json(images: Sequence[ImageRef]) -> str:
    """Images as text, which `images_from_json` gives back exactly."""
    return json.dumps([astuple(image) for image in images])


def images_from_json(text: str) -> tuple[ImageRef, ...]:
    """Images from their text. Raises ValueError or TypeError if it is none."""
    return _images(json.loads(text))


def _images(fields: list[list[Any]]) -> tuple[ImageRef, ...]:
    return tuple(_image(*image) for image in fields)


def _image(path: str, grid: list[int], *rest: Any) -> ImageRef:
    """An image from its fields as JSON gives them back."""
    tiles, jpeg_seed, where, video, span = rest
    if video is not None:
        seed, clip, files = video
        video = VideoFrames(seed, None if clip is None else (clip[0], clip[1]), tuple(files))
    return ImageRef(path, (grid[0], grid[1]), tiles, jpeg_seed, where, video, None if span is None else Span(*span))
