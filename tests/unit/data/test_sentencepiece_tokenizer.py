"""InternLM3's kind of tokenizer against transformers' sentencepiece backend, and tokens that users type."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import AddedToken
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from internvl_megatron.data.conversation import Turn, render_prompt, tokenize_conversation
from internvl_megatron.data.sentencepiece_tokenizer import SentencePieceTokenizer
from internvl_megatron.data.tokenizer import GROUNDING_TOKENS, INTERNVL_TOKENS, TEMPLATE_TOKENS, load_tokenizer
from internvl_megatron.errors import DataError
from tests.support.sentencepiece_folder import change_config, write_folder

TEXTS = [
    "", " ", "hello", " lead", "  two lead", "trail  ", "a  b   c", "\n", "\n\n two\n", "\t tab", "图片里有几个数字",
    "naïve 🙂 東京\n🇪🇺", "12345 + 6", "a\u0000b", "<unk> <pad> <0x0A> <|im", "the digits", "你 好 <ref>it</ref> 🙂",
]  # fmt: skip


def reference_tokenizer(folder: Path) -> SentencePieceBackend:
    """transformers' own slow tokenizer on the same model: splits at added tokens as upstream's does."""
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer = SentencePieceBackend(
        vocab_file=str(folder / "tokenizer.model"), legacy=True, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="</s>",
    )  # fmt: skip
    names = [entry["content"] for entry in config["added_tokens_decoder"].values()]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return tokenizer


@pytest.fixture(scope="module", params=[("user_defined", True), ("user_defined", False), ("control", True)], ids=str)
def internlm_folder(request, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("internlm") / "folder", *request.param)


@pytest.fixture(scope="module")
def internlm(internlm_folder):
    return load_tokenizer(internlm_folder)


@pytest.fixture(scope="module")
def reference(internlm_folder):
    return reference_tokenizer(internlm_folder)


def test_ids_are_read_by_name(internlm, internlm_folder):
    assert isinstance(internlm, SentencePieceTokenizer)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(internlm_folder / "tokenizer.model"))
    size = pieces.get_piece_size()
    assert len(internlm) == size + 9 == 429
    assert (internlm.bos_id, internlm.pad_id) == (1, 2)
    assert [internlm.find(name) for name in INTERNVL_TOKENS] == list(range(size, size + 9))
    assert internlm.turn_start_id == pieces.piece_to_id("<|im_start|>") < size
    assert internlm.turn_end_id == pieces.piece_to_id("<|im_end|>") == internlm.turn_start_id + 1
    assert internlm.find("<|endoftext|>") is None and internlm.find("no such piece") is None


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_encoded_as_by_transformers_and_comes_back(internlm, reference, text):
    ids = internlm.encode(text)
    if "<unk>" not in text:  # upstream takes a typed `<unk>` for the token
        assert ids == reference(text, add_special_tokens=False).input_ids
    assert internlm.decode(ids) == text


def test_grounding_tokens_are_tokens_and_every_part_is_encoded_by_itself(internlm, reference, internlm_folder):
    text = "<ref>the cat</ref><box>[[1, 2, 3, 4]]</box> <quad>5</quad>\n"
    ids = internlm.encode(text)
    assert ids == reference(text, add_special_tokens=False).input_ids
    assert [i for i in ids if i >= 420] == [425, 426, 427, 428, 423, 424]
    assert internlm.decode(ids) == text
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(internlm_folder / "tokenizer.model"))
    assert ids[: ids.index(426)] == [425, *pieces.encode("the cat")]
    assert internlm.decode(ids, skip_special_tokens=True) == "the cat[[1, 2, 3, 4]] 5\n"


def test_typed_special_tokens_are_text(internlm, internlm_folder):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(internlm_folder / "tokenizer.model"))
    names = ("<s>", "</s>", "<unk>", *TEMPLATE_TOKENS)
    special = {internlm.find(name) for name in names}
    assert len(special) == len(names) and None not in special
    for name in names:
        text = f"x{name}{name} y\n {name}"
        ids = internlm.encode(text)
        assert not special & set(ids), name
        assert internlm.decode(ids) == text
    if not pieces.is_control(internlm.turn_end_id):
        # What is prevented: the model itself finds its user-defined pieces in any text.
        assert internlm.turn_end_id in pieces.encode("x<|im_end|>")


def test_typed_special_tokens_are_tokens_if_asked_for(internlm, reference):
    """As in upstream's tokenizer, which encodes every part between them by itself."""
    for text in ("a<|im_end|>\n<|im_start|>user", "<img><IMG_CONTEXT></img> x <box>[1]</box>", "plain", "</s>b"):
        expected = reference(text, add_special_tokens=False).input_ids
        assert internlm.encode_with_special_tokens(text) == expected


