"""Small tokenizers of InternLM3's kind, trained on the spot."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import sentencepiece

from internvl_megatron.data.tokenizer import INTERNVL_TOKENS

CORPUS = [
    "how many digits are there in the picture? there are three: seven, two and one.",
    "system user assistant\n  two spaces, 12 and 345\n\nnew lines",
    "图片里有几个数字？一共有三个数字：七、二和一。你是一个助手。",  # noqa: RUF001
    "<ref>the cat</ref><box>[[1, 2, 3, 4]]</box> <im_start im_end img>",
] * 8
TURN_TOKENS = ("<|im_start|>", "<|im_end|>")


def write_folder(
    folder: Path, kind: Literal["user_defined", "control"], add_dummy_prefix: bool, with_nine: bool = True
) -> Path:
    """A small InternLM3: its turn tokens are pieces of the model, of type `kind`; InternVL's come after all pieces."""
    folder.mkdir(parents=True)
    options: dict[str, Any] = {f"{kind}_symbols": list(TURN_TOKENS)}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(folder / "tokenizer"), vocab_size=420, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, add_dummy_prefix=add_dummy_prefix, character_coverage=0.9999,
        minloglevel=2, **options,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    path = folder / "tokenizer.model"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    names = ["<unk>", "<s>", "</s>", *TURN_TOKENS]
    table = {processor.piece_to_id(name): name for name in names}
    if with_nine:
        table |= {processor.get_piece_size() + place: name for place, name in enumerate(INTERNVL_TOKENS)}
    rules = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    config = {
        "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": {"content": "</s>", **rules},
        "unk_token": "<unk>", "pad_token": "</s>", "sp_model_kwargs": {}, "tokenizer_class": "InternLM3Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm3.InternLM3Tokenizer", None]},
        "added_tokens_decoder": {str(i): {"content": name, "special": True, **rules} for i, name in table.items()},
        "additional_special_tokens": [*TURN_TOKENS, *(INTERNVL_TOKENS if with_nine else ())],
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenization_internlm3.py").write_text("raise RuntimeError('code of the folder was run')\n")
    return folder


def change_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit `tokenizer_config.json` in place."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    edit(config)
    path.write_text(json.dumps(config), encoding="utf-8")
