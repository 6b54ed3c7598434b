"""The `internvl2_5` chat template: turns and images to token ids and labels (InternVL `preprocess_internvl2_5`)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from internvl_megatron.data.tokenizer import Tokenizer
from internvl_megatron.errors import DataError

DEFAULT_SYSTEM_PROMPT = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001
)
"""System turn of conversations without one (InternVL `conversation.py`, template `internvl2_5`)."""

IMAGE_PLACEHOLDER = "<image>"
"""Where an image goes, in the text of a human turn."""

IGNORED_LABEL = -100
"""Label of a token that is not trained on."""

VIDEO_PLACEHOLDER = "<video>"
"""Where the frames of a video go, in the text of a human turn."""

Role = Literal["system", "human", "gpt", "pretrain"]
"""Who speaks; `pretrain` is text as it is, without a template (InternVL3.5 `dataset.py`)."""

_ROLES_WITH_IMAGES = ("human", "pretrain")

_TEMPLATE_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}

_Encode = Callable[[str], list[int]]
"""Ids of a text."""


class PlaceholderError(DataError):
    """Images or videos of a record and their places in its text do not go together."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class TokenizedConversation:
    """Token ids of a whole conversation (n tokens, i images)."""

    token_ids: np.ndarray
    """int32 [n]."""
    labels: np.ndarray
    """int32 [n], not shifted: the token itself where it is trained on, `IGNORED_LABEL` elsewhere."""
    image_starts: np.ndarray
    """int32 [i], index of each image's first context token."""


def tokenize_conversation(
    turns: Sequence[Turn],
    context_tokens: Sequence[int],
    tokenizer: Tokenizer,
    system_prompt: str | None = None,
    special_tokens_in_text: Literal["as_text", "as_tokens"] = "as_text",
) -> TokenizedConversation:
    """Tokenize a conversation for training.

    Every turn is tokenized separately; the token that starts a text, if the tokenizer has one (InternLM3), comes once,
    before the first. Trained on: the answers and the `<|im_end|>` after each. Not trained on: system
    and human turns, the header of an answer, the newline after its `<|im_end|>`.

    A `pretrain` turn, which must be alone, is tokenized as it is and trained on all over, except for the tokens of images.

    Args:
        turns: optional system turn first, then human and gpt turns; or one `pretrain` turn.
        context_tokens: tokens each image takes; images replace the `<image>` of human turns in order. A single image
            nobody asked for with `<image>` comes first in the first human turn.
        tokenizer: with InternVL's tokens.
        system_prompt: system turn if the conversation has none; None = `DEFAULT_SYSTEM_PROMPT`, '' = no system turn.
        special_tokens_in_text: what becomes of names of special tokens in texts, see `DataConfig`.

    Raises:
        PlaceholderError: the number of `<image>` is not the number of images.
        DataError: a system turn is not the first, or a `pretrain` turn is not alone.
    """
    encode = tokenizer.encode if special_tokens_in_text == "as_text" else tokenizer.encode_with_special_tokens
    turns = _place_images(_with_system_turn(turns, system_prompt), len(context_tokens))
    images = iter(context_tokens)
    if turns and turns[0].role == "pretrain":
        return _tokenize_pretrain(turns[0].text, images, tokenizer, encode)
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    labels = [IGNORED_LABEL] * len(ids)
    image_starts: list[int] = []
    for turn in turns:
        turn_ids, starts = _tokenize_turn(turn, images, tokenizer, encode)
        image_starts.extend(len(ids) + start for start in starts)
        ids.extend(turn_ids)
        labels.extend(_turn_labels(turn, turn_ids, tokenizer))
    return TokenizedConversation(
        np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32), np.array(image_starts, dtype=np.int32)
    )


def place_frames(turns: Sequence[Turn], num_frames: int) -> list[Turn]:
    """The turns with a video's `<video>` replaced by `Frame-1: <image>` and so on, one a line.

    A video nobody asked for with `<video>` comes first in the first human turn.

    Raises:
        PlaceholderError: there is more than one `<video>`.
    """
    turns = list(turns)
    found = _count_placeholders(turns, VIDEO_PLACEHOLDER)
    if found > 1:
        raise PlaceholderError(f"{found} {VIDEO_PLACEHOLDER} in the human turns but one video; keep one of them")
    if not found:
        turns = _prefix_first_human_turn(turns, VIDEO_PLACEHOLDER + "\n")
    lines = "\n".join(f"Frame-{number}: {IMAGE_PLACEHOLDER}" for number in range(1, num_frames + 1))
    return [
        Turn(turn.role, turn.text.replace(VIDEO_PLACEHOLDER, lines)) if turn.role in _ROLES_WITH_IMAGES else turn
        for turn in turns
    ]


def render_prompt(
    turns: Sequence[Turn],
    context_tokens: Sequence[int],
    tokenizer: Tokenizer,
    system_prompt: str | None = None,
    answer_start: str = "",
) -> TokenizedConversation:
    """Tokenize a conversation that ends with a human turn, ready to be answered: ends with `<|im_start|>assistant\\n` and
    what the answer is to begin with.

    As `tokenize_conversation`, with nothing trained on. Several images without any `<image>` come first in the first
    human turn, as `Image-1: <image>` and so on, one a line.
    """
    if not turns or turns[-1].role != "human":
        raise DataError("a prompt must end with a human turn")
    turns = list(turns)
    if len(context_tokens) > 1 and not _count_placeholders(turns):
        lines = [f"Image-{number}: {IMAGE_PLACEHOLDER}\n" for number in range(1, len(context_tokens) + 1)]
        turns = _prefix_first_human_turn(turns, "".join(lines))
    asked = tokenize_conversation(turns, context_tokens, tokenizer, system_prompt)
    header = answer_header(tokenizer, answer_start)
    token_ids = np.concatenate([asked.token_ids, np.array(header, dtype=np.int32)])
    return TokenizedConversation(token_ids, np.full_like(token_ids, IGNORED_LABEL), asked.image_starts)


