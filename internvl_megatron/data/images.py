"""Image files: their size from the header alone, and their decoded tiles. Files are outside input and may be broken."""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image

from internvl_megatron.data.tiling import Grid, cut_tiles
from internvl_megatron.errors import DataError

MAX_IMAGE_PIXELS = 178_956_970
"""Larger images are refused before they are decoded: a few kilobytes can unpack to gigabytes."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Formats that are opened. Left out on purpose: those that hand the file to another program, like EPS."""

_IMAGE_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, ArithmeticError, RuntimeError,
    AttributeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's format readers raise on missing, damaged or hostile files."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image of a sample: where it is and how it is to be cut. Small enough to be sent to every rank."""

    path: str
    grid: Grid
    num_tiles: int
    """Tiles, thumbnail counted."""
    jpeg_seed: int | None
    """Seed of the JPEG augmentation; None = off."""
    where: str = ""
    """`file:line` of the record it belongs to, for messages."""


@contextmanager
def _open_image(path: str) -> Iterator[Image.Image]:
    """Open an image, turning everything that is wrong with the file into a `DataError` that names it."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_IMAGE_PIXELS:
                raise DataError(f"image {path}: {width}x{height} is over {MAX_IMAGE_PIXELS} pixels; scale it down")
            if not (width and height):
                raise DataError(f"image {path}: {width}x{height} has no pixels; replace the file")
            yield image
    except FileNotFoundError as error:
        raise DataError(
            f"image {path}: file not found; check the record's 'image' and the dataset's 'root'"
        ) from error
    except DataError:
        raise
    except _IMAGE_ERRORS as error:
        raise DataError(f"image {path}: cannot be read ({error}); replace the file or drop the record") from error


def image_size(path: str) -> tuple[int, int]:
    """(width, height) from the header, without decoding. Raises `DataError` if the file is missing or broken."""
    with _open_image(path) as image:
        return image.size


def decode_tiles(image: ImageRef, tile_pixels: int, use_thumbnail: bool, out: np.ndarray | None = None) -> np.ndarray:
    """Decode an image and cut it: uint8 [image.num_tiles, 3, tile_pixels, tile_pixels], `out` if given. Raises `DataError`."""
    try:
        with _open_image(image.path) as opened:
            tiles = cut_tiles(opened, image.grid, tile_pixels, use_thumbnail, image.jpeg_seed, out)
    except DataError as error:
        raise DataError(f"{image.where}: field 'image': {error}" if image.where else str(error)) from error
    assert len(tiles) == image.num_tiles, f"{image.path}: {len(tiles)} tiles, {image.num_tiles} were promised"
    return tiles
