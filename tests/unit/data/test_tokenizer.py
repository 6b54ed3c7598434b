"""Qwen2.5's tokenizer against known ids, and tokens that users type."""

import base64
import importlib.util
import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from internvl_megatron.data import tokenizer_build
from internvl_megatron.data.fast_tokenizer import FastTokenizer
from internvl_megatron.data.tokenizer import END_OF_TEXT, INTERNVL_TOKENS, TEMPLATE_TOKENS, load_tokenizer
from internvl_megatron.data.tokenizer_build import find_dashscope_ranks, qwen2_5_tokenizer, train_small_tokenizer
from internvl_megatron.errors import DataError


def test_known_ids(qwen):
    assert len(qwen) == 151674
    assert qwen.encode("Hello world") == [9707, 1879]
    assert (qwen.pad_id, qwen.turn_start_id, qwen.turn_end_id) == (151643, 151644, 151645)
    assert (qwen.image_start_id, qwen.image_end_id, qwen.image_context_id) == (151665, 151666, 151667)
    assert qwen.encode("!") == [0]


def test_the_nine_tokens_follow_qwens_in_order(qwen):
    ids = qwen.hf_tokenizer.convert_tokens_to_ids(list(INTERNVL_TOKENS))
    assert ids == list(range(151665, 151674))
    assert INTERNVL_TOKENS == (
        "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"
    )  # fmt: skip


def test_loaded_by_transformers_it_parses_the_template(qwen_folder):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(qwen_folder), local_files_only=True)
    ids = loaded("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n").input_ids
    assert ids == [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]
    assert (len(loaded), loaded.eos_token_id, loaded.pad_token_id) == (151674, 151645, 151643)


def test_merges_are_byte_pair_merges(qwen_folder):
    model = json.loads((qwen_folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert len(model["vocab"]) == 151643 and len(model["merges"]) == 151387
    # The ids of the merged tokens ascend one by one: nothing is missing, doubled or out of order.
    assert [model["vocab"][left + right] for left, right in model["merges"]] == list(range(256, 151643))


def test_byte_letters_are_gpt2s():
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert tokenizer_build._byte_letters() == bytes_to_unicode()


@pytest.mark.parametrize("text", ["naïve 東京 🙂 \t\n\n x", "a\u0000b", "1234567 don't", " lead", "</s><pad>"])
def test_round_trip(qwen, small, text):
    for tokenizer in (qwen, small):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_typed_control_tokens_are_text(qwen, small):
    for tokenizer in (qwen, small):
        control = (END_OF_TEXT, *TEMPLATE_TOKENS)
        special = {tokenizer.hf_tokenizer.convert_tokens_to_ids(token) for token in control}
        for token in control:
            text = f"x{token}{token} y\n{token}"
            ids = tokenizer.encode(text)
            assert not special & set(ids), token
            assert tokenizer.decode(ids) == text


def test_typed_control_tokens_are_text_after_the_wrapped_tokenizer_was_used(small):
    assert small.turn_end_id in small.hf_tokenizer("<|im_end|>").input_ids
    assert small.turn_end_id not in small.encode("<|im_end|>")


def test_grounding_tokens_stay_tokens(qwen):
    text = "<ref>the cat</ref><box>[[1, 2, 3, 4]]</box><quad>5</quad>"
    ids = qwen.encode(text)
    assert [i for i in ids if i >= 151643] == [151670, 151671, 151672, 151673, 151668, 151669]
    assert ids == qwen.hf_tokenizer(text).input_ids


def test_missing_package_names_the_way_out(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="make setup"):
        find_dashscope_ranks()


def test_finding_the_ranks_does_not_import_the_package():
    code = (
        "import sys; from internvl_megatron.data.tokenizer_build import find_dashscope_ranks as f; "
        "assert f().is_file(); assert 'dashscope' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_other_ranks_are_refused(tmp_path):
    ranks = tmp_path / "qwen.tiktoken"
    ranks.write_bytes(find_dashscope_ranks().read_bytes() + b"\n")
    with pytest.raises(DataError, match=r"qwen\.tiktoken: sha256 is"):
        qwen2_5_tokenizer(ranks)


def test_folder_problems(tmp_path, qwen_folder):
    with pytest.raises(DataError, match=r"no such folder; set data\.tokenizer"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda added: [a for a in added if a["content"] != "<IMG_CONTEXT>"], "no token '<IMG_CONTEXT>'"),
        (lambda added: [{**a, "special": a["content"] != "<img>"} for a in added], "'<img>' is not marked as special"),
    ],
)
def test_unfit_tokenizers_are_refused(tmp_path, small, damage, message):
    small.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["added_tokens"] = damage(content["added_tokens"])
    file.write_text(json.dumps(content), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model["vocab"].update({next(iter(model["vocab"])): 2**31}), "has the id 2147483648, and no vocabulary"),
        (lambda model: model["vocab"].pop(next(reversed(model["vocab"]))), "out of vocabulary"),
    ],
)  # fmt: skip
def test_tables_that_the_library_would_die_of_or_contradict_are_refused(tmp_path, small, change, message):
    small.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content["model"])
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)


def test_rows_need_a_padding_token(tmp_path, small):
    small.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(DataError, match="names no padding token; set pad_token"):
        load_tokenizer(tmp_path)


def test_qwens_texts_start_without_a_token(qwen, small):
    assert qwen.bos_id is None and small.bos_id is None


def test_small_tokenizer_is_saved_and_loaded(tmp_path, small):
    small.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert len(loaded) == len(small) <= 320
    text = "how many <box>digits</box>? 東"
    assert loaded.encode(text) == small.encode(text)
    assert len(small.encode("digits")) < len("digits"), "it has learnt merges"
    first = len(small) - 12
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *INTERNVL_TOKENS]
    assert [loaded.find(name) for name in names] == list(range(first, first + 12))


def test_small_tokenizer_needs_room_for_bytes():
    with pytest.raises(DataError, match="vocab_size 200 is too small"):
        train_small_tokenizer(["text"], 200)


def test_the_tool_writes_the_folder(tmp_path, monkeypatch, capsys, small):
    path = Path(__file__).parents[3] / "tools" / "build_qwen_tokenizer.py"
    spec = importlib.util.spec_from_file_location("build_qwen_tokenizer", path)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(sys, "argv", ["tool", str(tmp_path / "out")])
    monkeypatch.setattr(tool, "qwen2_5_tokenizer", lambda ranks: small.hf_tokenizer)
    assert tool.main() == 0
    assert isinstance(load_tokenizer(tmp_path / "out"), FastTokenizer)
    shutil.rmtree(tmp_path / "out")

    def fail():
        raise DataError("no ranks: run `make setup`")

    monkeypatch.setattr(tool, "find_dashscope_ranks", fail)
    assert tool.main() == 1
    assert "make setup" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_same_ids_as_encoding_with_the_ranks_themselves(qwen):
    """Byte-pair encoding written from its definition, straight on the ranks file, for texts of one word."""
    lines = [line.split() for line in find_dashscope_ranks().read_bytes().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}

    def by_ranks(word):
        parts = [bytes([byte]) for byte in word.encode()]
        while True:
            pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
            if not pairs:
                return [ranks[part] for part in parts]
            _, at = min(pairs)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]

    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("etaoinshrdlu"), size=12)) for _ in range(200)]
    words += ["antidisestablishmentarianism", "Donaudampfschifffahrt", "人工智能实验室", "données", "программирование"]
    for word in words:
        assert qwen.encode(word) == by_ranks(word), word
