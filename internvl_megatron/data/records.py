"""One jsonl record to one sample: checked, tiled, tokenized, with positions; and what to do when it does not fit."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from internvl_megatron.config.schema import DataConfig, LossConfig
from internvl_megatron.data.conversation import (
    IGNORED_LABEL,
    Role,
    TokenizedConversation,
    Turn,
    tokenize_conversation,
)
from internvl_megatron.data.images import ImageRef, image_size
from internvl_megatron.data.meta import DatasetEntry
from internvl_megatron.data.positions import draw_stride, v2pe_numerators
from internvl_megatron.data.tiling import choose_grid, num_tiles
from internvl_megatron.data.tokenizer import Tokenizer
from internvl_megatron.errors import DataError

_ROLES: dict[str, Role] = {"system": "system", "human": "human", "gpt": "gpt"}

ErrorKind = Literal["record", "video", "image", "tiles", "truncated image", "long"]


ImageRng = Callable[[int], np.random.Generator]
"""Gives the random numbers of a sample's i-th image."""


class SampleError(DataError):
    """A record that cannot become a sample. `kind` says what is wrong; the message names file, line and field."""

    def __init__(self, kind: ErrorKind, message: str) -> None:
        """`kind` selects the policy ('long' has its own) and the counter."""
        super().__init__(message)
        self.kind: ErrorKind = kind


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSettings:
    """What the data pipeline must know of the run."""

    data: DataConfig
    tile_pixels: int
    tokens_per_tile: int
    weighting: Literal["token", "square", "sample"] = LossConfig.weighting


@dataclass(frozen=True, slots=True)
class Record:
    """A jsonl record, checked."""

    where: str
    """`file:line`, for messages."""
    turns: tuple[Turn, ...]
    images: tuple[str, ...]
    """Paths."""
    max_tiles: int
    """Tiles its images may have together, thumbnails not counted."""
    augment: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """A tokenized conversation of n tokens with i images."""

    token_ids: np.ndarray
    """int32 [n]."""
    labels: np.ndarray
    """int32 [n], not shifted, -100 where not trained on."""
    positions: np.ndarray
    """int32 [n], in units of 1/256."""
    images: tuple[ImageRef, ...]
    image_starts: np.ndarray
    """int32 [i], index of each image's first context token."""

    @property
    def num_tiles(self) -> int:
        """Tiles of all images."""
        return sum(image.num_tiles for image in self.images)


def parse_record(raw: dict[str, Any], where: str, entry: DatasetEntry, max_tiles: int) -> Record:
    """Check a record: text only, one image (`image` a string) or several (`image` a list).

    Args:
        raw: the JSON object.
        where: `file:line` of it.
        entry: the data set it belongs to.
        max_tiles: tiles per sample unless the data set has its own number.

    Raises:
        SampleError: a field is missing or wrong, or the record is a video.
    """
    images = raw.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise SampleError("record", f"{where}: field 'image' must be a path or a list of paths")
    if not images and raw.get("video"):
        raise SampleError("video", f"{where}: field 'video': video records are not supported yet; drop the record")
    return Record(
        where=where,
        turns=_parse_turns(raw, where, bool(images)),
        images=tuple(str(entry.root / image) for image in images),
        max_tiles=entry.max_tiles or max_tiles,
        augment=entry.data_augment,
    )


def _parse_turns(raw: dict[str, Any], where: str, has_images: bool) -> tuple[Turn, ...]:
    """The turns of field 'conversations'."""
    conversations = raw.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise SampleError("record", f"{where}: field 'conversations' must be a list of turns with 'from' and 'value'")
    turns = []
    for index, turn in enumerate(conversations):
        field = f"{where}: field 'conversations[{index}]"
        if not isinstance(turn, dict):
            raise SampleError("record", f"{field}' must be an object with 'from' and 'value'")
        sender, text = turn.get("from"), turn.get("value")
        if not isinstance(sender, str) or sender not in _ROLES:
            raise SampleError("record", f"{field}.from' must be one of {', '.join(_ROLES)}, not {sender!r}")
        if not isinstance(text, str):
            raise SampleError("record", f"{field}.value' must be a string, not {type(text).__name__}")
        if not _is_unicode(text):
            raise SampleError(
                "record", f"{field}.value' has half a surrogate pair, which is not text; mend the escape"
            )
        turns.append(Turn(_ROLES[sender], text))
    roles = {turn.role for turn in turns}
    for role in ("gpt", "human") if has_images else ("gpt",):
        if role not in roles:
            raise SampleError("record", f"{where}: field 'conversations' has no {role!r} turn")
    return tuple(turns)


