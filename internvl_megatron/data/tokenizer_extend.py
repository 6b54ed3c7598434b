"""InternVL's nine tokens for the tokenizer of a bare language model, to start from its weights."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from internvl_megatron.data.fast_tokenizer import load_hf_tokenizer
from internvl_megatron.data.sentencepiece_tokenizer import CONFIG_FILE, copy_folder, read_folder
from internvl_megatron.data.tokenizer import INTERNVL_TOKENS, is_sentencepiece_folder, load_tokenizer
from internvl_megatron.errors import DataError

_FAST_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja",
)  # fmt: skip


def add_internvl_tokens(source: str | Path, target: str | Path) -> int:
    """Write a language model's tokenizer with InternVL's nine tokens, their ids in order after all others.

    A tokenizer that has them all is copied as it is. For Qwen2.5 (151,665 tokens) the nine get 151665 to 151673.

    Args:
        source: folder of the tokenizer, with `tokenizer.json` or `tokenizer.model`.
        target: folder to write, new or empty.

    Returns:
        Number of tokens: the vocabulary size that the language model needs.

    Raises:
        DataError: the tokenizer cannot be read, has some of the nine in another order, or lacks a token of the
            template; or the target folder has files.
    """
    source, target = Path(source), Path(target)
    slow = is_sentencepiece_folder(source)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target}: exists and is not an empty folder; name another one")
    if slow:
        _extend_sentencepiece(source, target)
    else:
        _extend_fast(source, target)
    return len(load_tokenizer(target))


def _new_ids(source: Path, present: Sequence[int | None], num_tokens: int) -> dict[str, int]:
    """Ids of those of the nine that are missing; `present` holds the ids of all nine, None for a missing one."""
    missing = [name for name, index in zip(INTERNVL_TOKENS, present, strict=True) if index is None]
    if not missing:
        return {}  # complete: InternLM's have them in another order
    new = {name: num_tokens + place for place, name in enumerate(missing)}
    ids = [new[name] if index is None else index for name, index in zip(INTERNVL_TOKENS, present, strict=True)]
    if ids != list(range(ids[0], ids[0] + len(ids))):
        found = {name: index for name, index in zip(INTERNVL_TOKENS, present, strict=True) if index is not None}
        raise DataError(
            f"tokenizer {source}: has {found}, so that the nine tokens {', '.join(INTERNVL_TOKENS)} cannot have ids in "
            "this order; start from a tokenizer without them, or use this one as it is if it has all nine"
        )
    return new


def _extend_fast(source: Path, target: Path) -> None:
    """As `add_internvl_tokens`, for a fast tokenizer."""
    from transformers import AddedToken

    tokenizer = load_hf_tokenizer(source)
    vocabulary = tokenizer.get_vocab()
    new = _new_ids(source, [vocabulary.get(name) for name in INTERNVL_TOKENS], len(tokenizer))
    if not new:
        target.mkdir(parents=True, exist_ok=True)
        for name in _FAST_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
        return
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in new])
    got = {name: tokenizer.convert_tokens_to_ids(name) for name in new}
    if got != new:
        raise DataError(f"tokenizer {source}: has gaps in its ids; the new tokens got {got} instead of {new}")
    tokenizer.save_pretrained(str(target))


def _extend_sentencepiece(source: Path, target: Path) -> None:
    """As `add_internvl_tokens`, for a sentencepiece tokenizer: only `tokenizer_config.json` changes."""
    folder = read_folder(source)
    new = _new_ids(source, [folder.find(name) for name in INTERNVL_TOKENS], folder.num_tokens)
    copy_folder(source, target)
    if not new:
        return
    # The whole table: with one, Hugging Face no longer reads `added_tokens.json`.
    old = folder.config.get("added_tokens_decoder") or {}
    table = {str(index): _entry(name, name in folder.special_tokens) for name, index in folder.added_ids.items()}
    table |= {str(index): _entry(name, True) for name, index in new.items()}
    config = {
        **folder.config,
        "added_tokens_decoder": {index: old.get(index, table[index]) for index in sorted(table, key=int)},
        "additional_special_tokens": [*(folder.config.get("additional_special_tokens") or []), *new],
    }
    text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    (target / CONFIG_FILE).write_text(text, encoding="utf-8")


def _entry(name: str, special: bool) -> dict[str, str | bool]:
    """An entry of `added_tokens_decoder`."""
    rules = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": name, **rules, "special": special}
