"""Images of a sample: their size from the header alone, and their decoded tiles. Files are outside input and may be broken.

An image is opened as InternVL opens it, `Image.open(...).convert("RGB")`: of a file with many frames the first is read, and
what EXIF says of orientation is ignored, except where Pillow itself acts on it (TIFF).
"""

import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from internvl_megatron.data.files import FileError, Span, file_name, list_folder, open_file
from internvl_megatron.data.tiling import Grid, cut_frame, cut_tiles
from internvl_megatron.data.video import VideoFrames, choose_frames, decode_frames
from internvl_megatron.errors import ConfigError

MAX_IMAGE_PIXELS = 178_956_970
"""Larger images are refused before they are decoded: a few kilobytes can unpack to gigabytes."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Formats that are opened. Left out on purpose: those that hand the file to another program, like EPS."""

FRAME_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
"""Names of files that are frames where a video is a folder."""

_IMAGE_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, ArithmeticError, RuntimeError,
    AttributeError, struct.error, zlib.error, MemoryError,
)  # fmt: skip
"""What Pillow's format readers raise on missing, damaged or hostile files."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image or a video of a sample: where it is and how it is to be cut. Small enough to be sent to every rank."""

    path: str
    """Path or URL; of a video the file, or the folder its frames are in."""
    grid: Grid
    """Of each frame, if it is a video."""
    num_tiles: int
    """Tiles, thumbnail counted; of a video one a frame."""
    jpeg_seed: int | None
    """Seed of the JPEG augmentation; None = off."""
    where: str = ""
    """`file:line` or `shard:key` of the record it belongs to, for messages."""
    video: VideoFrames | None = None
    """Which frames of the video; None = an image."""
    span: Span | None = None
    """The part of the file that it is, such as a member of a tar; None = the file is the image or video."""

    def fields(self) -> tuple[Any, ...]:
        """What JSON can hold of it, which is all; `from_fields` makes it again, exactly."""
        return astuple(self)

    @classmethod
    def from_fields(cls, fields: Sequence[Any]) -> "ImageRef":
        """An image from its fields as JSON gives them back. Raises ValueError or TypeError if they are none."""
        path, (columns, rows), tiles, jpeg_seed, where, video, span = fields
        numbers, names = [columns, rows, tiles], [path, where]
        if video is not None:
            seed, clip, files = video
            video = VideoFrames(seed, None if clip is None else (clip[0], clip[1]), tuple(files))
            names += files
            if any("/" in name for name in files):
                raise ValueError(f"frames {files} are not in the folder of their video")
        if span is not None:
            span = Span(*span)
            numbers += [span.offset + 1, span.size + 1]
            names.append(span.name)
        if not (
            all(type(number) is int and number > 0 for number in numbers) and all(isinstance(n, str) for n in names)
        ):
            raise ValueError(f"{fields!r:.200} are not the fields of an image")
        return cls(path, (columns, rows), tiles, jpeg_seed, where, video, span)

    @property
    def kind(self) -> Literal["image", "video"]:
        """What it is, and the record's field that names it."""
        return "image" if self.video is None else "video"

    @property
    def name(self) -> str:
        """What messages call it."""
        return file_name(self.path, self.span)

    @property
    def at(self) -> str:
        """How a message about it begins: its record and field; nothing if it belongs to no record."""
        return f"{self.where}: field '{self.kind}': " if self.where else ""


@contextmanager
def open_image(path: str, span: Span | None = None) -> Iterator[Image.Image]:
    """An image while a block runs; everything that is wrong with the file, also later, becomes a `FileError` that names it."""
    name = file_name(path, span)
    try:
        with open_file(path, span) as file, Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_IMAGE_PIXELS:
                raise FileError("pixels", f"{name}: {width}x{height} is over {MAX_IMAGE_PIXELS} pixels; scale it down")
            if not (width and height):
                raise FileError("image", f"{name}: {width}x{height} has no pixels; replace the file")
            yield image
    except ConfigError:
        raise
    except FileError as error:
        raise FileError(error.fault, f"image {error}") from error
    except Image.DecompressionBombError as error:
        raise FileError("pixels", f"image {name}: {error}; scale it down") from error
    except _IMAGE_ERRORS as error:
        raise FileError(
            "image", f"image {name}: cannot be read ({error}); replace the file or drop the record"
        ) from error


def image_size(path: str, span: Span | None = None) -> tuple[int, int]:
    """(width, height) of an image file, or of the part of a file that is one, from the header, without decoding.

    Raises:
        FileError: the file is missing or broken.
    """
    with open_image(path, span) as image:
        return image.size


def choose_files(folder: str, count: int, seed: int | None) -> tuple[str, ...]:
    """Names of `count` frames of a video that is a folder of images, those that `choose_frames` chooses.

    Raises:
        FileError: there is no such folder, or no image in it.
    """
    names = [name for name in list_folder(folder) if name.lower().endswith(FRAME_ENDINGS) and not name.startswith(".")]
    if not names:
        raise FileError("video", f"video {folder}: has no {', '.join(FRAME_ENDINGS)} files; drop the record")
    return tuple(names[number] for number in choose_frames(len(names), count, seed))


def decode_tiles(image: ImageRef, tile_pixels: int, use_thumbnail: bool, out: np.ndarray | None = None) -> np.ndarray:
    """Decode an image or a video and cut it: uint8 [image.num_tiles, 3, tile_pixels, tile_pixels], `out` if given.

    Raises:
        FileError: the file is missing or broken; the message names the record too.
        ConfigError: a program that reads such files is not installed.
    """
    out = np.empty((image.num_tiles, 3, tile_pixels, tile_pixels), dtype=np.uint8) if out is None else out
    try:
        if image.video is not None:
            _decode_video(image, image.video, out)
            return out
        with open_image(image.path, image.span) as opened:
            tiles = cut_tiles(opened, image.grid, tile_pixels, use_thumbnail, image.jpeg_seed, out)
    except FileError as error:
        raise FileError(error.fault, f"{image.at}{error}") from error
    assert len(tiles) == image.num_tiles, f"{image.name}: {len(tiles)} tiles, {image.num_tiles} were promised"
    return tiles


def _decode_video(image: ImageRef, video: VideoFrames, tiles: np.ndarray) -> None:
    """Decode the frames of a video, one tile each, without thumbnails."""
    seeds: list[int | None] = [None] * len(tiles)
    if image.jpeg_seed is not None:
        seeds = list(np.random.default_rng(image.jpeg_seed).integers(2**63, size=len(tiles)).tolist())
    frames = (
        _folder_frames(image.path, video)
        if video.files
        else decode_frames(image.path, video, len(tiles), MAX_IMAGE_PIXELS, image.span)
    )
    for tile, frame, seed in zip(tiles, frames, seeds, strict=True):
        cut_frame(frame, seed, tile)


def _folder_frames(folder: str, video: VideoFrames) -> Iterator[Image.Image]:
    """The frames of a video that is a folder of images."""
    for name in video.files:
        with open_image(f"{folder.rstrip('/')}/{name}") as frame:
            yield frame.convert("RGB")
