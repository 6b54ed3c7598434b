"""Pictures of some handwritten digits side by side, and questions files about them, for studies on the demo's model."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tools.prepare_demo import Digit, Record

Picture = tuple[str, str]
"""Its path, relative to the data's folder, and the digits on it."""


def draw_picture(out: Path, name: str, digits: Sequence[Digit], length: int, rng: random.Random) -> Picture:
    """Write `out/images/NAME.png`, `length` random digits side by side."""
    chosen = rng.choices(digits, k=length)
    path = f"images/{name}.png"
    Image.fromarray(np.hstack([tile for _, tile in chosen])).save(out / path)
    return path, "".join(label for label, _ in chosen)


def draw_pictures(
    out: Path, name: str, digits: Sequence[Digit], length: int, count: int, rng: random.Random
) -> list[Picture]:
    """`count` of them: `out/images/NAME-NUMBER.png`."""
    return [draw_picture(out, f"{name}-{index:05d}", digits, length, rng) for index in range(count)]


def questions_about(
    name: str, pictures: Sequence[Picture], question: str, answer: Callable[[str], str]
) -> list[Record]:
    """Lines of a questions file that asks the same of every picture."""
    return [
        {"id": f"{name}-{index:05d}", "image": path, "question": f"<image>\n{question}", "answer": answer(digits)}
        for index, (path, digits) in enumerate(pictures)
    ]
