"""Text that grows token by token is the text of all tokens together, up to the first stop string."""

import numpy as np
import pytest

from internvl_megatron.data.conversation import answer_header
from internvl_megatron.data.fast_tokenizer import FastTokenizer
from internvl_megatron.data.tokenizer import load_tokenizer
from internvl_megatron.data.tokenizer_build import train_small_tokenizer
from internvl_megatron.inference.answer_text import AnswerText
from tests.support.sentencepiece_folder import write_folder

TEXTS = ["  two\n\nlines, 3 digits ", "图片 🙂 é", "", "there are two", "\n\n", "<ref>x</ref> stop here"]


@pytest.fixture(scope="module", params=["bytes", "sentencepiece", "sentencepiece with a blank in front"])
def tokenizer(request, tmp_path_factory):
    if request.param == "bytes":
        return FastTokenizer(train_small_tokenizer(["there are two digits in the picture"], vocab_size=300), "small")
    folder = tmp_path_factory.mktemp("tokenizer")
    return load_tokenizer(write_folder(folder / "sp", "control", add_dummy_prefix="blank" in request.param))


def grown(tokenizer, ids, keep_front=False, stop_strings=(), start=""):
    text = AnswerText(tokenizer, answer_header(tokenizer, start), keep_front, stop_strings)
    pieces = []
    for token_id in ids:
        pieces.append(text.add(token_id))
        if text.is_stopped:
            break
    pieces.append(text.end())
    assert "".join(pieces) == text.text
    return text.text, pieces


@pytest.mark.parametrize("answer", TEXTS)
def test_pieces_are_the_answer(tokenizer, answer):
    header = answer_header(tokenizer)
    ids = answer_header(tokenizer, answer)[len(header) :]
    whole = tokenizer.decode([*header, *ids])[len(tokenizer.decode(header)) :]
    text, pieces = grown(tokenizer, ids)
    assert text == whole.strip()
    assert not any("\ufffd" in piece for piece in pieces), "no half characters"


def test_any_tokens(tokenizer):
    """Random tokens: bytes that are no characters, words in odd places."""
    rng = np.random.default_rng(0)
    header = answer_header(tokenizer)
    for _ in range(30):
        ids = rng.integers(0, len(tokenizer), 12).tolist()
        text, _ = grown(tokenizer, ids, keep_front=True)
        assert text.replace("\ufffd", "") == (
            tokenizer.decode([*header, *ids])[len(tokenizer.decode(header)) :].rstrip().replace("\ufffd", "")
        )


def test_a_stop_string_over_several_tokens_is_never_shown(tokenizer):
    ids = tokenizer.encode("one two. Stop it, Stop there")
    text, pieces = grown(tokenizer, ids, stop_strings=("Stop it", "there"))
    assert text == "one two."
    assert not any("S" in piece for piece in pieces)
    unstopped, _ = grown(tokenizer, tokenizer.encode("one two. Sto"), stop_strings=("Stop",))
    assert unstopped == "one two. Sto", "what might have become one is shown at the end"


def test_the_earliest_of_several_stop_strings_counts(tokenizer):
    assert grown(tokenizer, tokenizer.encode("abcabd"), stop_strings=("bd", "ca"))[0] == "ab"


def test_an_answer_goes_on_behind_its_start(tokenizer):
    start = "there are"
    both = answer_header(tokenizer, start + " two digits ")
    header = answer_header(tokenizer, start)
    if both[: len(header)] == header:
        assert start + grown(tokenizer, both[len(header) :], True, start=start)[0] == "there are two digits"
