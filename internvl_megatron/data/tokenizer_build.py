"""Make tokenizers: Qwen2.5's own from its published ranks, and a small one trained on a few texts (for the demo)."""

import base64
import binascii
import hashlib
import importlib.util
import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from internvl_megatron.data.tokenizer import END_OF_TEXT, INTERNVL_TOKENS, TURN_END, TURN_START
from internvl_megatron.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RANKS_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
"""Digest of Qwen's `qwen.tiktoken`, the same file in every package that ships it."""

QWEN_SPECIAL_TOKENS = (
    END_OF_TEXT, TURN_START, TURN_END, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
"""Special tokens of Qwen2.5, in the order of their ids, from 151643."""

QWEN_PLAIN_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
"""Added tokens of Qwen2.5 that are not special; their ids follow those of the special tokens."""

_NUM_BYTES = 256


def find_dashscope_ranks() -> Path:
    """Path of `qwen.tiktoken` in the installed `dashscope` package, which is not imported (only the file is used).

    Raises:
        DataError: the package or the file is missing.
    """
    spec = importlib.util.find_spec("dashscope")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "resources" / "qwen.tiktoken"
        if path.is_file():
            return path
    raise DataError(
        "Qwen's token ranks (package dashscope==2.0.2, resources/qwen.tiktoken) are missing: run `make setup`"
    )


def _read_ranks(ranks_path: Path) -> dict[bytes, int]:
    """Token -> rank of a tiktoken file whose digest is checked first."""
    try:
        content = ranks_path.read_bytes()
    except OSError as error:
        raise DataError(f"{ranks_path}: cannot be read ({error}); run `make setup`") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != RANKS_SHA256:
        raise DataError(f"{ranks_path}: sha256 is {digest}, expected {RANKS_SHA256}; run `make setup` again")
    try:
        pairs = [line.split() for line in content.splitlines()]
        return {base64.b64decode(token): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise DataError(f"{ranks_path}: is not a tiktoken file ({error})") from error


def _two_parts(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The merge that made a token: what byte-pair encoding with only the tokens before it leaves of it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while True:
        pair_ranks = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
        lowest = min(pair_ranks)
        if lowest >= rank:
            break
        at = pair_ranks.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    assert len(parts) == 2, f"token {token!r} of rank {rank} splits into {len(parts)} parts, not 2"
    return parts[0], parts[1]


def _byte_letters() -> dict[int, str]:
    """The printable letter that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(_NUM_BYTES) if byte not in letters]
    return letters | {byte: chr(_NUM_BYTES + index) for index, byte in enumerate(others)}


def qwen2_5_tokenizer(ranks_path: str | Path) -> "PreTrainedTokenizerBase":
    """Qwen2.5's tokenizer plus InternVL's nine tokens (151,674 ids), equal to the released one, from Qwen's ranks.

    A ranks file has no merges. Rank by rank, the merge is recovered as the two parts that byte-pair encoding with
    the lower ranks leaves of a token; this gives the official merges in the official order. Takes some seconds.

    Raises:
        DataError: the file is missing or is not Qwen's.
    """
    from transformers import AddedToken, Qwen2Tokenizer

    ranks = _read_ranks(Path(ranks_path))
    letters = _byte_letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    by_rank = sorted(ranks.items(), key=lambda item: item[1])
    parts = (_two_parts(token, rank, ranks) for token, rank in by_rank if len(token) > 1)
    merges = [(spelled(left), spelled(right)) for left, right in parts]
    vocab = {spelled(token): rank for token, rank in by_rank}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges)  # pyright: ignore[reportArgumentType]  # pairs are taken too
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN_SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in QWEN_PLAIN_TOKENS])
    _finish(tokenizer)
    return tokenizer


def train_small_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerBase":
    """Byte-level BPE trained on `texts`, Qwen2.5's way, with the template's and InternVL's tokens.

    Args:
        texts: what to learn merges from; any text can be encoded afterwards.
        vocab_size: most ids the tokenizer may have, the 256 bytes and the 12 added tokens counted.
    """
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import models, pre_tokenizers, trainers
    from transformers import AddedToken, Qwen2Tokenizer

    template_tokens = (END_OF_TEXT, TURN_START, TURN_END)
    num_plain = vocab_size - len(template_tokens) - len(INTERNVL_TOKENS)
    if num_plain < _NUM_BYTES:
        raise DataError(f"vocab_size {vocab_size} is too small: {_NUM_BYTES} bytes and 12 added tokens must fit")
    qwen_rules = Qwen2Tokenizer().backend_tokenizer
    trained = FastTokenizer(models.BPE())
    trained.normalizer = qwen_rules.normalizer
    trained.pre_tokenizer = qwen_rules.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=num_plain, initial_alphabet=alphabet, show_progress=False)
    )
    learned = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=learned["vocab"], merges=merges)  # pyright: ignore[reportArgumentType]  # as above
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in template_tokens])
    _finish(tokenizer)
    return tokenizer


def _finish(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Add InternVL's tokens and set the end of a turn as the end of generation."""
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in INTERNVL_TOKENS])
    tokenizer.eos_token = TURN_END
