"""Sizes of packed rows like those InternVL trains on, drawn from stated distributions, and what a step has of them on average.

What matters to a schedule is how many tiles and tokens each row has. Images get a size, the trainer's own tiling turns it
into tiles, and InternVL's packing algorithm makes rows of a stream in which samples with an image and samples of text alone
take turns at random.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from internvl_megatron.data.first_fit import FirstFitPacker
from internvl_megatron.data.tiling import choose_grid, num_tiles
from internvl_megatron.errors import ConfigError
from internvl_megatron.scaling.predicted_step import Workload

TILE_TOKENS = 256
"""Tokens of a tile of every released InternVL3."""
TILE_PIXELS = 448
MAX_TILES = 12

IMAGE_SIZES: tuple[tuple[float, tuple[int, int] | None], ...] = (
    (0.20, (640, 480)),
    (0.08, (480, 640)),
    (0.12, (640, 427)),
    (0.05, (427, 640)),
    (0.05, (500, 375)),
    (0.12, (1700, 2200)),
    (0.06, (800, 600)),
    (0.06, (1920, 1080)),
    (0.06, (1080, 1920)),
    (0.20, None),
)
"""Share of all images, width and height: photos as in COCO and Flickr, scanned pages, charts, screens of computers and
phones; None = any, see `ANY_SIDE_PIXELS`. Assumed, not counted."""
ANY_SIDE_PIXELS = (224, 2048)
"""Smallest and largest side of an image of any size; both sides are log-uniform."""
TEXT_BESIDE_IMAGE = (300.0, 1.1)
"""Median and spread (sigma) of the log-normal number of text tokens of a sample with an image; their mean is 549."""
TEXT_ALONE = (500.0, 1.2)
"""The same of samples of text alone; their mean is 1027."""
SUPERVISED_SHARE = (0.3, 0.9)
"""Of a sample's text, its answers: uniform between these."""
TOKENS_BEFORE_IMAGE = 40
"""System prompt and the begin of the question; less in samples with less text."""
BUFFER_ROWS = 20
"""Unfinished rows the packer holds (upstream: `max_buffer_size`)."""
FIRST_ROWS = 200
"""Rows left out at the start of a stream, while the packer's buffer fills."""
AVERAGED_ROWS, SEED = 200, 1
"""Of `drawn_workload`."""


@dataclass(frozen=True)
class Sample:
    """Sizes of one sample: some text, the tiles of one image if it has one, the rest of the text."""

    num_tiles: int
    num_text_tokens: int
    num_supervised_tokens: int
    """The last ones of its text; none of those before the image."""

    @property
    def num_tokens_before_image(self) -> int:
        """Text before the image; none of text alone."""
        return min(TOKENS_BEFORE_IMAGE, self.num_text_tokens // 2) if self.num_tiles else 0

    @property
    def num_tokens(self) -> int:
        """Text and image tokens."""
        return self.num_tiles * TILE_TOKENS + self.num_text_tokens


PackedRow = list[Sample]


def draw_rows(
    image_share: float, num_rows: int, tokens_per_row: int, tiles_per_row: int, seed: int
) -> list[PackedRow]:
    """Rows from a stream in which image tokens are the given share of all tokens on average.

    Args:
        image_share: wanted; 0 = text alone. Rows have it up to chance and to what the packer leaves over.
        num_rows: how many.
        tokens_per_row: token budget of a row.
        tiles_per_row: tile budget of a row.
        seed: of everything drawn.
    """
    rng = np.random.default_rng(seed)
    chance = chance_of_image(image_share, tokens_per_row)
    packer = FirstFitPacker[Sample](tokens_per_row, tiles_per_row, BUFFER_ROWS)
    rows: list[PackedRow] = []
    while len(rows) < FIRST_ROWS + num_rows:
        sample = _draw_sample(rng, rng.random() < chance, tokens_per_row)
        rows += [pack.items for pack in packer.add(sample, sample.num_tokens, sample.num_tiles)]
    return rows[FIRST_ROWS:]


def draw_samples(image_share: float, num_samples: int, tokens_per_row: int, seed: int) -> list[Sample]:
    """Samples as `draw_rows` packs them.

    Args:
        image_share: image tokens over all tokens, on average.
        num_samples: how many.
        tokens_per_row: most tokens of a sample.
        seed: of everything drawn.
    """
    rng = np.random.default_rng(seed)
    chance = chance_of_image(image_share, tokens_per_row)
    return [_draw_sample(rng, rng.random() < chance, tokens_per_row) for _ in range(num_samples)]


def _draw_sample(rng: np.random.Generator, has_image: bool, tokens_per_row: int) -> Sample:
    tiles = _draw_tiles(rng) if has_image else 0
    median, sigma = TEXT_BESIDE_IMAGE if has_image else TEXT_ALONE
    text = math.ceil(rng.lognormal(math.log(median), sigma))
    text = min(text, tokens_per_row - tiles * TILE_TOKENS)
    answer = round(text * rng.uniform(*SUPERVISED_SHARE))
    return Sample(tiles, text, min(answer, text - Sample(tiles, text, 0).num_tokens_before_image))


def _draw_tiles(rng: np.random.Generator) -> int:
    shares = [share for share, _ in IMAGE_SIZES]
    size = IMAGE_SIZES[rng.choice(len(shares), p=shares)][1]
    if size is None:
        smallest, largest = np.log(ANY_SIDE_PIXELS)
        width, height = np.exp(rng.uniform(smallest, largest, 2)).astype(int).tolist()
        size = width, height
    return num_tiles(choose_grid(*size, min_tiles=1, max_tiles=MAX_TILES, tile_pixels=TILE_PIXELS), use_thumbnail=True)


def chance_of_image(image_share: float, tokens_per_row: int, num_draws: int = 20000) -> float:
    """Share of samples that must have an image for this share of image tokens, by the mean sizes of both kinds.

    Raises:
        ConfigError: images alone have not so many.
    """
    if image_share == 0:
        return 0.0
    rng = np.random.default_rng(0)
    with_image, alone = (
        [_draw_sample(rng, has_image, tokens_per_row) for _ in range(num_draws)] for has_image in (True, False)
    )
    image_tokens = TILE_TOKENS * sum(sample.num_tiles for sample in with_image)
    surplus = image_tokens - image_share * sum(sample.num_tokens for sample in with_image)
    if surplus <= 0:
        most = image_tokens / sum(sample.num_tokens for sample in with_image)
        raise ConfigError(
            f"{image_share:.0%} image tokens cannot be drawn: samples with an image have {most:.0%} of them, the others none; ask for less"
        )
    missing = image_share * sum(sample.num_tokens for sample in alone)
    return missing / (missing + surplus)


@cache
def drawn_workload(tokens_per_row: int, tiles_per_row: int, image_share: float) -> Workload:
    """Averages over rows that are drawn."""
    rows = draw_rows(image_share, AVERAGED_ROWS, tokens_per_row, tiles_per_row, SEED)
    pairs = np.array([sum(sample.num_tokens**2 for sample in row) for row in rows], dtype=float)
    return Workload(
        tokens_per_row=float(np.mean([sum(sample.num_tokens for sample in row) for row in rows])),
        pairs_per_row=float(pairs.mean()),
        supervised_per_row=float(np.mean([sum(sample.num_supervised_tokens for sample in row) for row in rows])),
        tiles_per_row=float(np.mean([sum(sample.num_tiles for sample in row) for row in rows])),
        pairs_spread=float(pairs.std() / pairs.mean()),
    )
