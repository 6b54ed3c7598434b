"""One record to one sample: checked, tiled, tokenized, with positions; and what to do when it does not fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from internvl_megatron.config.schema import DataConfig, LossConfig, RunConfig
from internvl_megatron.data.conversation import (
    IGNORED_LABEL,
    PlaceholderError,
    Role,
    TokenizedConversation,
    Turn,
    place_frames,
    tokenize_conversation,
)
from internvl_megatron.data.files import FileError, FileFault, Span, is_folder, locate, read_within
from internvl_megatron.data.images import MAX_IMAGE_PIXELS, ImageRef, choose_files, image_size
from internvl_megatron.data.members import Members, SampleRecord
from internvl_megatron.data.meta import DatasetEntry
from internvl_megatron.data.positions import draw_stride, v2pe_numerators
from internvl_megatron.data.tiling import choose_grid, num_tiles
from internvl_megatron.data.tokenizer import IMAGE_CONTEXT, Tokenizer
from internvl_megatron.data.video import VideoFrames, check_video
from internvl_megatron.errors import DataError

_LONGEST = 1e7
"""Seconds; no video is longer. Keeps infinity out, which JSON readers let through."""

_ROLES: dict[str, Role] = {"system": "system", "human": "human", "gpt": "gpt", "pretrain": "pretrain"}

ErrorKind = (
    Literal[
        "json",
        "row",
        "record",
        "conversation",
        "placeholders",
        "special tokens",
        "tiles",
        "truncated image",
        "truncated answer",
        "long",
    ]
    | FileFault
)
"""What is wrong with a record: its line is no JSON object; it is a packed row, and damaged; a field has a wrong type; its
turns make no conversation; images and their places in the text do not match; a text brings image tokens of its own; it has
too many tiles; cut to the row its images would not be whole, or nothing of an answer be left; it has too many tokens. And what is wrong with a file of it, see
`FileFault`."""

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
    pairs: bool = False
    """Records are pairs of answers (`preference.py`)."""

    @property
    def tokens_per_sample(self) -> int:
        """Most tokens of a sample: a row's, or half of them where a row must hold both samples of a pair."""
        return self.data.tokens_per_row // (2 if self.pairs else 1)

    @classmethod
    def of_run(cls, config: RunConfig) -> "SampleSettings":
        """Those of a run."""
        vision = config.model.vision
        return cls(
            data=config.data,
            tile_pixels=vision.tile_pixels,
            tokens_per_tile=vision.tokens_per_tile,
            weighting=config.loss.weighting,
            pairs=config.loss.kind == "mpo",
        )


@dataclass(frozen=True, slots=True)
class Record:
    """A record, checked, its files not yet looked at."""

    where: str
    """`file:line` or `shard:key`, for messages."""
    turns: tuple[Turn, ...]
    root: str | Path
    """Folder or URL that names of files are relative to."""
    images: tuple[str, ...]
    """Names."""
    video: str | None
    """Name of a video or of a folder of frames, if there are no images."""
    clip: tuple[float, float] | None
    """Part of the video, in seconds."""
    max_tiles: int
    """Tiles its images may have together, thumbnails not counted."""
    augment: bool
    members: Members | None = None
    """What the names stand for, if they name members of the record's own sample; None = files below the root."""
    text_field: str = "conversations"
    """Where its texts come from, for messages."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A tokenized conversation of n tokens with i images or one video, together t tiles."""

    token_ids: np.ndarray
    """int32 [n]."""
    labels: np.ndarray
    """int32 [n], not shifted, -100 where not trained on."""
    positions: np.ndarray
    """int32 [n], in units of 1/256."""
    images: tuple[ImageRef, ...]
    """A video is one of them."""
    image_starts: np.ndarray
    """int32 [i], index of each image's first context token."""
    tile_starts: np.ndarray
    """int32 [t], index of each tile's first context token: one behind the other, but for the frames of a video."""

    @property
    def num_tokens(self) -> int:
        """Tokens of text and images."""
        return len(self.token_ids)

    @property
    def num_tiles(self) -> int:
        """Tiles of all images."""
        return sum(image.num_tiles for image in self.images)


