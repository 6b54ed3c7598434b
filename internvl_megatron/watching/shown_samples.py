"""Samples of a step as people can read them: text with what is trained on marked, and pictures as the model gets them.

Made on one rank from what every rank of a replica has, the row. Only the pictures are decoded once more, since other ranks may have
decoded them.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from internvl_megatron.data.files import FileError, read_within
from internvl_megatron.data.images import ImageRef, decode_tiles
from internvl_megatron.data.records import SampleSettings
from internvl_megatron.data.rows import Row
from internvl_megatron.data.token_texts import token_texts
from internvl_megatron.data.tokenizer import Tokenizer
from internvl_megatron.watching.boards import ShownSample

MOST_SAMPLES, MOST_TOKENS, MOST_PICTURES = 4, 2048, 4
"""Samples of a row, and tokens and pictures of a sample, that are shown."""
SHOWN_PIXELS = 448
"""Longest side of a picture."""
GAP_PIXELS = 2
"""Between tiles."""
FRAMES_ABREAST = 8
MARKS = "⟦", "⟧"
"""Around what is trained on."""


def shown_samples(
    row: Row, dataset_names: Sequence[str], settings: SampleSettings, tokenizer: Tokenizer
) -> list[ShownSample]:
    """The first samples of a row.

    Args:
        row: of this rank's replica.
        dataset_names: by number.
        settings: of the run's data.
        tokenizer: the row was made with.
    """
    bounds = row.sample_bounds.tolist()
    return [
        _shown(row, sample, (bounds[sample], bounds[sample + 1]), dataset_names, settings, tokenizer)
        for sample in range(min(MOST_SAMPLES, row.num_samples))
    ]


def _shown(
    row: Row,
    sample: int,
    bounds: tuple[int, int],
    dataset_names: Sequence[str],
    settings: SampleSettings,
    tokenizer: Tokenizer,
) -> ShownSample:
    first, end = bounds
    source = row.sources[sample]
    is_trained = _is_trained(row, first, end)
    images = [image for image, at in zip(row.images, row.image_starts.tolist(), strict=True) if first <= at < end]
    facts = [
        f"{dataset_names[source.dataset]}, record {source.record}, pass {source.pass_number}",
        f"{end - first} tokens, {int(is_trained.sum())} trained on, weight {row.sample_weights[sample]:.4g}",
    ]
    if row.has_pairs:
        facts.append("rejected answer" if sample % 2 else "chosen answer")
    pictures, faults = [], []
    for image in images[:MOST_PICTURES]:
        try:
            pictures.append(_picture(image, settings))
        except FileError as error:
            faults.append(str(error))
    if len(images) > MOST_PICTURES:
        faults.append(f"{len(images) - MOST_PICTURES} more pictures")
    text = marked_text(row.token_ids[first:end], is_trained, tokenizer)
    return ShownSample("\n".join(["; ".join(facts), *faults, "", text]), pictures)


def _is_trained(row: Row, first: int, end: int) -> np.ndarray:
    """bool [tokens of a sample], whether each is predicted with loss: from the token before it."""
    return np.concatenate([[False], row.weights[first : end - 1] > 0])


def marked_text(token_ids: np.ndarray, is_trained: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of a sample's tokens; what is trained on stands in `MARKS`, and image tokens are counted."""
    ids = token_ids[:MOST_TOKENS].tolist()
    parts, texts, at, inside = list[str](), token_texts(ids, tokenizer), 0, False
    while at < len(ids):
        if bool(is_trained[at]) != inside:
            parts.append(MARKS[inside])
            inside = not inside
        end = at + 1
        if ids[at] == tokenizer.image_context_id:
            while end < len(ids) and ids[end] == ids[at]:
                end += 1
            parts.append(f"[{end - at} image tokens]")
        else:
            parts.append(texts[at])
        at = end
    parts.append(MARKS[1] if inside else "")
    if len(token_ids) > len(ids):
        parts.append(f" [{len(token_ids) - len(ids)} more tokens]")
    return "".join(parts)


def _picture(image: ImageRef, settings: SampleSettings) -> np.ndarray:
    """Tiles in their grid, or frames in lines, uint8 [height, width, 3]; thumbnails are left out.

    Raises:
        FileError: the file is broken.
    """
    pixels, data = settings.tile_pixels, settings.data
    tiles = read_within(data.read_timeout_seconds, image.name, lambda: decode_tiles(image, pixels, data.use_thumbnail))
    columns, rows = image.grid
    if image.kind == "video":
        columns = min(FRAMES_ABREAST, len(tiles))
        rows = -(-len(tiles) // columns)
    step = pixels + GAP_PIXELS
    sheet = np.full((rows * step - GAP_PIXELS, columns * step - GAP_PIXELS, 3), 255, dtype=np.uint8)
    for number, tile in enumerate(tiles[: rows * columns]):
        top, left = number // columns * step, number % columns * step
        sheet[top : top + pixels, left : left + pixels] = tile.transpose(1, 2, 0)
    small = Image.fromarray(sheet)
    small.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
    return np.asarray(small)
