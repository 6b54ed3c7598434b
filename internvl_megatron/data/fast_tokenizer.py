"""A fast Hugging Face tokenizer (`tokenizer.json`): Qwen2.5's, and small ones trained here."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from internvl_megatron.data.tokenizer import Tokenizer
from internvl_megatron.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROCESSOR_TOKENS = ("<video>",)
"""Placeholders that transformers' processor replaces before anything is tokenized: they may have ids behind the others,
for which the model has no rows."""
LARGEST_ID = 2**24
"""A hundred times InternVL3's."""


class FastTokenizer(Tokenizer):
    """Runs on the `tokenizers` library."""

    def __init__(self, hf_tokenizer: "PreTrainedTokenizerBase", source: str) -> None:
        """Wrap a tokenizer, which is not changed. `source` names it in errors."""
        from tokenizers import Tokenizer as Backend

        backend = getattr(hf_tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Backend):
            raise DataError(f"tokenizer {source}: needs a fast tokenizer (tokenizer.json), got {type(hf_tokenizer)}")
        self.hf_tokenizer = hf_tokenizer
        # A copy of our own: transformers switches the flag back whenever its tokenizer is called.
        try:
            self._backend = Backend.from_str(backend.to_str())
        except Exception as error:  # what it has read before without a word
            raise DataError(f"tokenizer {source}: tokenizer.json contradicts itself: {error}") from error
        self._backend.encode_special_tokens = True  # their names in a text are text
        names = {key: str(token) for key, token in hf_tokenizer.special_tokens_map.items()}
        adds_bos = getattr(hf_tokenizer, "add_bos_token", False)
        super().__init__(source, names.get("pad_token"), names.get("bos_token") if adds_bos else None)

    def __len__(self) -> int:
        """Number of ids, added tokens counted."""
        size = self._backend.get_vocab_size(with_added_tokens=True)
        behind = [token for token in PROCESSOR_TOKENS if self._backend.token_to_id(token) == size - 1]
        return size - len(behind)

    def find(self, token: str) -> int | None:
        """Id of an added token; None if there is none."""
        token_id = self._backend.token_to_id(token)
        return token_id if token_id in self._backend.get_added_tokens_decoder() else None

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of ids."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer as a Hugging Face folder."""
        self.hf_tokenizer.save_pretrained(str(folder))

    def special_ids(self) -> dict[str, int]:
        """Added tokens that are marked as special."""
        added = self._backend.get_added_tokens_decoder().items()
        return {token.content: index for index, token in added if token.special and index < len(self)}

    def _encode_text(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids


def load_fast_tokenizer(folder: str | Path) -> FastTokenizer:
    """Load a fast tokenizer from its folder, offline, without running code of the folder.

    Raises:
        DataError: it cannot be loaded, or a token InternVL needs is missing.
    """
    return FastTokenizer(load_hf_tokenizer(folder), str(folder))


def load_hf_tokenizer(folder: str | Path) -> "PreTrainedTokenizerBase":
    """Load Hugging Face's tokenizer of a folder, offline, without running code of the folder. Raises `DataError`."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    _check_ids(Path(folder))
    # It warns of every config.json that is not one of its own models', which InternVL's is not.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged file can raise anything, a bare Exception from the Rust side among it
        raise DataError(f"tokenizer {folder}: cannot be loaded: {error}") from error
    finally:
        logging.set_verbosity(verbosity)


def _check_ids(folder: Path) -> None:
    """Refuse ids beyond any vocabulary: the library makes a table up to the largest, and ends the process if it gets no memory for it."""
    for name in ("tokenizer.json", "vocab.json"):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            ids = (content["model"]["vocab"] if name == "tokenizer.json" else content).values()
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
            continue  # it is not there, has no such table, or the library says what is wrong with it
        largest = max((index for index in ids if isinstance(index, int)), default=0)
        if largest > LARGEST_ID:
            raise DataError(
                f"{folder / name}: has the id {largest}, and no vocabulary is so large; copy the file again"
            )
