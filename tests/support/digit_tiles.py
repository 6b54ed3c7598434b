"""The digits on pictures of the demo, as bytes that can be compared."""

from pathlib import Path

import numpy as np
from PIL import Image

from tools.prepare_demo import DIGIT_PIXELS


def tiles(path: Path) -> list[bytes]:
    """The digits on a picture, from left to right."""
    pixels = np.asarray(Image.open(path))
    lefts = range(0, pixels.shape[1], DIGIT_PIXELS)
    return [np.ascontiguousarray(pixels[:, left : left + DIGIT_PIXELS]).tobytes() for left in lefts]