@dataclass(frozen=True, slots=True)
class _Pictures:
    """What a record has to see, and how. A block is an `<image>` of the text: an image, or a frame of a video."""

    images: tuple[ImageRef, ...]
    turns: Sequence[Turn]
    """With an `<image>` for each block, or for none if it is a single image."""
    block_tiles: list[int]
    """Tiles of each block."""
    strides: list[int]
    """Position step of each block, in units of 1/256."""


def parse_record(raw: dict[str, Any], where: str, entry: DatasetEntry, max_tiles: int) -> Record:
    """Check a record: text only, one image (`image` a string) or several (`image` a list), a video, raw text. Reads no file.

    Args:
        raw: the JSON object.
        where: `file:line` or `shard:key` of it.
        entry: the data set it belongs to.
        max_tiles: tiles per sample unless the data set has its own number.

    Raises:
        SampleError: a field is missing or wrong.
    """
    members = raw.members if isinstance(raw, SampleRecord) else None
    if members is not None and raw.get("image") is None and raw.get("video") is None:
        raw = {**raw, **_unnamed_media(members, where)}
    images = raw.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise SampleError("record", f"{where}: field 'image' must be a path or a list of paths")
    video = None if images else raw.get("video") or None
    if video is not None and not isinstance(video, str):
        raise SampleError("record", f"{where}: field 'video' must be a path")
    return Record(
        where=where,
        turns=_parse_turns(raw, where, bool(images) or video is not None),
        root=entry.root,
        images=tuple(images),
        video=video,
        clip=None if video is None else _parse_clip(raw.get("clip"), where),
        max_tiles=entry.max_tiles or max_tiles,
        augment=entry.data_augment,
        members=members,
    )


def _unnamed_media(members: Members, where: str) -> dict[str, str]:
    """Field 'image' or 'video' of a record that has neither: what the sample has one of."""
    images, videos = members.images(), members.videos()
    if len(images) + len(videos) > 1:
        raise SampleError(
            "record",
            f"{where}: has no field 'image' or 'video' to say which of {', '.join([*images, *videos][:10])} it is about; "
            'name them, or set "image": "" for text alone',
        )
    return {"image": images[0]} if images else {"video": videos[0]} if videos else {}


def _parse_clip(clip: object, where: str) -> tuple[float, float] | None:
    """Field 'clip': start and end in seconds."""
    if clip is None:
        return None
    numbers = (
        [x for x in clip if isinstance(x, int | float) and not isinstance(x, bool)] if isinstance(clip, list) else []
    )
    if not isinstance(clip, list) or not len(clip) == len(numbers) == 2 or not 0 <= numbers[0] < numbers[1] < _LONGEST:
        raise SampleError("record", f"{where}: field 'clip' must be [start, end] in seconds, not {str(clip)[:80]}")
    return float(numbers[0]), float(numbers[1])


def _parse_turns(raw: dict[str, Any], where: str, has_images: bool) -> tuple[Turn, ...]:
    """The turns of field 'conversations'."""
    conversations = raw.get("conversations")
    if conversations is None and "chosen" in raw:
        raise SampleError("conversation", f"{where}: is a pair of answers; set loss.kind=mpo to train on pairs")
    if not isinstance(conversations, list) or not conversations:
        raise SampleError(
            "conversation", f"{where}: field 'conversations' must be a list of turns with 'from' and 'value'"
        )
    turns = []
    for index, turn in enumerate(conversations):
        field = f"{where}: field 'conversations[{index}]"
        if not isinstance(turn, dict):
            raise SampleError("conversation", f"{field}' must be an object with 'from' and 'value'")
        sender, text = turn.get("from"), turn.get("value")
        if not isinstance(sender, str) or sender not in _ROLES:
            raise SampleError("conversation", f"{field}.from' must be one of {', '.join(_ROLES)}, not {sender!r}")
        if not isinstance(text, str):
            raise SampleError("conversation", f"{field}.value' must be a string, not {type(text).__name__}")
        if not _is_unicode(text):
            raise SampleError(
                "conversation", f"{field}.value' has half a surrogate pair, which is not text; mend the escape"
            )
        turns.append(Turn(_ROLES[sender], text))
    roles = {turn.role for turn in turns}
    if roles == {"pretrain"}:
        return tuple(turns)
    for role in ("gpt", "human") if has_images else ("gpt",):
        if role not in roles:
            raise SampleError("conversation", f"{where}: field 'conversations' has no {role!r} turn")
    return tuple(turns)