def _is_unicode(text: str) -> bool:
    """Whether a string is text: JSON escapes can spell half a surrogate pair, which has no encoding."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def render_sample(record: Record, settings: SampleSettings, tokenizer: Tokenizer, image_rng: ImageRng) -> Sample:
    """Turn a record into a sample. Of an image only the header is read.

    Args:
        record: checked record.
        settings: budgets and policies.
        tokenizer: with InternVL's tokens.
        image_rng: generator of the i-th image, for its position step and its augmentation.

    Raises:
        SampleError: an image cannot be read, images and `<image>` differ in number, or the sample is over a budget.
    """
    images, strides = _plan_images(record, settings, image_rng)
    tiles = sum(image.num_tiles for image in images)
    if tiles > settings.data.tiles_per_row:
        raise SampleError(
            "tiles",
            f"{record.where}: {tiles} tiles are over tiles_per_row {settings.data.tiles_per_row}; raise it, or lower "
            "max_tiles (or the data set's max_dynamic_patch)",
        )
    context_tokens = [image.num_tiles * settings.tokens_per_tile for image in images]
    try:
        tokens = tokenize_conversation(record.turns, context_tokens, tokenizer, settings.data.system_prompt)
    except DataError as error:
        raise SampleError("record", f"{record.where}: field 'conversations': {error}") from error
    tokens = _fit(tokens, context_tokens, record.where, settings.data)
    _check_image_tokens(tokens, context_tokens, tokenizer, record.where)
    length = len(tokens.token_ids)
    positions = v2pe_numerators(length, tokens.image_starts.tolist(), context_tokens, strides)
    return Sample(tokens.token_ids, tokens.labels, positions, images, tokens.image_starts)


def _plan_images(
    record: Record, settings: SampleSettings, image_rng: ImageRng
) -> tuple[tuple[ImageRef, ...], list[int]]:
    """How each image is cut, and the position step of its tokens (in units of 1/256)."""
    data = settings.data
    max_tiles = max(1, record.max_tiles // max(1, len(record.images)))
    images, strides = [], []
    for index, path in enumerate(record.images):
        try:
            width, height = image_size(path)
        except DataError as error:
            raise SampleError("image", f"{record.where}: field 'image': {error}") from error
        grid = choose_grid(width, height, data.min_tiles, max_tiles, settings.tile_pixels)
        rng = image_rng(index)
        strides.append(draw_stride(rng) if data.v2pe == "random" else data.v2pe_numerator)
        jpeg_seed = int(rng.integers(2**63)) if record.augment else None
        images.append(ImageRef(path, grid, num_tiles(grid, data.use_thumbnail), jpeg_seed, record.where))
    return tuple(images), strides


def _check_image_tokens(
    tokens: TokenizedConversation, context_tokens: list[int], tokenizer: Tokenizer, where: str
) -> None:
    """The places where embeddings will be put are exactly the places of image tokens in the text."""
    places = np.flatnonzero(tokens.token_ids == tokenizer.image_context_id)
    starts = zip(tokens.image_starts.tolist(), context_tokens, strict=True)
    planned = np.concatenate([np.empty(0, np.int64), *(np.arange(start, start + count) for start, count in starts)])
    assert np.array_equal(places, planned), f"{where}: {len(planned)} image tokens planned, {len(places)} in the text"


def _fit(
    tokens: TokenizedConversation, context_tokens: list[int], where: str, data: DataConfig
) -> TokenizedConversation:
    """The conversation within `tokens_per_row`: as it is, or cut on the right if the policy says so and images allow."""
    length, limit = len(tokens.token_ids), data.tokens_per_row
    if length <= limit:
        return tokens
    if data.on_long_sample != "truncate":
        raise SampleError(
            "long",
            f"{where}: {length} tokens are over tokens_per_row {limit}; raise it, or set on_long_sample to 'truncate'",
        )
    last_image_end = int(tokens.image_starts[-1]) + context_tokens[-1] if context_tokens else -1
    if last_image_end >= limit:
        raise SampleError(
            "truncated image",
            f"{where}: cut to tokens_per_row {limit} of {length} tokens, its images would not be whole; "
            "raise tokens_per_row or lower max_tiles",
        )
    return TokenizedConversation(tokens.token_ids[:limit], tokens.labels[:limit], tokens.image_starts)


def num_supervised(labels: np.ndarray) -> int:
    """Tokens that are trained on, among unshifted labels."""
    return int(np.count_nonzero(labels != IGNORED_LABEL))
