"""The picture of a timeline has a line for each rank, and bars where work is."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.timeline_picture import Bar, Line, draw_timeline

COLOURS = {"work": "red", "rest": "blue"}


def coloured(path: Path, channel: int) -> np.ndarray:
    """Pixels that have one colour alone."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return (pixels[..., channel] > 200) & (np.delete(pixels, channel, axis=2).max(axis=2) < 60)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    ranks = [[Bar("work", 0, 1), Bar("rest", 1, 2)], [Bar("rest", 0, 1), Bar("work", 1, 2)]]
    draw_timeline(ranks, COLOURS, tmp_path / "timeline.png", "two ranks", "seconds", "rank")
    return tmp_path / "timeline.png"


def test_bars_are_where_the_work_is(picture: Path) -> None:
    red, blue = coloured(picture, 0), coloured(picture, 2)
    legend = int(0.9 * red.shape[1])
    rows = np.flatnonzero(red[:, :legend].any(axis=1))
    upper, lower = rows[rows < rows.mean()], rows[rows > rows.mean()]
    first, second = (np.flatnonzero(red[part][:, :legend].any(axis=0)) for part in (upper, lower))
    assert first.max() <= second.min() + 2, "rank 0 is above and works first"
    assert np.flatnonzero(blue[upper][:, :legend].any(axis=0)).min() >= first.max() - 2


def test_every_kind_is_in_the_legend(picture: Path) -> None:
    assert all(coloured(picture, channel)[:, int(0.9 * 1100) :].any() for channel in (0, 2))


def test_messages_are_lines_between_ranks(picture: Path, tmp_path: Path) -> None:
    ranks = [[Bar("work", 0, 1), Bar("rest", 1, 2)], [Bar("rest", 0, 1), Bar("work", 1, 2)]]
    file = tmp_path / "sent.png"
    draw_timeline(ranks, COLOURS, file, "two ranks", "seconds", "rank", [Line(0, 0.4, 1, 0.6), Line(1, 1.4, 0, 1.6)])
    pixels, before = (np.asarray(Image.open(path).convert("L")).astype(int) for path in (file, picture))
    assert pixels.shape == before.shape
    changed = np.abs(pixels - before) > 40
    columns = np.flatnonzero(changed.any(axis=0))
    assert columns.size > 0
    assert len(np.flatnonzero(np.diff(columns) > 20)) == 1, "two lines, apart"
