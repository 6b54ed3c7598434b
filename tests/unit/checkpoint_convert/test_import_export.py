"""There and back through the command line, in both layouts, and every way a source can be wrong."""

import json
import shutil
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from checkpoint_convert.__main__ import main
from checkpoint_convert.hf_config import read_json, read_model
from internvl_megatron.errors import CheckpointError
from tests.support.huggingface_folders import edit_json, load_tensors, same_bits, write_json, write_tensors

KINDS = ["300m", "6b", "internlm"]
LAYOUTS = ["internvl-chat", "transformers"]


def run(*arguments):
    return main([str(argument) for argument in arguments])


def assert_same(one, other):
    first, second = load_tensors(one), load_tensors(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not same_bits(first[name], second[name])] == []


@pytest.fixture
def folder_of(chat_folder, native_folder):
    return lambda kind, layout: (chat_folder if layout == "internvl-chat" else native_folder)(kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("file_gb", ["5", "0.00002"])
def test_there_and_back_changes_no_bit(folder_of, tmp_path, kind, layout, file_gb):
    source = folder_of(kind, layout)
    assert run("hf-to-megatron", source, tmp_path / "ours", "--file-gb", file_gb) == 0
    assert run("megatron-to-hf", tmp_path / "ours", tmp_path / "back", "--layout", layout, "--file-gb", file_gb) == 0
    assert_same(source, tmp_path / "back")
    num_files = len(list((tmp_path / "back").glob("*.safetensors")))
    assert (num_files == 1) == (file_gb == "5")
    # What is not tensors is the source's own, but for the fields that say what the export is.
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back"))
    changed = {name for name in before if before[name] != after.get(name)}
    assert changed <= {"text_config", "llm_config", "vision_config", "auto_map"}, changed
    for section in ("text_config", "llm_config", "vision_config"):
        for name, value in before.get(section, {}).items():
            assert after[section][name] == value or value is None, (section, name)


@pytest.mark.parametrize("kind", KINDS)
def test_across_the_layouts_and_back(chat_folder, tmp_path, kind):
    source = chat_folder(kind)
    assert run("megatron-to-hf", source, tmp_path / "native", "--layout", "transformers") == 0
    assert run("hf-to-megatron", tmp_path / "native", tmp_path / "ours") == 0
    assert run("megatron-to-hf", tmp_path / "ours", tmp_path / "back", "--layout", "internvl-chat") == 0
    assert_same(source, tmp_path / "back")
    assert run("check", source, tmp_path / "back") == 0


def test_names_in_memory_are_read_too(native_folder, tmp_path, capsys):
    on_disk, in_memory = native_folder(), native_folder(in_memory_names=True)
    assert "lm_head.weight" in load_tensors(in_memory)
    assert run("check", on_disk, in_memory) == 0
    assert "parameters are equal bit for bit" in capsys.readouterr().out


def test_several_files_with_an_index(chat_folder, tmp_path):
    source = chat_folder("6b", num_files=3)
    assert run("hf-to-megatron", source, tmp_path / "ours") == 0
    assert run("check", source, tmp_path / "ours") == 0


def test_number_formats_are_kept_or_chosen(chat_folder, tmp_path, capsys):
    source = chat_folder()
    tensors = {
        name: torch.full(tensor.shape, 1.25, dtype=torch.float16) for name, tensor in load_tensors(source).items()
    }
    tensors["mlp1.1.bias"] = torch.full(tensors["mlp1.1.bias"].shape, 1 / 3)
    write_tensors(source, tensors, 1)
    assert run("megatron-to-hf", source, tmp_path / "same", "--layout", "internvl-chat") == 0
    assert_same(source, tmp_path / "same")
    assert run("megatron-to-hf", source, tmp_path / "other", "--layout", "internvl-chat", "--dtype", "bf16") == 0
    other = load_tensors(tmp_path / "other")
    assert {tensor.dtype for tensor in other.values()} == {torch.bfloat16}
    assert torch.equal(other["mlp1.1.bias"], tensors["mlp1.1.bias"].bfloat16())
    assert json.loads((tmp_path / "other" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert run("check", source, tmp_path / "other") == 1
    shown = capsys.readouterr().out
    assert "torch.float16 and torch.bfloat16, largest difference 0, by rounding" in shown
    assert "69 are the same values, rounded to another number format" in shown


def test_check_finds_one_changed_value(chat_folder, tmp_path, capsys):
    one, other = chat_folder(), tmp_path / "other"
    shutil.copytree(one, other)
    tensors = load_tensors(other)
    tensors["language_model.model.layers.2.self_attn.k_proj.weight"][3, 5] = 7.0
    write_tensors(other, tensors, 1)
    assert run("check", one, other) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "language.decoder.layers.2.self_attention.linear_qkv.weight"
    ]
    edit_json(other / "config.json", llm_config__rope_theta=5.0)
    assert run("check", one, other) == 1
    assert "setting language.rope_theta: 1000000.0 -> 5.0" in capsys.readouterr().out


def test_inspect_describes(chat_folder, native_folder, tmp_path, capsys):
    run("hf-to-megatron", chat_folder("internlm"), tmp_path / "ours")
    capsys.readouterr()
    for path, words in (
        (
            tmp_path / "ours",
            ["converted weights", "internlm, 4 layers of 64, 4/2 heads of 16", "none of the released"],
        ),
        (native_folder("6b"), ["layout transformers", "rms_norm, qk-norm", "bfloat16"]),
    ):
        assert run("inspect", path) == 0
        shown = capsys.readouterr().out
        assert [word for word in words if word not in shown] == []


@pytest.mark.parametrize("kind", ["300m", "internlm"])
def test_configuration_is_read_as_written(chat_folder, native_folder, models, kind):
    for folder in (chat_folder(kind), native_folder(kind)):
        read = read_model(read_json(folder / "config.json"))
        assert replace(read, vision=replace(read.vision, drop_path_rate=0.0)) == models[kind]


# What can be wrong with a source: (how to spoil it, what the message names).


def spoil_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 10**12) + b"{}")


