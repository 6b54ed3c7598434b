"""InternVL's nine tokens added to the tokenizers of bare language models."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

from internvl_megatron.data.tokenizer import INTERNVL_TOKENS, load_tokenizer
from internvl_megatron.data.tokenizer_extend import add_internvl_tokens
from internvl_megatron.errors import DataError
from tests.support.sentencepiece_folder import change_config, write_folder


def bare_folder(folder: Path, complete: Path, extra: tuple[str, ...] = ()) -> Path:
    """A fast tokenizer as the language model has it: without InternVL's tokens, then those of `extra`."""
    shutil.copytree(complete, folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    nine = [entry for entry in content["added_tokens"] if entry["content"] in INTERNVL_TOKENS]
    added = [entry for entry in content["added_tokens"] if entry not in nine]
    more = [{**nine[place], "content": name} for place, name in enumerate(extra)]
    path.write_text(json.dumps({**content, "added_tokens": [*added, *more]}), encoding="utf-8")
    change_config(folder, lambda config: config.pop("extra_special_tokens", None))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_qwens_become_the_released_ids(tmp_path, qwen_folder, qwen):
    bare = bare_folder(tmp_path / "bare", qwen_folder)
    assert "<img>" not in (bare / "tokenizer.json").read_text(encoding="utf-8")
    assert add_internvl_tokens(bare, tmp_path / "full") == 151674
    loaded = load_tokenizer(tmp_path / "full")
    assert [loaded.find(name) for name in INTERNVL_TOKENS] == list(range(151665, 151674))
    text = "<ref>图片 don't</ref><box>[[1, 2]]</box> <img> <tool_call>x</tool_call>\n\n"
    assert loaded.encode(text) == qwen.encode(text)
    assert loaded.pad_id == qwen.pad_id == 151643


def test_internlms_follow_its_pieces(tmp_path):
    bare = write_folder(tmp_path / "bare", "user_defined", True, with_nine=False)
    full = write_folder(tmp_path / "expected", "user_defined", True)
    assert add_internvl_tokens(bare, tmp_path / "full") == 429
    loaded, expected = load_tokenizer(tmp_path / "full"), load_tokenizer(full)
    assert [loaded.find(name) for name in INTERNVL_TOKENS] == list(range(420, 429))
    text = "<ref>图片</ref><box>[[1, 2]]</box> <img> </s>\n"
    assert loaded.encode(text) == expected.encode(text)
    old, new = contents(bare), contents(tmp_path / "full")
    assert old.keys() == new.keys() and {name for name in old if old[name] != new[name]} == {"tokenizer_config.json"}
    before, after = json.loads(old["tokenizer_config.json"]), json.loads(new["tokenizer_config.json"])
    assert before["added_tokens_decoder"].items() <= after["added_tokens_decoder"].items()
    assert after["additional_special_tokens"] == [*before["additional_special_tokens"], *INTERNVL_TOKENS]
    assert all(entry["special"] and not entry["lstrip"] for entry in after["added_tokens_decoder"].values())


def test_tokens_of_the_older_file_get_into_the_table(tmp_path):
    """Hugging Face reads `added_tokens.json` only where there is no table."""
    bare = write_folder(tmp_path / "bare", "user_defined", True, with_nine=False)
    change_config(bare, lambda config: config.pop("added_tokens_decoder"))
    (bare / "added_tokens.json").write_text('{"<more>": 420}')
    assert add_internvl_tokens(bare, tmp_path / "full") == 430
    table = json.loads((tmp_path / "full" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert [entry["content"] for entry in table.values()] == ["<more>", *INTERNVL_TOKENS]
    assert [entry["special"] for entry in table.values()] == [False] + [True] * 9
    assert load_tokenizer(tmp_path / "full").find("<img>") == 421


@pytest.mark.parametrize("kind", ["fast", "sentencepiece"])
def test_a_complete_tokenizer_is_copied(tmp_path, small, kind):
    source = tmp_path / "source"
    if kind == "fast":
        small.save(source)
    else:
        write_folder(source, "user_defined", True)
    assert add_internvl_tokens(source, tmp_path / "copy") == len(load_tokenizer(source))
    assert contents(tmp_path / "copy") == contents(source)


def test_the_first_of_the_nine_are_completed(tmp_path):
    bare = write_folder(tmp_path / "bare", "user_defined", True, with_nine=False)
    (bare / "added_tokens.json").write_text('{"<img>": 420, "</img>": 421}')
    assert add_internvl_tokens(bare, tmp_path / "full") == 429
    loaded = load_tokenizer(tmp_path / "full")
    assert [loaded.find(name) for name in INTERNVL_TOKENS] == list(range(420, 429))


@pytest.mark.parametrize("added", [{"</img>": 420, "<img>": 421}, {"<box>": 420}, {"<img>": 420, "<x>": 421}])
def test_another_order_is_refused(tmp_path, added):
    bare = write_folder(tmp_path / "bare", "user_defined", True, with_nine=False)
    (bare / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(DataError, match="cannot have ids in this order; start from a tokenizer without them"):
        add_internvl_tokens(bare, tmp_path / "full")
    assert not (tmp_path / "full").exists()


def test_another_order_is_refused_for_fast_tokenizers_too(tmp_path, small):
    small.save(tmp_path / "small")
    extra = ("</img>", "<img>")
    with pytest.raises(DataError, match=r"has \{'<img>': \d+, '</img>': \d+\}, so that the nine"):
        add_internvl_tokens(bare_folder(tmp_path / "bare", tmp_path / "small", extra), tmp_path / "full")


def test_wrong_folders(tmp_path, small):
    with pytest.raises(DataError, match="no such folder"):
        add_internvl_tokens(tmp_path / "missing", tmp_path / "full")
    small.save(tmp_path / "small")
    with pytest.raises(DataError, match="exists and is not an empty folder"):
        add_internvl_tokens(tmp_path / "small", tmp_path / "small")


def test_the_tool(tmp_path, monkeypatch, capsys):
    path = Path(__file__).parents[3] / "tools" / "add_internvl_tokens.py"
    spec = importlib.util.spec_from_file_location("add_internvl_tokens", path)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    bare = write_folder(tmp_path / "bare", "user_defined", True, with_nine=False)
    monkeypatch.setattr(sys, "argv", ["tool", str(bare), str(tmp_path / "full")])
    assert tool.main() == 0 and "429 tokens" in capsys.readouterr().out
    shutil.rmtree(bare)
    assert tool.main() == 1 and "no such folder" in capsys.readouterr().err
