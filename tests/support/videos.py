"""Small videos for the tests: frame k of one is of grey 3 * k, so that a decoded frame says which it is."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

GREY_STEP = 3


def write_video(
    path: Path,
    times: Sequence[float],
    size: tuple[int, int] = (64, 48),
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    unit: Fraction = Fraction(1, 1000),
) -> str:
    """Write a video whose frames are shown at these seconds, and return its name."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = unit
        for number, seconds in enumerate(times):
            grey = np.full((size[1], size[0], 3), GREY_STEP * number, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts, frame.time_base = round(seconds / unit), unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path.name


def write_sound(path: Path) -> str:
    """Write a second of silence in a container for videos, and return its name."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        assert isinstance(stream, av.AudioStream)
        for start in range(0, 16000, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path.name


def frame_number(grey: float) -> int:
    """Which frame of such a video has this mean grey."""
    return round(grey / GREY_STEP)