def test_added_tokens_that_are_not_special_stay_tokens(tmp_path):
    folder = write_folder(tmp_path / "folder", "user_defined", True)
    change_config(folder, lambda config: config["added_tokens_decoder"].update(
        {"429": {"content": "<tool>", "special": False}, "430": {"content": "<tool>s", "special": False}}
    ))  # fmt: skip
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("a<tool>b<tool>s")
    assert len(tokenizer) == 431 and [i for i in ids if i >= 420] == [429, 430]
    assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == "a<tool>b<tool>s"


def test_ids_that_nothing_has_are_left_out_of_the_text(internlm):
    assert internlm.decode([*internlm.encode("one"), 5000, *internlm.encode("<box>")]) == "one<box>"


def rendered(turns: list[Turn], context: str) -> list[str]:
    names = {"system": "system", "human": "user", "gpt": "assistant"}
    texts = [turn.text.replace("<image>", context) if turn.role == "human" else turn.text for turn in turns]
    return [f"<|im_start|>{names[t.role]}\n{x}<|im_end|>\n" for t, x in zip(turns, texts, strict=True)]


def test_template_starts_with_bos_once(internlm, reference):
    turns = [
        Turn("system", "Sei kurz."), Turn("human", "<image>\nhow many <ref>digits</ref>? <image> 图片"),
        Turn("gpt", " three\n"), Turn("human", "and?"), Turn("gpt", "<box>[[1, 2, 3, 4]]</box> <image>"),
    ]  # fmt: skip
    result = tokenize_conversation(turns, [3, 3], internlm)
    # Independent: transformers tokenizes each rendered turn as a whole; labels by counting from both ends.
    header = len(reference("<|im_start|>assistant\n", add_special_tokens=False).input_ids)
    footer = len(reference("\n", add_special_tokens=False).input_ids)
    ids, labels = [1], [-100]
    for turn, text in zip(turns, rendered(turns, "<img>" + "<IMG_CONTEXT>" * 3 + "</img>"), strict=True):
        turn_ids = reference(text, add_special_tokens=False).input_ids
        ids += turn_ids
        is_answer = turn.role == "gpt"
        trained = [is_answer and header <= place < len(turn_ids) - footer for place in range(len(turn_ids))]
        labels += [i if train else -100 for i, train in zip(turn_ids, trained, strict=True)]
    assert result.token_ids.tolist() == ids and ids.count(1) == 1
    assert result.labels.tolist() == labels
    context = [internlm.image_start_id, *[internlm.image_context_id] * 3, internlm.image_end_id]
    assert len(result.image_starts) == 2
    for start in result.image_starts.tolist():
        assert ids[start - 1 : start + 4] == context
    answers = internlm.decode([i for i in labels if i != -100])
    # A space that starts a run of pieces cannot be told from the dummy prefix.
    assert answers.lstrip() == "three\n<|im_end|><box>[[1, 2, 3, 4]]</box> <image><|im_end|>"
    assert internlm.decode(ids[1:]) == "".join(rendered(turns, "".join(map(internlm.decode, [[i] for i in context]))))


def test_prompt_is_the_training_conversation_up_to_the_answer(internlm):
    history = [Turn("human", "<image>\nwhat?"), Turn("gpt", "a cat"), Turn("human", "where?")]
    prompt = render_prompt(history, [4], internlm)
    trained = tokenize_conversation([*history, Turn("gpt", "there")], [4], internlm)
    ids = prompt.token_ids.tolist()
    assert ids == trained.token_ids.tolist()[: len(ids)]
    assert ids[0] == 1 and ids.count(1) == 1 and ids.count(internlm.turn_start_id) == 5
    assert (prompt.labels == -100).all() and prompt.image_starts.tolist() == trained.image_starts.tolist()


def test_bos_is_left_out_when_the_folder_says_so(tmp_path, internlm_folder):
    folder = shutil.copytree(internlm_folder, tmp_path / "folder")
    turns = [Turn("human", "a"), Turn("gpt", "b")]
    with_bos = tokenize_conversation(turns, [], load_tokenizer(folder)).token_ids.tolist()
    change_config(folder, lambda config: config.update(add_bos_token=False))
    assert tokenize_conversation(turns, [], load_tokenizer(folder)).token_ids.tolist() == with_bos[1:]
    change_config(folder, lambda config: config.pop("add_bos_token"))
    assert load_tokenizer(folder).bos_id == 1  # upstream's default


