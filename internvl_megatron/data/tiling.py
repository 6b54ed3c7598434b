"""Dynamic resolution: which grid of square tiles an image is cut into, and the cutting itself.

Follows InternVL's `dynamic_preprocess`, `find_closest_aspect_ratio` and `simulate_jpeg_degradation`.
"""

import io
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
    image: Image.Image, grid: Grid, tile_pixels: int, use_thumbnail: bool, jpeg_seed: int | None
) -> np.ndarray:
    """Cut an image into the tiles of `grid`, row by row, the thumbnail (if any) last.

    The whole image is resized to the grid (bicubic, aspect ratio not kept). With a `jpeg_seed` every tile, the
    thumbnail too, goes through JPEG at a quality of its own.

    Returns:
        uint8 [tiles, 3, tile_pixels, tile_pixels], not normalised.
    """
    cols, rows = grid
    image = image.convert("RGB")
    resized = image.resize((cols * tile_pixels, rows * tile_pixels), Image.Resampling.BICUBIC)
    tiles = [
        resized.crop((col * tile_pixels, row * tile_pixels, (col + 1) * tile_pixels, (row + 1) * tile_pixels))
        for row in range(rows)
        for col in range(cols)
    ]
    if use_thumbnail and len(tiles) > 1:
        tiles.append(image.resize((tile_pixels, tile_pixels), Image.Resampling.BICUBIC))
    if jpeg_seed is not None:
        low, high = JPEG_QUALITY_RANGE
        qualities = np.random.default_rng(jpeg_seed).integers(low, high, size=len(tiles), endpoint=True)
        tiles = [_recompress(tile, int(quality)) for tile, quality in zip(tiles, qualities, strict=True)]
    return np.ascontiguousarray(np.stack([np.asarray(tile) for tile in tiles]).transpose(0, 3, 1, 2))


def cut_frame(frame: Image.Image, tile_pixels: int, jpeg_seed: int | None) -> np.ndarray:
    """The one tile of a video's frame: uint8 [3, tile_pixels, tile_pixels].

    With a `jpeg_seed` the frame goes through JPEG before it is resized, as InternVL's transform of an image that was not
    cut into tiles has it.
    """
    frame = frame.convert("RGB")
    if jpeg_seed is not None:
        low, high = JPEG_QUALITY_RANGE
        frame = _recompress(frame, int(np.random.default_rng(jpeg_seed).integers(low, high, endpoint=True)))
    resized = frame.resize((tile_pixels, tile_pixels), Image.Resampling.BICUBIC)
    return np.asarray(resized).transpose(2, 0, 1)
