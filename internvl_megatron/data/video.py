"""Videos: which frames of one a sample has, and their decoding by PyAV, which is imported only for videos.

Frames follow InternVL's `rand` sampling: the clip is divided into equal segments of frames and one is drawn from each. They
are counted in the file's packets when it is decoded, so variable frame rates and wrong headers do not matter. What the
file's header says of rotation is ignored, as orientation is with images.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image

from internvl_megatron.data.files import FileError, Span, file_name, open_file
from internvl_megatron.errors import ConfigError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

FORMATS = ("mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "gif", "m4v", "3gp", "nut")
"""Containers that are opened. Left out on purpose: play lists and the like, whose files name other files."""

ENDINGS = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".ogv", ".3gp",
)  # fmt: skip
"""Names of files that are videos where nobody says what they are."""


@dataclass(frozen=True, slots=True)
class VideoFrames:
    """Which frames of a video a sample has."""

    seed: int | None
    """Draws them; None = those in the middle of the segments."""
    clip: tuple[float, float] | None
    """Start and end in seconds from the first frame; None = the whole video."""
    files: tuple[str, ...] = ()
    """Names of the chosen frames where the video is a folder of images; empty if it is a file."""


def choose_frames(total: int, count: int, seed: int | None) -> list[int]:
    """`count` of `total` frames, rising: a random one of each of `count` equal segments, the last repeated if there are fewer.

    Without a seed they are those that InternVL's evaluations see (`get_index`): the middle one of each segment, the last frame left
    out.

    Upstream never takes the last frame of a segment, and leaves frames out of order of segments when one has a single
    frame: accidents of its code.
    """
    if seed is None and total > count:
        part = (total - 1) / count
        return [math.floor(part / 2 + round(part * place)) for place in range(count)]
    rng = np.random.default_rng(seed)
    bounds = np.linspace(0, total, min(count, total) + 1).astype(np.int64)
    chosen = rng.integers(bounds[:-1], bounds[1:]).tolist()
    return chosen + [chosen[-1]] * (count - len(chosen))


def check_video(path: str, clip: tuple[float, float] | None, max_pixels: int, span: Span | None = None) -> None:
    """Look at a video's header: it has frames of a size that may be decoded, and some in the clip, as far as it tells.

    Args:
        path: path or URL.
        clip: start and end in seconds, None = all of it.
        max_pixels: of a frame.
        span: the part of the file that is the video, None = all of it.

    Raises:
        FileError: the file is missing, cannot be read or is no such video.
        ConfigError: PyAV is not installed.
    """
    name = file_name(path, span)
    with open_file(path, span) as file, _open_stream(file, name) as (container, stream):
        context = stream.codec_context
        _check_size(name, context.width, context.height, max_pixels)
        seconds = _duration(container, stream)
        if clip is not None and seconds is not None and clip[0] >= seconds:
            raise _no_frames_in(name, clip, seconds)


def decode_frames(
    path: str, frames: VideoFrames, count: int, max_pixels: int, span: Span | None = None
) -> Iterator[Image.Image]:
    """The `count` frames of a video that `choose_frames` chooses, RGB; a frame that is repeated is the same object.

    `span` is the part of the file that is the video, None = all of it.

    Raises:
        FileError: the video cannot be read to the last of them, has none in the clip, or one is too large.
    """
    name = file_name(path, span)
    with open_file(path, span) as file, _open_stream(file, name) as (container, stream):
        stream.codec_context.thread_count = 1
        times, keys = _index(container, stream, name)
        start, end = _clip_bounds(times, frames.clip, stream, name)
        wanted = [times[start + number] for number in choose_frames(end - start, count, frames.seed)]
        yield from _images(_frames_at(container, stream, wanted, keys, name), name, max_pixels)


def _duration(container: "InputContainer", stream: "VideoStream") -> float | None:
    """Length in seconds by the header; None if it does not say."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / 1e6 if container.duration else None


def _images(frames: Iterable["VideoFrame"], path: str, max_pixels: int) -> Iterator[Image.Image]:
    """Decoded frames as images."""
    made: tuple[VideoFrame, Image.Image] | None = None
    for frame in frames:
        if made is None or made[0] is not frame:
            _check_size(path, frame.width, frame.height, max_pixels)
            made = frame, frame.to_image()
        yield made[1]