def _is_unicode(text: str) -> bool:
    """Whether a string is text: JSON escapes can spell half a surrogate pair, which has no encoding."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def render_sample(record: Record, settings: SampleSettings, tokenizer: Tokenizer, image_rng: ImageRng) -> Sample:
    """Turn a record into a sample. Of images and videos only the headers are read.

    Args:
        record: checked record.
        settings: budgets and policies.
        tokenizer: with InternVL's tokens.
        image_rng: generator of the i-th image, for its position step and its augmentation, and which frames a video has.

    Raises:
        SampleError: a file cannot be used, images and `<image>` differ in number, or the sample is over a budget.
        ConfigError: a program that reads such files is not installed.
    """
    data = settings.data
    pictures = _plan_pictures(record, settings, image_rng)
    _check_tiles(sum(pictures.block_tiles), record.where, data)
    context_tokens = [tiles * settings.tokens_per_tile for tiles in pictures.block_tiles]
    try:
        tokens = tokenize_conversation(
            pictures.turns, context_tokens, tokenizer, data.system_prompt, data.special_tokens_in_text
        )
    except DataError as error:
        kind = "placeholders" if isinstance(error, PlaceholderError) else "conversation"
        raise SampleError(kind, f"{record.where}: field '{record.text_field}': {error}") from error
    if not len(tokens.token_ids):
        raise SampleError("conversation", f"{record.where}: field '{record.text_field}' has no text; drop the record")
    tokens = _fit(tokens, context_tokens, record.where, settings)
    _check_image_tokens(tokens, context_tokens, tokenizer, record)
    length, starts = len(tokens.token_ids), tokens.image_starts.tolist()
    positions = v2pe_numerators(length, starts, context_tokens, pictures.strides)
    tile_starts = [
        start + tile * settings.tokens_per_tile
        for start, tiles in zip(starts, pictures.block_tiles, strict=True)
        for tile in range(tiles)
    ]
    return Sample(
        token_ids=tokens.token_ids,
        labels=tokens.labels,
        positions=positions,
        images=pictures.images,
        image_starts=tokens.image_starts[
            : len(pictures.images)
        ],  # a video is the only one, and begins with its first frame
        tile_starts=np.array(tile_starts, dtype=np.int32),
    )


def _check_tiles(tiles: int, where: str, data: DataConfig) -> None:
    if tiles > data.tiles_per_row:
        raise SampleError(
            "tiles",
            f"{where}: {tiles} tiles are over tiles_per_row {data.tiles_per_row}; raise it, or lower max_tiles (or the data "
            "set's max_dynamic_patch) or max_video_frames",
        )


def _plan_pictures(record: Record, settings: SampleSettings, image_rng: ImageRng) -> _Pictures:
    """How the images or the video of a record are cut. Their headers are read, within the time limit."""
    if record.video is not None:
        field, name, plan = "video", record.video, _plan_video
    elif record.images:
        field, name, plan = "image", ", ".join(record.images[:3]), _plan_images
        _check_tiles(len(record.images), record.where, settings.data)  # before so many files are opened
    else:
        return _Pictures((), record.turns, [], [])
    try:
        return read_within(
            settings.data.read_timeout_seconds, f"{field} {name}", lambda: plan(record, settings, image_rng)
        )
    except FileError as error:
        raise SampleError(error.fault, f"{record.where}: field '{field}': {error}") from error


def _find_file(record: Record, name: str, data: DataConfig) -> tuple[str, Span | None]:
    """Path or URL of a file that a record names, and the part of it, if that is a member of a tar."""
    if record.members is not None:
        return record.members.path, record.members.find(name)
    return locate(record.root, name, data.allow_outside_root), None


def _plan_images(record: Record, settings: SampleSettings, image_rng: ImageRng) -> _Pictures:
    """How each image is cut."""
    data = settings.data
    max_tiles = max(1, record.max_tiles // len(record.images))
    images, strides = [], []
    for index, name in enumerate(record.images):
        path, span = _find_file(record, name, data)
        width, height = image_size(path, span)
        grid = choose_grid(width, height, data.min_tiles, max_tiles, settings.tile_pixels)
        rng = image_rng(index)
        strides.append(_draw_stride(rng, data))
        jpeg_seed = _draw_seed(rng) if record.augment else None
        tiles = num_tiles(grid, data.use_thumbnail)
        images.append(ImageRef(path, grid, tiles, jpeg_seed, record.where, span=span))
    return _Pictures(tuple(images), record.turns, [image.num_tiles for image in images], strides)


def _plan_video(record: Record, settings: SampleSettings, image_rng: ImageRng) -> _Pictures:
    """Which frames of the video there are: as many as drawn, however long it is, each an image of one tile."""
    data, rng = settings.data, image_rng(0)
    count = int(rng.integers(data.min_video_frames, data.max_video_frames, endpoint=True))
    seed, jpeg_seed = _draw_seed(rng), _draw_seed(rng)
    path, span = _find_file(record, record.video or "", data)
    files: tuple[str, ...] = ()
    if span is None and is_folder(path):
        if record.clip is not None:
            raise FileError("video", f"video {path}: field 'clip': frames in a folder have no times; drop the field")
        files = choose_files(path, count, seed)
        for name in files:
            locate(path, name, data.allow_outside_root)
    else:
        check_video(path, record.clip, MAX_IMAGE_PIXELS, span)
    video = VideoFrames(seed, record.clip, files)
    ref = ImageRef(path, (1, 1), count, jpeg_seed if record.augment else None, record.where, video, span)
    strides = [_draw_stride(rng, data) for _ in range(count)]
    try:
        turns = place_frames(record.turns, count)
    except PlaceholderError as error:
        raise SampleError("placeholders", f"{record.where}: field '{record.text_field}': {error}") from error
    return _Pictures((ref,), turns, [1] * count, strides)


def _draw_stride(rng: np.random.Generator, data: DataConfig) -> int:
    return draw_stride(rng) if data.v2pe == "random" else data.v2pe_numerator


def _draw_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**63))


def _check_image_tokens(
    tokens: TokenizedConversation, context_tokens: list[int], tokenizer: Tokenizer, record: Record
) -> None:
    """The places where embeddings will be put are exactly the places of image tokens in the text.

    Raises:
        SampleError: the text has image tokens of its own, which `special_tokens_in_text` let through.
    """
    places = np.flatnonzero(tokens.token_ids == tokenizer.image_context_id)
    starts = zip(tokens.image_starts.tolist(), context_tokens, strict=True)
    planned = np.concatenate([np.empty(0, np.int64), *(np.arange(start, start + count) for start, count in starts)])
    if not np.array_equal(places, planned):
        raise SampleError(
            "special tokens",
            f"{record.where}: field '{record.text_field}': the text spells {IMAGE_CONTEXT}, which stands for part of an image; drop the "
            "record, or set data.special_tokens_in_text to 'as_text'",
        )


def _fit(
    tokens: TokenizedConversation, context_tokens: list[int], where: str, settings: SampleSettings
) -> TokenizedConversation:
    """The conversation within its part of a row: as it is, or cut on the right if the policy says so and images allow."""
    length, limit = len(tokens.token_ids), settings.tokens_per_sample
    if length <= limit:
        return tokens
    budget = f"tokens_per_row {limit}"
    if settings.pairs:
        budget = f"half of tokens_per_row {settings.data.tokens_per_row} (a row holds both answers)"
    if settings.data.on_long_sample != "truncate":
        raise SampleError(
            "long",
            f"{where}: {length} tokens are over {budget}; raise it, or set on_long_sample to 'truncate'",
        )
    last_image_end = int(tokens.image_starts[-1]) + context_tokens[-1] if context_tokens else -1
    if last_image_end >= limit:
        raise SampleError(
            "truncated image",
            f"{where}: cut to {budget} of {length} tokens, its images would not be whole; "
            "raise tokens_per_row or lower max_tiles",
        )
    return TokenizedConversation(tokens.token_ids[:limit], tokens.labels[:limit], tokens.image_starts)


def num_supervised(labels: np.ndarray) -> int:
    """Tokens that are trained on, among unshifted labels."""
    return int(np.count_nonzero(labels != IGNORED_LABEL))