def spoil_truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def spoil_dtype(folder):
    tensors = load_tensors(folder)
    tensors["mlp1.1.weight"] = tensors["mlp1.1.weight"].view(torch.int16)
    write_tensors(folder, tensors, 1)


def spoil_mixture(folder):
    tensors = load_tensors(folder)
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].float()
    write_tensors(folder, tensors, 1)


def spoil_missing_tensor(folder):
    tensors = load_tensors(folder)
    del tensors["vision_model.encoder.layers.1.ls2"], tensors["mlp1.0.bias"]
    write_tensors(folder, tensors, 1)


def spoil_missing_head(folder):
    tensors = load_tensors(folder)
    del tensors["language_model.lm_head.weight"]
    write_tensors(folder, tensors, 1)


def spoil_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def spoil_config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def spoil_json(folder):
    (folder / "config.json").write_text("{")


WRONG = {
    "truncated": (spoil_truncate, r"model\.safetensors: not a whole safetensors file"),
    "broken header": (spoil_header, r"model\.safetensors: not a whole safetensors file"),
    "quantised": (spoil_dtype, r"1 tensors have another number format.*\n +mlp1\.1\.weight is I16"),
    "mixed formats": (spoil_mixture, r"q_proj\.weight is F32\n.*k_proj\.weight is BF16"),
    "missing tensors": (spoil_missing_tensor, r"2 tensors do not fit.*\n +missing +vision_model.*ls2.*\n +missing +mlp1\.0\.bias"),
    "head missing": (spoil_missing_head, r"lm_head\.weight.*"),
    "pickled": (spoil_pickle, r"pickled weights \(pytorch_model\.bin\), which can run code"),
    "not JSON": (spoil_json, r"config\.json: is not valid JSON"),
    "swapped vision": (
        spoil_config(vision_config__norm_type="rms_norm", vision_config__qk_normalization=True, vision_config__qkv_bias=False),
        r"missing +vision_model\.encoder\.layers\.0\.attn\.q_norm\.weight(.|\n)*unknown +vision_model\.encoder\.layers\.0\.norm1\.bias",
    ),
    "other width": (spoil_config(llm_config__intermediate_size=48), r"mis-shaped language_model.*gate_proj\.weight: \[96, 64\], the model has \[48, 64\]"),
    "no theta": (spoil_config(llm_config__rope_theta=None), r"config\.json: llm_config\.rope_theta is missing"),
    "theta a text": (spoil_config(llm_config__rope_theta="1e6"), r"llm_config\.rope_theta is '1e6'"),
    "other model": (spoil_config(model_type="llava"), r"model_type is 'llava', neither 'internvl_chat'"),
    "a part": (spoil_config(model_type="qwen2"), r"hf-to-megatron takes it as --language"),
    "other language": (spoil_config(llm_config__model_type="phi3"), r"llm_config\.model_type is 'phi3'; supported are qwen2"),
    "other shuffle": (spoil_config(ps_version="v1"), r"ps_version is 'v1', only 'v2' is supported"),
    "lora": (spoil_config(use_llm_lora=128), r"use_llm_lora is 128.*merge the LoRA"),
    "other layer": (spoil_config(select_layer=-2), r"select_layer is -2"),
    "tanh": (spoil_config(vision_config__hidden_act="gelu_pytorch_tanh"), r"vision_config\.hidden_act is 'gelu_pytorch_tanh'"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_sources_are_refused(chat_folder, tmp_path, capsys, what):
    spoil, message = WRONG[what]
    folder = chat_folder()
    spoil(folder)
    assert run("hf-to-megatron", folder, tmp_path / "ours") == 2
    import re

    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "ours").exists()
    assert not (tmp_path / "ours.partial").exists()


def test_missing_shard_and_disagreeing_index(chat_folder, tmp_path, capsys):
    folder = chat_folder("6b", num_files=3)
    second = folder / "model-00002-of-00003.safetensors"
    content = second.read_bytes()
    second.unlink()
    assert run("inspect", folder) == 2
    assert "names 1 files that are not there (model-00002-of-00003.safetensors)" in capsys.readouterr().err
    second.write_bytes((folder / "model-00003-of-00003.safetensors").read_bytes())
    assert run("inspect", folder) == 2
    assert "which model-00002-of-00003.safetensors holds too" in capsys.readouterr().err
    second.write_bytes(content)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = "mlp1.3.bias"
    index["weight_map"][name] = "../elsewhere.safetensors"
    write_json(folder / "model.safetensors.index.json", index)
    assert run("inspect", folder) == 2
    assert "must name safetensors files beside it" in capsys.readouterr().err
    del index["weight_map"][name]
    write_json(folder / "model.safetensors.index.json", index)
    assert run("inspect", folder) == 2
    assert f"does not agree with the files about 1 tensors ({name})" in capsys.readouterr().err
    (folder / "model.safetensors.index.json").unlink()
    assert run("inspect", folder) == 2
    assert "has 3 safetensors files and no safetensors.index.json" in capsys.readouterr().err


def test_a_head_that_says_it_is_tied_becomes_its_own(native_folder, tmp_path):
    """transformers saves a tied head once; the class default ties, so a missing field is not enough."""
    folder = native_folder()
    tensors = load_tensors(folder)
    del tensors["language_model.lm_head.weight"]
    write_tensors(folder, tensors, 1)
    edit_json(folder / "config.json", tie_word_embeddings=None)
    assert run("hf-to-megatron", folder, tmp_path / "ours") == 2
    edit_json(folder / "config.json", tie_word_embeddings=True)
    assert run("megatron-to-hf", folder, tmp_path / "untied", "--layout", "transformers") == 0
    untied = load_tensors(tmp_path / "untied")
    assert same_bits(untied["language_model.lm_head.weight"], tensors["language_model.model.embed_tokens.weight"])
    assert json.loads((tmp_path / "untied" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_head_stored_beside_a_tied_flag_is_kept(native_folder, tmp_path):
    """The flag is the class default and was written by accident; transformers keeps both tensors too."""
    folder = native_folder()
    edit_json(folder / "config.json", tie_word_embeddings=True)
    assert run("megatron-to-hf", folder, tmp_path / "back", "--layout", "transformers") == 0
    assert_same(folder, tmp_path / "back")


def test_transformers_bias_default_is_false(native_folder, capsys):
    folder = native_folder()
    edit_json(folder / "config.json", vision_config__attention_bias=None)
    assert run("inspect", folder) == 2
    assert "unknown   vision_tower.encoder.layer.0.attention.q_proj.bias" in capsys.readouterr().err


def test_two_names_of_one_tensor(native_folder, capsys):
    folder = native_folder()
    tensors = load_tensors(folder)
    tensors["lm_head.weight"] = tensors["language_model.lm_head.weight"].clone()
    write_tensors(folder, tensors, 1)
    assert run("inspect", folder) == 2
    assert "are two names of one tensor" in capsys.readouterr().err


def test_wrong_targets_and_arguments(chat_folder, tmp_path, capsys):
    source = chat_folder()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    (tmp_path / "file").touch()
    for target in ("taken", "file"):
        assert run("hf-to-megatron", source, tmp_path / target) == 2
        assert "exists already" in capsys.readouterr().err
    assert run("hf-to-megatron", source, tmp_path / "file" / "below") == 2
    assert "cannot be written" in capsys.readouterr().err
    assert run("hf-to-megatron", source, tmp_path / "x", "--file-gb", "0") == 2
    assert run("hf-to-megatron", tmp_path / "x") == 2
    assert run("hf-to-megatron", "--vision", source, tmp_path / "x") == 2
    assert run("hf-to-megatron", tmp_path / "nowhere", tmp_path / "x") == 2
    assert run("check", source, tmp_path) == 2
    assert not (tmp_path / "x").exists()
    (tmp_path / "empty").mkdir()
    assert run("hf-to-megatron", source, tmp_path / "empty") == 0
    assert run("hf-to-megatron", source, tmp_path / "empty") == 0, "the same again is done already"
    assert run("hf-to-megatron", source, tmp_path / "empty", "--file-gb", "0.00004") == 2


def test_damaged_weights_are_refused(chat_folder, tmp_path):
    run("hf-to-megatron", chat_folder(), tmp_path / "ours")
    path = tmp_path / "ours" / "model.json"
    content = path.read_text()
    for broken in (
        "{",
        "{}",
        content.replace('"format_version": 1', '"format_version": 9'),
        content.replace("num_heads", "n"),
    ):
        path.write_text(broken)
        assert run("inspect", tmp_path / "ours") == 2
    path.write_text(content)
    assert run("inspect", tmp_path / "ours") == 0
    (next((tmp_path / "ours").glob("*.safetensors"))).unlink()
    assert run("inspect", tmp_path / "ours") == 2


def test_a_hostile_pickle_is_not_opened(chat_folder, tmp_path):
    folder = chat_folder()
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, folder / "model.pt")
    assert run("inspect", folder) == 2
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="tensors do not fit"):
        from checkpoint_convert.sources import HuggingFaceSource

        HuggingFaceSource(folder)