def answer_header(tokenizer: Tokenizer, answer_start: str = "") -> list[int]:
    """Ids at the end of a prompt: what stands before an answer, and its beginning."""
    return [tokenizer.turn_start_id, *tokenizer.encode(_header_text("gpt") + answer_start)]


def answer_places(token_ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Places of the last token of every answer's header, int64, in a conversation that may end with one.

    Texts cannot look like a header: `<|im_start|>` in them is not that token (`special_tokens_in_text`).
    """
    header = np.array(answer_header(tokenizer), dtype=token_ids.dtype)
    if len(token_ids) < len(header):
        return np.empty(0, dtype=np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(token_ids, len(header))
    return np.flatnonzero((windows == header).all(axis=1)) + len(header) - 1


def _header_text(role: Role) -> str:
    """Text between `<|im_start|>` and a turn's own text."""
    return _TEMPLATE_ROLES[role] + "\n"


def _with_system_turn(turns: Sequence[Turn], system_prompt: str | None) -> list[Turn]:
    """The turns, led by a system turn unless there is to be none."""
    if any(turn.role == "system" for turn in turns[1:]):
        raise DataError("a system turn must be the first turn")
    if any(turn.role == "pretrain" for turn in turns):
        if len(turns) > 1:
            raise DataError("a pretrain turn must be the only turn")
        return list(turns)
    if turns and turns[0].role == "system":
        return list(turns)
    prompt = DEFAULT_SYSTEM_PROMPT if system_prompt is None else system_prompt
    return [Turn("system", prompt), *turns] if prompt else list(turns)


def _count_placeholders(turns: Sequence[Turn], placeholder: str = IMAGE_PLACEHOLDER) -> int:
    """`<image>` in human turns."""
    return sum(turn.text.count(placeholder) for turn in turns if turn.role in _ROLES_WITH_IMAGES)


def _prefix_first_human_turn(turns: Sequence[Turn], prefix: str) -> list[Turn]:
    """The turns with `prefix` put before the text of the first human one."""
    first = next((index for index, turn in enumerate(turns) if turn.role in _ROLES_WITH_IMAGES), None)
    if first is None:
        raise PlaceholderError("the conversation has images but no human turn to put them in")
    return [*turns[:first], Turn(turns[first].role, prefix + turns[first].text), *turns[first + 1 :]]


def _place_images(turns: list[Turn], num_images: int) -> list[Turn]:
    """The turns with as many `<image>` as there are images."""
    if num_images == 1 and not _count_placeholders(turns):
        turns = _prefix_first_human_turn(turns, IMAGE_PLACEHOLDER + "\n")
    found = _count_placeholders(turns)
    if found != num_images:
        raise PlaceholderError(
            f"{found} {IMAGE_PLACEHOLDER} in the human turns but {num_images} image(s); the two must be equal"
        )
    return turns


def _tokenize_turn(
    turn: Turn, images: Iterator[int], tokenizer: Tokenizer, encode: _Encode
) -> tuple[list[int], list[int]]:
    """Ids of one rendered turn, and the index of each of its images' first context token.

    Text between two real special tokens is encoded in one piece, the role's name together with what follows it, so
    the ids are those of the whole rendered turn.
    """
    header = _header_text(turn.role)
    first, *others = turn.text.split(IMAGE_PLACEHOLDER) if turn.role == "human" else [turn.text]
    ids, starts = _put_images([tokenizer.turn_start_id, *encode(header + first)], others, images, tokenizer, encode)
    return [*ids, tokenizer.turn_end_id, *tokenizer.encode("\n")], starts


def _put_images(
    ids: list[int], texts: Sequence[str], images: Iterator[int], tokenizer: Tokenizer, encode: _Encode
) -> tuple[list[int], list[int]]:
    """The ids followed by an image before each of the texts, and the index of each image's first context token."""
    starts: list[int] = []
    for text in texts:
        num_context = next(images)
        starts.append(len(ids) + 1)
        ids += [tokenizer.image_start_id, *[tokenizer.image_context_id] * num_context, tokenizer.image_end_id]
        ids += encode(text)
    return ids, starts


def _tokenize_pretrain(
    text: str, images: Iterator[int], tokenizer: Tokenizer, encode: _Encode
) -> TokenizedConversation:
    """Raw text: no template, nothing before it or behind it, trained on except for what images put in."""
    first, *others = text.split(IMAGE_PLACEHOLDER)
    ids, starts = _put_images(encode(first), others, images, tokenizer, encode)
    token_ids = np.array(ids, dtype=np.int32)
    of_images = np.isin(token_ids, [tokenizer.image_start_id, tokenizer.image_context_id, tokenizer.image_end_id])
    labels = np.where(of_images, np.int32(IGNORED_LABEL), token_ids)
    return TokenizedConversation(token_ids, labels, np.array(starts, dtype=np.int32))


def _turn_labels(turn: Turn, turn_ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Labels of one turn's ids."""
    if turn.role != "gpt":
        return [IGNORED_LABEL] * len(turn_ids)
    header_tokens = 1 + len(tokenizer.encode(_header_text("gpt")))
    footer_tokens = len(tokenizer.encode("\n"))
    body = turn_ids[header_tokens : len(turn_ids) - footer_tokens]
    return [IGNORED_LABEL] * header_tokens + list(body) + [IGNORED_LABEL] * footer_tokens
