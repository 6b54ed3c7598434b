"""Text to token ids, so that nothing a user types can pass for a control or image token."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from internvl_megatron.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
IMAGE_START = "<img>"
IMAGE_END = "</img>"
IMAGE_CONTEXT = "<IMG_CONTEXT>"

GROUNDING_TOKENS = ("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
"""Tokens of grounding text, `<ref>name</ref><box>[[x1, y1, x2, y2]]</box>`: part of what users write."""

INTERNVL_TOKENS = (IMAGE_START, IMAGE_END, IMAGE_CONTEXT, *GROUNDING_TOKENS)
"""The nine tokens InternVL adds to the language model's own, in the order of their ids."""

CONTROL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, IMAGE_START, IMAGE_END, IMAGE_CONTEXT)
"""Tokens that only the template may place."""


class Tokenizer:
    """A fast Hugging Face tokenizer with the ids the chat template needs, found by name.

    `encode` treats the names of special tokens inside a text as ordinary characters, except those of the grounding
    tokens, which stay tokens (as do added tokens the tokenizer does not call special, like Qwen's `<tool_call>`).
    """

    def __init__(self, hf_tokenizer: "PreTrainedTokenizerBase", source: str) -> None:
        """Wrap a tokenizer, which is not changed. `source` names it in errors."""
        from tokenizers import Tokenizer as FastTokenizer

        backend = getattr(hf_tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, FastTokenizer):
            raise DataError(f"tokenizer {source}: needs a fast tokenizer (tokenizer.json), got {type(hf_tokenizer)}")
        self.hf_tokenizer = hf_tokenizer
        # A copy of our own: transformers switches the flag back whenever its tokenizer is called.
        self._backend = FastTokenizer.from_str(backend.to_str())
        self._backend.encode_special_tokens = True  # their names in a text are text
        self._source = source
        self.end_of_text_id = self._token_id(END_OF_TEXT)
        self.turn_start_id = self._token_id(TURN_START)
        self.turn_end_id = self._token_id(TURN_END)
        self.image_start_id = self._token_id(IMAGE_START)
        self.image_end_id = self._token_id(IMAGE_END)
        self.image_context_id = self._token_id(IMAGE_CONTEXT)
        self._grounding_ids = {token: self._token_id(token) for token in GROUNDING_TOKENS}
        self._grounding_pattern = re.compile("(" + "|".join(map(re.escape, GROUNDING_TOKENS)) + ")")
        self._check_control_tokens_are_text()

    def _token_id(self, token: str) -> int:
        """Id of a token that must exist, as one added token."""
        token_id = self._backend.token_to_id(token)
        if token_id is None or token_id not in self._backend.get_added_tokens_decoder():
            raise DataError(
                f"tokenizer {self._source}: has no added token {token!r}; "
                "use an InternVL tokenizer, or add the InternVL tokens with `tools/build_qwen_tokenizer.py`"
            )
        return token_id

    def _check_control_tokens_are_text(self) -> None:
        """Refuse a tokenizer in which a control token could be typed (one registered as an ordinary added token)."""
        for token in CONTROL_TOKENS:
            if self._backend.token_to_id(token) in self.encode(f"a {token} b {token}"):
                raise DataError(
                    f"tokenizer {self._source}: {token!r} is not marked as special, so a user's text could contain it; "
                    'set "special": true for it in tokenizer.json'
                )

    def __len__(self) -> int:
        """Number of ids, added tokens counted: the model's vocabulary size."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Grounding tokens become their ids, names of control tokens become ordinary text."""
        ids: list[int] = []
        for piece in self._grounding_pattern.split(text):
            if piece in self._grounding_ids:
                ids.append(self._grounding_ids[piece])
            elif piece:
                ids.extend(self._backend.encode(piece, add_special_tokens=False).ids)
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of ids."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer as a Hugging Face folder."""
        self.hf_tokenizer.save_pretrained(str(folder))


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load a tokenizer from a Hugging Face folder; nothing is downloaded and no code of the folder is run.

    Raises:
        DataError: the folder is missing or unreadable, or a token InternVL needs is missing.
    """
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise DataError(f"tokenizer {folder}: no such folder; set data.tokenizer to a Hugging Face tokenizer's folder")
    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise DataError(f"tokenizer {folder}: cannot be loaded: {error}") from error
    return Tokenizer(loaded, str(folder))
