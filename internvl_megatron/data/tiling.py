"""Dynamic resolution: which grid of square tiles an image is cut into, and the cutting itself.

Follows InternVL's `dynamic_preprocess`, `find_closest_aspect_ratio` and `simulate_jpeg_degradation`.
"""

import io
from collections.abc import Iterator
from functools import cache

import numpy as np
from PIL import Image

Grid = tuple[int, int]
"""(columns, rows) of tiles."""

JPEG_QUALITY_RANGE = (75, 100)
"""Lowest and highest quality of the JPEG augmentation, both included (InternVL2.5 paper, data section)."""


@cache
def _candidate_grids(min_tiles: int, max_tiles: int) -> tuple[Grid, ...]:
    """All grids of `min_tiles` to `max_tiles` tiles, smallest first."""
    grids = [
        (cols, rows)
        for cols in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // cols + 1)
        if cols * rows >= min_tiles
    ]
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)))


def choose_grid(width: int, height: int, min_tiles: int, max_tiles: int, tile_pixels: int) -> Grid:
    """Return the (columns, rows) whose shape is closest to the image's, exactly as InternVL does.

    Closest is the smallest |width/height - columns/rows|. On an exact tie a larger grid wins only if the image has
    more than half the pixels of that grid. (1, 1) when no grid has `min_tiles` to `max_tiles` tiles.
    """
    aspect_ratio = width / height
    best_grid, best_difference = (1, 1), float("inf")
    for cols, rows in _candidate_grids(min_tiles, max_tiles):
        difference = abs(aspect_ratio - cols / rows)
        tie_won = difference == best_difference and width * height > 0.5 * tile_pixels * tile_pixels * cols * rows
        if difference < best_difference or tie_won:
            best_grid, best_difference = (cols, rows), difference
    return best_grid


def num_tiles(grid: Grid, use_thumbnail: bool) -> int:
    """Tiles an image cut into `grid` gives; the thumbnail is added only when there are several."""
    tiles = grid[0] * grid[1]
    return tiles + 1 if use_thumbnail and tiles > 1 else tiles


def _recompress(tile: Image.Image, quality: int) -> Image.Image:
    """The tile after a round trip through JPEG."""
    buffer = io.BytesIO()
    tile.save(buffer, format="JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def cut_tiles(
    image: Image.Image,
    grid: Grid,
    tile_pixels: int,
    use_thumbnail: bool,
    jpeg_seed: int | None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Cut an image into the tiles of `grid`, row by row, the thumbnail (if any) last.

    The whole image is resized to the grid (bicubic, aspect ratio not kept). With a `jpeg_seed` every tile, the
    thumbnail too, goes through JPEG at a quality of its own.

    Returns:
        uint8 [tiles, 3, tile_pixels, tile_pixels], not normalised; `out` if given.
    """
    cols, rows = grid
    count = num_tiles(grid, use_thumbnail)
    out = np.empty((count, 3, tile_pixels, tile_pixels), dtype=np.uint8) if out is None else out
    image = image if image.mode == "RGB" else image.convert("RGB")
    resized = image.resize((cols * tile_pixels, rows * tile_pixels), Image.Resampling.BICUBIC)
    thumbnail = image.resize((tile_pixels, tile_pixels), Image.Resampling.BICUBIC) if count > cols * rows else None
    if jpeg_seed is None:
        _put(resized, grid, out[: cols * rows])
        if thumbnail is not None:
            _put(thumbnail, (1, 1), out[-1:])
        return out
    low, high = JPEG_QUALITY_RANGE
    qualities = np.random.default_rng(jpeg_seed).integers(low, high, size=count, endpoint=True)
    tiles = [*_cut(resized, grid, tile_pixels), *([] if thumbnail is None else [thumbnail])]
    for number, (tile, quality) in enumerate(zip(tiles, qualities, strict=True)):
        _put(_recompress(tile, int(quality)), (1, 1), out[number : number + 1])
    return out


def cut_frame(frame: Image.Image, jpeg_seed: int | None, out: np.ndarray) -> None:
    """Put the one tile of a video's frame into `out`, uint8 [3, tile_pixels, tile_pixels].

    With a `jpeg_seed` the frame goes through JPEG before it is resized, as InternVL's transform of an image that was not
    cut into tiles has it.
    """
    frame = frame.convert("RGB")
    if jpeg_seed is not None:
        low, high = JPEG_QUALITY_RANGE
        frame = _recompress(frame, int(np.random.default_rng(jpeg_seed).integers(low, high, endpoint=True)))
    _put(frame.resize((out.shape[2], out.shape[1]), Image.Resampling.BICUBIC), (1, 1), out[None])


def _put(image: Image.Image, grid: Grid, out: np.ndarray) -> None:
    """Put the tiles of an RGB image into uint8 [tiles, 3, height, width].

    Channel by channel, which Pillow does twice as fast as NumPy puts [rows, columns, 3] into order, and uncut, which saves
    a copy of each tile.
    """
    (cols, rows), (_, _, height, width) = grid, out.shape
    for channel, planes in zip("RGB", out.reshape(rows, cols, 3, height, width).transpose(2, 0, 3, 1, 4), strict=True):
        planes[:] = np.frombuffer(image.tobytes("raw", channel), dtype=np.uint8).reshape(rows, height, cols, width)


def _cut(image: Image.Image, grid: Grid, tile_pixels: int) -> Iterator[Image.Image]:
    """The tiles of an image that has the size of the grid."""
    cols, rows = grid
    for row in range(rows):
        for col in range(cols):
            left, top = col * tile_pixels, row * tile_pixels
            yield image.crop((left, top, left + tile_pixels, top + tile_pixels))
