"""What an attack on the converters has found: wrong results without a word, and tracebacks instead of messages."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoint_convert.__main__ import main
from internvl_megatron.data.tokenizer import load_tokenizer
from tests.support.huggingface_folders import edit_json, load_tensors, write_tensors

ROOT = Path(__file__).resolve().parents[3]


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture
def ours(chat_folder, tmp_path):
    assert run("hf-to-megatron", chat_folder(), tmp_path / "ours") == 0
    return tmp_path / "ours"


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("native", {"text_config__rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}}, "linear"),
        ("chat", {"llm_config__rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ("chat", {"llm_config__rope_scaling": "dynamic"}, "rope_scaling is 'dynamic'"),
        ("chat", {"ps_version": None}, "ps_version is missing"),
        ("chat", {"vision_config__norm_type": None}, "norm_type is missing"),
        ("chat", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("chat", {"downsample_ratio": 1e-30}, "shuffle_factor"),
        ("chat", {"downsample_ratio": 0.3}, "not one over a whole number"),
        ("chat", {"llm_config__rope_theta": 10**400}, "must be a number above 0"),
        ("chat", {"llm_config__rms_norm_eps": -1}, "must be a number above 0"),
        ("chat", {"llm_config__rms_norm_eps": float("nan")}, "must be a number above 0"),
        ("chat", {"vision_config__num_attention_heads": 0}, "num_attention_heads must be 1 to"),
        ("chat", {"vision_config__num_attention_heads": 7}, "model.vision.hidden_size must be a multiple of"),
        ("chat", {"llm_config__num_key_value_heads": 3}, "must be a multiple of model.language.num_kv_heads"),
        ("chat", {"llm_config__num_hidden_layers": 10**6}, "num_layers must be at most"),
        ("chat", {"llm_config__model_type": None, "llm_config__architectures": 5}, "supported are qwen2"),
        ("chat", {"llm_config": [1]}, "llm_config is [1]"),
        ("native", {"vision_config__image_size": [28, 35]}, "image_size"),
    ],
)  # fmt: skip
def test_configurations_that_are_not_what_is_computed(chat_folder, native_folder, capsys, layout, changes, message):
    folder = (chat_folder if layout == "chat" else native_folder)()
    edit_json(folder / "config.json", **changes)
    assert run("inspect", folder) == 2
    assert message in capsys.readouterr().err


def test_deeply_nested_json(chat_folder, ours):
    nested = "[" * 100000
    folder = chat_folder("6b")
    for path in (folder / "config.json", ours / "model.json"):
        path.write_text(nested)
        assert run("inspect", path.parent) == 2


def test_a_tied_flag_without_any_table(native_folder, capsys):
    folder = native_folder()
    tensors = load_tensors(folder)
    write_tensors(
        folder, {name: t for name, t in tensors.items() if "lm_head" not in name and "embed_tokens" not in name}, 1
    )
    edit_json(folder / "config.json", tie_word_embeddings=True)
    assert run("inspect", folder) == 2
    assert "missing   language_model.model.embed_tokens.weight" in capsys.readouterr().err


def test_tensor_names_with_terminal_codes(chat_folder, capsys):
    folder = chat_folder()
    write_tensors(folder, load_tensors(folder) | {"a\nb\x1b[31m": torch.zeros(1)}, 1)
    assert run("inspect", folder) == 2
    assert "'a\\nb\\x1b[31m'" in capsys.readouterr().err


@pytest.mark.parametrize("target", [".", "/", "x" * 300, "nul\0"])
def test_targets_that_cannot_be(chat_folder, target, capsys):
    assert run("hf-to-megatron", chat_folder(), target) == 2
    assert "checkpoint_convert: " in capsys.readouterr().err


def test_targets_that_are_links(chat_folder, tmp_path):
    source = chat_folder()
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "dangling").symlink_to(tmp_path / "later")
    for name, place in (("link", "disk"), ("dangling", "later")):
        assert run("hf-to-megatron", source, tmp_path / name) == 0
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / place / "model.json").is_file()


def test_a_relative_path_is_the_same_conversion(chat_folder, tmp_path, monkeypatch, capsys):
    source = chat_folder()
    assert run("megatron-to-hf", source, tmp_path / "out", "--layout", "transformers") == 0
    monkeypatch.chdir(tmp_path)
    assert run("megatron-to-hf", source.name, "out", "--layout", "transformers") == 0
    assert "is there" in capsys.readouterr().out


def test_done_is_said_only_of_what_is_whole_and_the_same(chat_folder, tmp_path, capsys):
    source = chat_folder()
    assert run("hf-to-megatron", source, tmp_path / "ours") == 0
    edit_json(source / "tokenizer_config.json", model_max_length=77)
    assert run("hf-to-megatron", source, tmp_path / "ours") == 2, "another tokenizer is another conversion"
    edit_json(source / "tokenizer_config.json", model_max_length=None)
    assert run("hf-to-megatron", source, tmp_path / "again") == 0
    next((tmp_path / "again").glob("*.safetensors")).unlink()
    assert run("hf-to-megatron", source, tmp_path / "again") == 2
    assert "files are missing now" in capsys.readouterr().err


def test_a_source_that_changes_meanwhile(chat_folder, tmp_path, monkeypatch, capsys):
    from checkpoint_convert.sources import HuggingFaceSource

    source, read, calls = chat_folder(), HuggingFaceSource.read, []

    def read_and_touch(self, name):
        calls.append(name)
        if len(calls) == 30:
            os.utime(source / "model.safetensors", (1, 1))
        return read(self, name)

    monkeypatch.setattr(HuggingFaceSource, "read", read_and_touch)
    assert run("hf-to-megatron", source, tmp_path / "ours") == 2
    assert "has changed while it was converted" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_a_failed_export_leaves_nothing_for_the_next(chat_folder, ours, tmp_path):
    wrong = tmp_path / "wrong"
    shutil.copytree(ours / "huggingface", wrong)
    (wrong / "modeling_evil.py").write_text("raise SystemExit")
    edit_json(wrong / "config.json", llm_config__max_position_embeddings="x")
    assert run("megatron-to-hf", ours, tmp_path / "out", "--layout", "internvl-chat", "--companions", wrong) == 2
    assert not (tmp_path / "out.partial").exists()
    assert run("megatron-to-hf", ours, tmp_path / "out", "--layout", "internvl-chat") == 0
    assert not (tmp_path / "out" / "modeling_evil.py").exists()


KILLED_WHILE_PREPARING = """
import os, sys
from checkpoint_convert import companions
keep = companions.keep
companions.keep = lambda *arguments: (keep(*arguments), os._exit(9))
from checkpoint_convert.__main__ import main
main(sys.argv[1:])
"""


def test_interrupted_while_preparing_it_starts_again(chat_folder, tmp_path):
    source = chat_folder()
    command = [sys.executable, "-c", KILLED_WHILE_PREPARING, "hf-to-megatron", str(source), str(tmp_path / "ours")]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 9
    assert (tmp_path / "ours.partial" / "huggingface").is_dir()
    assert run("hf-to-megatron", source, tmp_path / "ours") == 0


def test_companions_of_another_model(ours, internlm_like_tokenizer, native_folder, tmp_path, capsys):
    export = ("megatron-to-hf", ours, tmp_path / "out", "--layout", "transformers", "--companions")
    assert run(*export, internlm_like_tokenizer) == 2
    assert "has 429 tokens, the model's vocabulary is 290" in capsys.readouterr().err
    other = native_folder("internlm")
    edit_json(other / "config.json", text_config__vocab_size=431)
    assert (
        run(
            "megatron-to-hf",
            native_folder("internlm", True),
            tmp_path / "out",
            "--layout",
            "transformers",
            "--companions",
            other,
        )
        == 2
    )
    assert "is of a model with a vocabulary of 431" in capsys.readouterr().err
    assert run(*export, tmp_path / "nowhere") == 2


def test_companions_of_the_same_vocabulary_but_other_sizes_do_not_describe_the_export(native_folder, tmp_path):
    source, other = native_folder(), tmp_path / "other"
    shutil.copytree(source, other)
    edit_json(
        other / "config.json",
        text_config__head_dim=32,
        text_config__rope_parameters={"rope_theta": 7.0, "rope_type": "default"},
    )
    assert run("megatron-to-hf", source, tmp_path / "out", "--layout", "transformers", "--companions", other) == 0
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert (text["rope_theta"], text.get("head_dim", 16)) == (1e6, 16)
    assert run("check", source, tmp_path / "out") == 0


def test_an_image_token_that_is_not_the_tokenizers(native_folder, tmp_path, capsys):
    folder = native_folder()
    edit_json(folder / "config.json", image_token_id=5)
    assert run("megatron-to-hf", folder, tmp_path / "out", "--layout", "transformers") == 2
    assert "image_token_id is 5" in capsys.readouterr().err


def test_values_too_large_for_fp16(chat_folder, tmp_path, capsys):
    folder = chat_folder()
    tensors = {name: torch.ones(tensor.shape) for name, tensor in load_tensors(folder).items()}
    tensors["mlp1.3.bias"][0] = 1e5
    write_tensors(folder, tensors, 1)
    assert run("megatron-to-hf", folder, tmp_path / "out", "--layout", "internvl-chat", "--dtype", "fp16") == 2
    assert "mlp1.3.bias: has values too large" in capsys.readouterr().err
    assert run("megatron-to-hf", folder, tmp_path / "out2", "--layout", "internvl-chat", "--dtype", "bf16") == 0


@pytest.mark.parametrize(
    "given", [{"eos_token_id": 3, "temperature": 0.7}, {"eos_token_id": [3, 4]}, {"do_sample": False}]
)
@pytest.mark.parametrize("layout", ["internvl-chat", "transformers"])
def test_an_answer_ends_where_its_turn_ends(chat_folder, tmp_path, given, layout):
    folder = chat_folder()
    (folder / "generation_config.json").write_text(json.dumps(given))
    assert run("megatron-to-hf", folder, tmp_path / "out", "--layout", layout) == 0
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    ends = written["eos_token_id"] if isinstance(written["eos_token_id"], list) else [written["eos_token_id"]]
    assert load_tokenizer(folder).turn_end_id in ends
    assert set(ends) >= set(given.get("eos_token_id", []) if isinstance(given.get("eos_token_id", []), list) else [3])
    assert written.get("temperature") == given.get("temperature")


def test_a_tokenizer_that_transformers_has_saved_again(chat_folder, tmp_path):
    """transformers 5 writes the special tokens as a list where the names of the image tokens go."""
    from transformers import AutoProcessor

    folder = chat_folder()
    edit_json(folder / "tokenizer_config.json", extra_special_tokens=["<img>", "</img>"])
    assert run("megatron-to-hf", folder, tmp_path / "out", "--layout", "transformers") == 0
    processor = AutoProcessor.from_pretrained(str(tmp_path / "out"), local_files_only=True)
    assert processor.image_token_id == load_tokenizer(folder).image_context_id


@pytest.mark.parametrize(
    "content", ["null", "{}", '{"model": {"type": "Nothing"}}', '{"model": 3}', "version https://git-lfs"]
)
def test_tokenizers_that_are_none(chat_folder, tmp_path, content, capsys):
    folder = chat_folder()
    (folder / "tokenizer.json").write_text(content)
    assert run("megatron-to-hf", folder, tmp_path / "out", "--layout", "transformers") == 2
    assert "tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out.partial").exists()


def test_licences_and_tiles_go_across(chat_folder, tmp_path):
    folder = chat_folder()
    (folder / "LICENSE").write_text("mine")
    edit_json(folder / "config.json", max_dynamic_patch=6)
    assert run("megatron-to-hf", folder, tmp_path / "native", "--layout", "transformers") == 0
    assert (tmp_path / "native" / "LICENSE").read_text() == "mine"
    assert json.loads((tmp_path / "native" / "preprocessor_config.json").read_text())["max_patches"] == 6
    assert run("megatron-to-hf", tmp_path / "native", tmp_path / "chat", "--layout", "internvl-chat") == 0
    assert json.loads((tmp_path / "chat" / "config.json").read_text())["max_dynamic_patch"] == 6


@pytest.mark.parametrize("form", ["own file", "all in one"])
def test_a_runs_own_tiles_replace_the_sources(native_folder, tmp_path, form):
    """Also where the layout is the same and the processor settings are copied."""
    from checkpoint_convert.companions import write_export
    from checkpoint_convert.sources import open_source

    folder = native_folder()
    assert run("megatron-to-hf", folder, tmp_path / "source", "--layout", "transformers") == 0
    if form == "all in one":  # as transformers 5 saves a processor
        from transformers import AutoProcessor

        AutoProcessor.from_pretrained(str(tmp_path / "source")).save_pretrained(str(tmp_path / "source"))
        (tmp_path / "source" / "preprocessor_config.json").unlink()
        (tmp_path / "source" / "video_preprocessor_config.json").unlink()
    (tmp_path / "out").mkdir()
    model = open_source(tmp_path / "source").model
    write_export(tmp_path / "out", model, "transformers", "bfloat16", tmp_path / "source", "a run", max_tiles=5)
    from transformers import AutoProcessor

    assert AutoProcessor.from_pretrained(str(tmp_path / "out")).image_processor.max_patches == 5


def test_rows_that_pad_the_vocabulary_are_no_difference(ours, tmp_path):
    tensors = load_tensors(ours)
    tensors["language.output_layer.weight"][290:] = 0.5
    (path,) = ours.glob("*.safetensors")
    write_tensors(tmp_path, tensors, 1)
    shutil.move(tmp_path / "model.safetensors", path)
    assert run("megatron-to-hf", ours, tmp_path / "out", "--layout", "internvl-chat") == 0
    assert run("check", ours, tmp_path / "out") == 0


def test_internlm_tokenizer_gives_the_same_ids_in_transformers(chat_folder, tmp_path):
    from transformers import AutoTokenizer

    folder = chat_folder("internlm")
    assert run("megatron-to-hf", folder, tmp_path / "native", "--layout", "transformers") == 0
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "native"), local_files_only=True)
    mine = load_tokenizer(folder)
    for text in ("how many", "two  spaces", "a\n\nb", "图片"):
        assert theirs(text, add_special_tokens=False).input_ids == mine.encode(text)


@pytest.mark.parametrize("option", [("--tile-pixels", "28"), ("--seed", "1"), ("--tokenizer", ".")])
def test_options_of_a_pair_need_a_pair(chat_folder, tmp_path, option):
    assert run("hf-to-megatron", chat_folder(), tmp_path / "out", *option) == 2


def test_model_files_with_impossible_numbers(ours):
    path = ours / "model.json"
    before = path.read_text()
    for name, value in (("num_heads", 0), ("patch_pixels", 0), ("vocab_size", 10**30), ("norm_eps", 10**400)):
        content = json.loads(before)
        section = "language" if name == "vocab_size" else "vision"
        content["model"][section][name] = value
        path.write_text(json.dumps(content))
        assert run("inspect", ours) == 2


def test_check_looks_at_its_inputs_first(chat_folder, ours, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no image")
    for image in ("nowhere.png", "text.png"):
        assert run("check", ours, ours, "--image", tmp_path / image) == 2
    shutil.rmtree(ours / "huggingface")
    capsys.readouterr()
    assert run("check", ours, chat_folder("6b"), "--prompt", "?") == 2
    shown = capsys.readouterr()
    assert "has no tokenizer beside it" in shown.err
    assert shown.out == ""


def test_sources_that_are_something_else(chat_folder, ours, tmp_path, capsys):
    source = chat_folder("6b")
    assert run("inspect", source / "model.safetensors") == 2
    assert "is a file; give the folder it is in" in capsys.readouterr().err
    shutil.copytree(ours, tmp_path / "x.partial")
    assert run("inspect", tmp_path / "x.partial") == 2
    assert "is a conversion that is not finished" in capsys.readouterr().err


def test_import_without_tokenizer_says_so(chat_folder, tmp_path, capsys):
    source = chat_folder()
    for path in source.glob("tokenizer*"):
        path.unlink()
    assert run("hf-to-megatron", source, tmp_path / "out") == 0
    assert "no tokenizer beside it" in capsys.readouterr().err
    assert run("inspect", tmp_path / "out") == 0
    assert "tokenizer   none" in capsys.readouterr().out


def test_files_are_kept_only_if_they_are_what_they_are_called(chat_folder, tmp_path, capsys):
    folder = chat_folder()
    Path(folder / "generation_config.json").write_text("not json")
    assert run("hf-to-megatron", folder, tmp_path / "out") == 2
    assert "generation_config.json: is not valid JSON" in capsys.readouterr().err