def _check_size(path: str, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise FileError(
            "pixels", f"video {path}: frames of {width}x{height} are over {max_pixels} pixels; scale it down"
        )


@contextmanager
def _open_stream(file: BinaryIO, path: str) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """A container and its video stream; what is wrong with the file, also later, becomes a `FileError`."""
    try:
        import av
        from av.error import FFmpegError
        from av.stream import Disposition
    except ImportError as error:
        raise ConfigError(
            f"video {path}: needs PyAV; `pip install 'internvl_megatron[video]'`, or leave video records out"
        ) from error
    try:
        # No play lists, and no way to other files or the network from inside a file.
        options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": ""}
        with av.open(file, "r", options=options) as container:
            streams = [s for s in container.streams.video if not Disposition.attached_pic & s.disposition]
            if not streams:
                raise FileError("video", f"video {path}: has no pictures, only sound or text; drop the record")
            yield container, streams[0]
    except (FFmpegError, OSError, ValueError, ArithmeticError, MemoryError, RuntimeError) as error:
        if isinstance(error, FileError | ConfigError):
            raise
        raise FileError(
            "video", f"video {path}: cannot be read ({error}); replace the file or drop the record"
        ) from error


def _index(container: "InputContainer", stream: "VideoStream", path: str) -> tuple[list[int], list[int]]:
    """Times of all frames and of the frames that decoding can begin with, rising, in units of the stream."""
    times: list[int] = []
    keys: list[int] = []
    num_packets = 0
    for packet in container.demux(stream):
        time = packet.dts if packet.pts is None else packet.pts
        if not packet.size:  # the end
            continue
        num_packets += 1
        if time is None:
            raise FileError("video", f"video {path}: its frames have no times; put it into another container")
        if not packet.is_discard:
            times.append(time)
        if packet.is_keyframe:
            keys.append(time)
    # Other headers than these count moments that may have no frame.
    if "mp4" in container.format.name and num_packets < stream.frames:
        raise FileError(
            "video",
            f"video {path}: is cut off: {num_packets} of {stream.frames} frames are there; replace the file or drop "
            "the record",
        )
    if not times:
        raise FileError("video", f"video {path}: has no frames; replace the file or drop the record")
    return sorted(set(times)), sorted(keys)


def _clip_bounds(
    times: Sequence[int], clip: tuple[float, float] | None, stream: "VideoStream", path: str
) -> tuple[int, int]:
    """First frame of a clip, which is the one on the screen when it starts, and the first after it."""
    if clip is None:
        return 0, len(times)
    unit = float(stream.time_base or 1)
    seconds = [(time - times[0]) * unit for time in times]
    tolerance = unit / 2  # times are rounded to units
    start, end = bisect_right(seconds, clip[0] + tolerance) - 1, bisect_left(seconds, clip[1] - tolerance)
    typical = seconds[-1] / max(1, len(seconds) - 1)
    if clip[0] >= seconds[-1] + typical - tolerance:
        raise _no_frames_in(path, clip, seconds[-1] + typical)
    return start, max(end, start + 1)


def _no_frames_in(path: str, clip: tuple[float, float], seconds: float) -> FileError:
    return FileError(
        "video",
        f"video {path}: field 'clip': starts at {clip[0]:g} seconds, but the video has {seconds:g}; correct it",
    )


def _frames_at(
    container: "InputContainer", stream: "VideoStream", wanted: Sequence[int], keys: Sequence[int], path: str
) -> Iterator["VideoFrame"]:
    """Frames at rising times; what lies between is skipped where decoding can begin again behind it."""
    decoded: Iterator[VideoFrame] = iter(())
    frame: VideoFrame | None = None
    for time in wanted:
        if frame is None or _time(frame) < time:
            key = bisect_right(keys, time) - 1
            if frame is None or (key >= 0 and keys[key] > _time(frame)):
                container.seek(keys[max(key, 0)] if keys else time, stream=stream)
                decoded = container.decode(stream)
                frame = next(decoded, None)
                if frame is None or _time(frame) > time:  # the container cannot seek so finely: from the beginning
                    container.seek(0, stream=stream, backward=True)
                    decoded = container.decode(stream)
                    frame = next(decoded, None)
            while frame is not None and _time(frame) < time:
                frame = next(decoded, None)
        if frame is None or frame.is_corrupt:
            raise FileError("video", f"video {path}: a frame of it is damaged; replace the file or drop the record")
        yield frame


def _time(frame: "VideoFrame") -> int:
    """When a frame is shown, in units of the stream."""
    time = frame.dts if frame.pts is None else frame.pts
    return -1 if time is None else time
