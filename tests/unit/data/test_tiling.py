"""Grid choice against the published algorithm's results, and the cutting of tiles."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from internvl_megatron.data.tiling import choose_grid, cut_tiles, num_tiles

VECTORS = [
    (448, 448, 12, (1, 1), 1),
    (634, 634, 12, (2, 2), 5),
    (633, 633, 12, (1, 1), 1),
    (1000, 1000, 12, (3, 3), 10),
    (640, 480, 12, (4, 3), 13),
    (640, 480, 6, (3, 2), 7),
    (1920, 1080, 12, (4, 2), 9),
    (1920, 1080, 6, (2, 1), 3),
    (1080, 1920, 12, (2, 4), 9),
    (400, 200, 12, (2, 1), 3),
    (1600, 800, 12, (4, 2), 9),
    (300, 900, 12, (1, 3), 4),
    (5000, 400, 12, (12, 1), 13),
    (2480, 3508, 24, (4, 6), 25),
    (2480, 3508, 18, (2, 3), 7),
    (2480, 3508, 12, (2, 3), 7),
]


@pytest.mark.parametrize(("width", "height", "max_tiles", "grid", "tiles"), VECTORS)
def test_published_grids(width, height, max_tiles, grid, tiles):
    assert choose_grid(width, height, 1, max_tiles, 448) == grid
    assert num_tiles(grid, use_thumbnail=True) == tiles


def published_grid(width, height, min_tiles, max_tiles, tile_pixels):
    """InternVL's own two functions, as they are written."""
    ratios = {
        (i, j)
        for n in range(min_tiles, max_tiles + 1)
        for i in range(1, n + 1)
        for j in range(1, n + 1)
        if min_tiles <= i * j <= max_tiles
    }
    best_difference, best = float("inf"), (1, 1)
    for ratio in sorted(ratios, key=lambda x: x[0] * x[1]):
        difference = abs(width / height - ratio[0] / ratio[1])
        if difference < best_difference:
            best_difference, best = difference, ratio
        elif difference == best_difference and width * height > 0.5 * tile_pixels * tile_pixels * ratio[0] * ratio[1]:
            best = ratio
    return best


@pytest.mark.parametrize(("min_tiles", "max_tiles"), [(1, 1), (1, 6), (1, 12), (3, 12), (5, 4)])
def test_same_as_the_published_code(min_tiles, max_tiles):
    rng = np.random.default_rng(0)
    sizes = [*rng.integers(1, 3000, size=(150, 2)).tolist(), (600, 600), (1200, 600), (900, 600), (896, 448)]
    for width, height in sizes:
        expected = published_grid(width, height, min_tiles, max_tiles, 448)
        assert choose_grid(width, height, min_tiles, max_tiles, 448) == expected, (width, height)


def test_thumbnail_counts_only_with_several_tiles():
    assert [num_tiles((1, 1), True), num_tiles((2, 1), True), num_tiles((2, 1), False)] == [1, 3, 2]


def test_tiles_are_row_by_row_and_the_thumbnail_is_last():
    pixels = np.zeros((16, 24, 3), dtype=np.uint8)
    for row in range(2):
        for col in range(3):
            pixels[row * 8 : row * 8 + 8, col * 8 : col * 8 + 8] = (10 * row, 10 * col, 200)
    image = Image.fromarray(pixels)
    tiles = cut_tiles(image, (3, 2), 8, True, None)
    assert tiles.shape == (7, 3, 8, 8) and tiles.dtype == np.uint8 and tiles.flags.c_contiguous
    for index in range(6):
        assert (tiles[index] == np.array([10 * (index // 3), 10 * (index % 3), 200])[:, None, None]).all()
    thumbnail = np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC))
    assert (tiles[6] == thumbnail.transpose(2, 0, 1)).all()


def test_one_tile_has_no_thumbnail_and_any_mode_becomes_rgb():
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        assert cut_tiles(Image.new(mode, (5, 9)), (1, 1), 8, True, None).shape == (1, 3, 8, 8)


def test_jpeg_draws_one_quality_per_tile():
    noise = np.random.default_rng(1).integers(0, 256, size=(16, 16, 3), dtype=np.uint8)
    image = Image.fromarray(np.tile(noise, (1, 4, 1)))
    plain = cut_tiles(image, (4, 1), 16, False, None)
    assert (plain == plain[0]).all()
    augmented = cut_tiles(image, (4, 1), 16, False, 7)
    assert (augmented == cut_tiles(image, (4, 1), 16, False, 7)).all()
    assert not (augmented == cut_tiles(image, (4, 1), 16, False, 8)).all()

    def recompressed(quality):
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, format="JPEG", quality=quality)
        return np.asarray(Image.open(buffer)).transpose(2, 0, 1)

    by_quality = {quality: recompressed(quality) for quality in range(75, 101)}
    found = [[quality for quality, tile in by_quality.items() if (tile == wanted).all()] for wanted in augmented]
    assert all(found), "every tile is the original at a quality of 75 to 100"
    assert len({tuple(qualities) for qualities in found}) > 1, "tiles draw their own"


@pytest.mark.parametrize(("grid", "use_thumbnail"), [((1, 1), True), ((2, 2), True), ((3, 1), False)])
def test_augmented_tiles_are_those_of_pillow_alone(grid, use_thumbnail):
    """Cut first, then each tile and the thumbnail recompressed at a quality of its own, and not resized again."""
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, size=(50, 70, 3), dtype=np.uint8))
    columns, rows = grid
    whole = image.resize((28 * columns, 28 * rows), Image.Resampling.BICUBIC)
    boxes = [(28 * (k % columns), 28 * (k // columns)) for k in range(columns * rows)]
    tiles = [whole.crop((left, top, left + 28, top + 28)) for left, top in boxes]
    if use_thumbnail and len(tiles) > 1:
        tiles.append(image.resize((28, 28), Image.Resampling.BICUBIC))
    drawn = []
    for seed in range(4):
        made = cut_tiles(image, grid, 28, use_thumbnail, seed)
        assert len(made) == len(tiles)
        for tile, result in zip(tiles, made, strict=True):
            found = []
            for quality in range(70, 101):
                buffer = io.BytesIO()
                tile.save(buffer, format="JPEG", quality=quality)
                if (np.asarray(Image.open(buffer)).transpose(2, 0, 1) == result).all():
                    found.append(quality)
            assert found and min(found) >= 75
            drawn.append(min(found))
    assert len(set(drawn)) > 2


def test_jpeg_qualities_are_even(monkeypatch):
    from internvl_megatron.data import tiling

    seen = Counter()
    monkeypatch.setattr(tiling, "_recompress", lambda tile, quality: seen.update([quality]) or tile)
    for seed in range(1000):
        cut_tiles(Image.new("RGB", (8, 8)), (3, 3), 8, True, seed)
    assert sorted(seen) == list(range(75, 101))
    assert all(300 < number < 470 for number in seen.values()), "10000 draws: 4 standard deviations around 385"


def test_jpeg_qualities_reach_both_ends(monkeypatch):
    from internvl_megatron.data import tiling

    seen = set()
    monkeypatch.setattr(tiling, "_recompress", lambda tile, quality: seen.add(quality) or tile)
    for seed in range(60):
        cut_tiles(Image.new("RGB", (8, 8)), (3, 2), 8, True, seed)
    assert seen == set(range(75, 101))