def test_added_tokens_file_gives_ids_too(tmp_path, internlm_folder, internlm):
    folder = shutil.copytree(internlm_folder, tmp_path / "folder")
    ids = {name: internlm.find(name) for name in INTERNVL_TOKENS}
    change_config(folder, lambda config: [config["added_tokens_decoder"].pop(str(i)) for i in ids.values()])
    with pytest.raises(DataError, match="has no token '<img>'; use an InternVL tokenizer, or add"):
        load_tokenizer(folder)
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    loaded = load_tokenizer(folder)
    assert {name: loaded.find(name) for name in INTERNVL_TOKENS} == ids and len(loaded) == len(internlm)
    assert loaded.encode("<img><box>x") == internlm.encode("<img><box>x")


def test_saved_folder_is_the_same_tokenizer(tmp_path, internlm, internlm_folder):
    internlm.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode("the cat <box>") == internlm.encode("the cat <box>")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == sorted(p.name for p in internlm_folder.iterdir())


def table(key: str, **entry):
    """An edit: an entry of `added_tokens_decoder`."""
    return lambda config: config["added_tokens_decoder"].update({key: {"content": "<new>", "special": True, **entry}})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (table("300"), r"tokenizer_config\.json: '<new>' has the id 300 of '.*'; the files are of different tokenizers"),
        (table("0420"), r"'<new>' has the id 420 of '<img>'"),
        (table("500", content="<box>"), r"'<box>' has the id 500, but 427 in another place"),
        (table("501", content="</s>"), r"'</s>' has the id 501, but 2 in another place"),
        (table("x"), r"'<new>' has the id 'x', which is not a number"),
        (table("429", lstrip=True), r"added_tokens_decoder\[429\]: '<new>' has lstrip"),
        (table("429", content=None), r"added_tokens_decoder\[429\]: content: must be a str"),
        (lambda config: config.update(added_tokens_decoder=[1]), "added_tokens_decoder: must be a dict"),
        (lambda config: config["added_tokens_decoder"].update({"429": 1}), r"decoder\[429\]: must be a dict"),
        (lambda config: config.update(additional_special_tokens="<img>"), "additional_special_tokens: must be a list"),
        (lambda config: config.update(pad_token=7), "pad_token: must be a str"),
        (lambda config: config.pop("pad_token"), "names no padding token; set pad_token in tokenizer_config.json"),
        (lambda config: config.update(bos_token="<start>"), "has no token '<start>'"),
        (lambda config: config.update(add_bos_token="yes"), "add_bos_token: must be a bool"),
        (lambda config: config.update(add_eos_token=True), "add_eos_token is not provided for"),
        (lambda config: config.update(sp_model_kwargs={"enable_sampling": True}), "sp_model_kwargs are not provided"),
    ],
)  # fmt: skip
def test_wrong_configurations(tmp_path, internlm_folder, edit, message):
    folder = shutil.copytree(internlm_folder, tmp_path / "folder")
    change_config(folder, edit)
    with pytest.raises(DataError, match=message):
        load_tokenizer(folder)


def test_broken_files(tmp_path, internlm_folder):
    folder = shutil.copytree(internlm_folder, tmp_path / "folder")
    (folder / "added_tokens.json").write_text('{"<img>": 600}')
    with pytest.raises(DataError, match=r"added_tokens\.json: '<img>' has the id 600, but 420 in another place"):
        load_tokenizer(folder)
    (folder / "added_tokens.json").write_text("[]")
    with pytest.raises(DataError, match=r"added_tokens\.json: must be a dict"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: is not JSON"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer_config\.json: cannot be read .* copy all files"):
        load_tokenizer(folder)
    for content in (b"version https://git-lfs.github.com/spec/v1\n", b""):
        (folder / "tokenizer.model").write_bytes(content)
        with pytest.raises(DataError, match=r"tokenizer\.model: is not a sentencepiece model .* Git LFS"):
            load_tokenizer(folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(DataError, match=r"has none of tokenizer\.json, vocab\.json and tokenizer\.model; copy all"):
        load_tokenizer(folder)


def test_a_model_without_an_unknown_piece_is_refused(tmp_path, internlm_folder):
    folder = shutil.copytree(internlm_folder, tmp_path / "folder")
    library: Any = sentencepiece_model_pb2  # its classes are made at run time
    model = library.ModelProto()
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    for piece in model.pieces:
        if piece.type == piece.UNKNOWN:
            piece.type = piece.NORMAL
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match=r"tokenizer\.model: has no piece of type UNKNOWN"):
        load_tokenizer(folder)


def test_a_fast_tokenizer_comes_first(tmp_path, internlm_folder, small):
    folder = shutil.copytree(internlm_folder, tmp_path / "folder")
    small.save(folder)
    assert len(load_tokenizer(folder)) == len(small)


def test_grounding_names_hold_no_space_that_a_dummy_prefix_could_change(internlm):
    assert [internlm.encode(name) for name in GROUNDING_TOKENS] == [[i] for i in range(423, 429)]
