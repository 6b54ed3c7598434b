"""Text to token ids, so that nothing a user types can pass for a control or image token."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from internvl_megatron.errors import DataError

END_OF_TEXT = "<|endoftext|>"
"""Padding of the tokenizers made here and of Qwen's."""

TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
IMAGE_START = "<img>"
IMAGE_END = "</img>"
IMAGE_CONTEXT = "<IMG_CONTEXT>"

GROUNDING_TOKENS = ("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
"""Tokens of grounding text, `<ref>name</ref><box>[[x1, y1, x2, y2]]</box>`: part of what users write."""

INTERNVL_TOKENS = (IMAGE_START, IMAGE_END, IMAGE_CONTEXT, *GROUNDING_TOKENS)
"""The nine tokens InternVL adds to the language model's own, in the order of their ids."""

TEMPLATE_TOKENS = (TURN_START, TURN_END, IMAGE_START, IMAGE_END, IMAGE_CONTEXT)
"""Tokens that only the template may place; so it is with the padding and the start of a text, whatever their names."""

MODEL_FILE = "tokenizer.model"
"""The file of a sentencepiece tokenizer."""

FAST_FILES = ("tokenizer.json", "vocab.json")
"""A folder with one of these holds a tokenizer that Hugging Face's own classes can load."""


class Tokenizer(ABC):
    """Text to ids and back, with the ids the chat template needs, found by name in the tokenizer's own files.

    `encode` treats the names of special tokens inside a text as ordinary characters, except those of the grounding
    tokens, which stay tokens (as do added tokens the tokenizer does not call special, like Qwen's `<tool_call>`).
    """

    def __init__(self, source: str, pad_token: str | None, bos_token: str | None) -> None:
        """Find the ids; a subclass calls this when its other methods are ready.

        Args:
            source: names the tokenizer in errors.
            pad_token: fills rows.
            bos_token: starts every text; None if texts start without (Qwen).
        """
        self.source = source
        if pad_token is None:
            raise DataError(f"tokenizer {source}: names no padding token; set pad_token in tokenizer_config.json")
        self.pad_id = self._token_id(pad_token)
        self.bos_id = None if bos_token is None else self._token_id(bos_token)
        self.turn_start_id = self._token_id(TURN_START)
        self.turn_end_id = self._token_id(TURN_END)
        self.image_start_id = self._token_id(IMAGE_START)
        self.image_end_id = self._token_id(IMAGE_END)
        self.image_context_id = self._token_id(IMAGE_CONTEXT)
        self._grounding_ids = {token: self._token_id(token) for token in GROUNDING_TOKENS}
        self._grounding_pattern = re.compile("(" + "|".join(map(re.escape, GROUNDING_TOKENS)) + ")")
        self._special_ids_by_name = self.special_ids()
        longest_first = sorted(self._special_ids_by_name, key=len, reverse=True)
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._check_are_text({pad_token, *TEMPLATE_TOKENS, *([] if bos_token is None else [bos_token])})

    @abstractmethod
    def __len__(self) -> int:
        """Number of ids, added tokens counted: the model's vocabulary size."""

    @abstractmethod
    def find(self, token: str) -> int | None:
        """Id of a token that a template can place, by its name; None if there is none."""

    @abstractmethod
    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of ids; ids without a token are left out."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write the tokenizer as a Hugging Face folder."""

    @abstractmethod
    def special_ids(self) -> dict[str, int]:
        """Id of every special token by its name, those of the template and of grounding among them."""

    @abstractmethod
    def _encode_text(self, text: str) -> list[int]:
        """Ids of a text without grounding tokens; the names of special tokens in it are ordinary characters."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Grounding tokens become their ids, names of control tokens become ordinary text."""
        ids: list[int] = []
        for piece in self._grounding_pattern.split(text):
            if piece in self._grounding_ids:
                ids.append(self._grounding_ids[piece])
            elif piece:
                ids.extend(self._encode_text(piece))
        return ids

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """Ids of a text in which the names of special tokens become these tokens, as InternVL's trainer has it."""
        ids: list[int] = []
        for piece in self._special_pattern.split(text):
            if piece in self._special_ids_by_name:
                ids.append(self._special_ids_by_name[piece])
            elif piece:
                ids.extend(self.encode(piece))
        return ids

    def _token_id(self, token: str) -> int:
        """Id of a token that must exist."""
        token_id = self.find(token)
        if token_id is None:
            raise DataError(
                f"tokenizer {self.source}: has no token {token!r}; "
                "use an InternVL tokenizer, or add the InternVL tokens with `tools/add_internvl_tokens.py`"
            )
        return token_id

    def _check_are_text(self, tokens: set[str]) -> None:
        """Refuse a tokenizer in which a control token could be typed (one registered as an ordinary added token)."""
        for token in sorted(tokens):
            if self._token_id(token) in self.encode(f"a {token} b {token}"):
                raise DataError(
                    f"tokenizer {self.source}: {token!r} is not marked as special, so a user's text could contain it; "
                    'set "special": true for it in tokenizer.json or tokenizer_config.json'
                )


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load a tokenizer from a Hugging Face folder; nothing is downloaded and no code of the folder is run.

    `tokenizer.json`, or `vocab.json` with `merges.txt`, makes a fast tokenizer; `tokenizer.model` alone, one of
    sentencepiece.

    Raises:
        DataError: the folder is missing or unreadable, or a token InternVL needs is missing.
    """
    # These modules build on the interface above.
    from internvl_megatron.data.fast_tokenizer import load_fast_tokenizer
    from internvl_megatron.data.sentencepiece_tokenizer import SentencePieceTokenizer, read_folder

    if is_sentencepiece_folder(folder):
        return SentencePieceTokenizer(read_folder(folder))
    return load_fast_tokenizer(folder)


def is_sentencepiece_folder(folder: str | Path) -> bool:
    """Whether a tokenizer's folder is for sentencepiece; False means a fast one.

    Raises:
        DataError: it is no folder, or has no file of either kind.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"tokenizer {folder}: no such folder; set data.tokenizer to a Hugging Face tokenizer's folder")
    if any((folder / name).is_file() for name in FAST_FILES):
        return False
    if not (folder / MODEL_FILE).is_file():
        raise DataError(
            f"tokenizer {folder}: cannot be loaded: has none of {', '.join(FAST_FILES)} and {MODEL_FILE}; "
            "copy all files of the tokenizer into it"
        )
    return True
