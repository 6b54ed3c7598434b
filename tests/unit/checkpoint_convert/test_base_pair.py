"""A bare InternViT and a bare language model joined: what native pre-training starts from."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from checkpoint_convert.__main__ import main
from internvl_megatron.data.tokenizer import INTERNVL_TOKENS, load_tokenizer
from internvl_megatron.data.tokenizer_build import train_small_tokenizer
from internvl_megatron.model.initial import fresh_parameter
from tests.support.huggingface_folders import edit_json, load_tensors, random_bits, same_bits, write_json
from tests.support.models import small_model
from tests.support.sentencepiece_folder import write_folder
from tests.support.spec_layouts import internvl_chat_shapes

EMBEDDING, HEAD = "language.embedding.word_embeddings.weight", "language.output_layer.weight"


@pytest.fixture(scope="module")
def bare_tokenizer(tmp_path_factory):
    """A small Qwen-like tokenizer without InternVL's tokens."""
    folder = tmp_path_factory.mktemp("bare") / "tokenizer"
    tokenizer = train_small_tokenizer(["how many digits are there?", "two digits"], 300)
    tokenizer.save_pretrained(str(folder))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in INTERNVL_TOKENS]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=None)
    return folder


def part(shapes, prefix):
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


@pytest.fixture
def pair(tmp_path, bare_tokenizer):
    """`pair(tied=..., rows=...)`: folders of both, and their tensors; the tables have padding rows, as Qwen2.5's."""

    def make(tied=False, rows=320, vision_family="300m"):
        model = small_model(vision_family, vocab_size=rows)
        shapes = internvl_chat_shapes(model)
        vision, language = (
            random_bits(part(shapes, p), seed) for p, seed in (("vision_model.", 1), ("language_model.", 2))
        )
        language = {name: torch.randn(tensor.shape).bfloat16() for name, tensor in language.items()}
        if tied:
            del language["lm_head.weight"]
        for folder, tensors in (("vit", vision), ("llm", language)):
            (tmp_path / folder).mkdir()
            save_file(tensors, tmp_path / folder / "model.safetensors")
        for path in bare_tokenizer.iterdir():
            shutil.copy(path, tmp_path / "llm")
        v, q = model.vision, model.language
        write_json(
            tmp_path / "vit" / "config.json",
            {
                "architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", "hidden_size": v.hidden_size,
                "num_hidden_layers": v.num_layers, "num_attention_heads": v.num_heads, "hidden_act": "gelu",
                "intermediate_size": v.ffn_hidden_size, "image_size": 28, "patch_size": 7, "norm_type": v.norm,
                "qkv_bias": v.qkv_bias, "qk_normalization": v.qk_norm, "layer_norm_eps": 1e-6,
            },
        )  # fmt: skip
        write_json(
            tmp_path / "llm" / "config.json",
            {
                "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 64, "hidden_act": "silu",
                "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
                "vocab_size": rows, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": tied,
                "bos_token_id": 151643, "eos_token_id": 151643, "max_position_embeddings": 32768, "use_sliding_window": False,
            },
        )  # fmt: skip
        assert q.head_size == 16
        return vision, language

    return make


def join(tmp_path, *more):
    arguments = [
        "hf-to-megatron",
        "--vision",
        tmp_path / "vit",
        "--language",
        tmp_path / "llm",
        *more,
        tmp_path / "ours",
    ]
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("vision_family", ["300m", "6b"])
def test_untied_base(pair, tmp_path, bare_tokenizer, vision_family):
    """Cut to the tokenizer, output rows of the nine = mean of all older rows, input rows = the leftover padding rows."""
    _, language = pair(vision_family=vision_family)
    assert join(tmp_path) == 0
    ours = load_tensors(tmp_path / "ours")
    tokenizer = load_tokenizer(tmp_path / "ours" / "huggingface")
    old = len(tokenizer) - 9
    assert [tokenizer.find(token) for token in INTERNVL_TOKENS] == list(range(old, old + 9))
    assert json.loads((tmp_path / "ours" / "model.json").read_text())["model"]["language"]["vocab_size"] == old + 9
    table, head = ours[EMBEDDING], ours[HEAD]
    assert table.shape == head.shape == (512, 64)
    assert same_bits(table[: old + 9], language["model.embed_tokens.weight"][: old + 9])
    assert same_bits(head[:old], language["lm_head.weight"][:old])
    mean = language["lm_head.weight"][:old].float().mean(0)
    for row in head[old : old + 9].float():
        torch.testing.assert_close(row, mean, rtol=1e-2, atol=1e-3)
    assert same_bits(head[old : old + 9], head[old].expand(9, -1))
    assert not table[old + 9 :].any()
    assert not head[old + 9 :].any()


def test_tied_base_gets_a_head_of_its_own(pair, tmp_path):
    """The overwrite reaches the input rows where the two are one table at that moment, as in the 0.5B and 1.5B bases."""
    _, language = pair(tied=True)
    assert join(tmp_path) == 0
    ours = load_tensors(tmp_path / "ours")
    old = len(load_tokenizer(tmp_path / "ours" / "huggingface")) - 9
    assert same_bits(ours[HEAD], ours[EMBEDDING])
    assert same_bits(ours[HEAD][:old], language["model.embed_tokens.weight"][:old])
    mean = language["model.embed_tokens.weight"][:old].float().mean(0)
    torch.testing.assert_close(ours[EMBEDDING][old + 4].float(), mean, rtol=1e-2, atol=1e-3)


def test_a_stored_head_is_kept_whatever_the_flag_says(pair, tmp_path):
    """transformers keeps both tables too, if they differ; the flag alone would lose one."""
    _, language = pair()
    edit_json(tmp_path / "llm" / "config.json", tie_word_embeddings=True)
    assert join(tmp_path) == 0
    ours = load_tensors(tmp_path / "ours")
    old = len(load_tokenizer(tmp_path / "ours" / "huggingface")) - 9
    assert same_bits(ours[HEAD][:old], language["lm_head.weight"][:old])


@pytest.mark.parametrize("pixels", ["0", "-28", "30", "7"])
def test_impossible_tiles(pair, tmp_path, capsys, pixels):
    pair()
    assert join(tmp_path, "--tile-pixels", pixels) == 2
    assert "is not a multiple of 14" in capsys.readouterr().err


def test_everything_else_is_the_parts_own(pair, tmp_path):
    vision, language = pair(vision_family="6b")
    assert join(tmp_path, "--seed", "7") == 0
    assert main(["megatron-to-hf", str(tmp_path / "ours"), str(tmp_path / "chat"), "--layout", "internvl-chat"]) == 0
    chat = load_tensors(tmp_path / "chat")
    for prefix, tensors in (("vision_model.", vision), ("language_model.", language)):
        for name, tensor in tensors.items():
            if not name.endswith(("embed_tokens.weight", "lm_head.weight")):
                assert same_bits(chat[prefix + name], tensor), name
    ours = load_tensors(tmp_path / "ours")
    model = small_model("6b")
    for name in ("linear_1.weight", "linear_2.bias", "norm.weight"):
        full = f"vision.projector.{name}"
        assert same_bits(ours[full], fresh_parameter(full, tuple(ours[full].shape), model, 7).bfloat16())
    assert ours["vision.projector.linear_1.weight"].float().std().item() == pytest.approx(0.02, rel=0.05)
    config = json.loads((tmp_path / "chat" / "config.json").read_text())
    assert config["llm_config"]["tie_word_embeddings"] is False
    assert config["torch_dtype"] == "bfloat16"


def test_a_table_that_is_too_short_grows(pair, tmp_path, bare_tokenizer):
    """InternLM's tables have no spare rows: the new input rows are fresh."""
    num_tokens = len(json.loads((bare_tokenizer / "tokenizer.json").read_text())["model"]["vocab"]) + 3
    _, language = pair(rows=num_tokens)
    assert join(tmp_path) == 0
    ours = load_tensors(tmp_path / "ours")
    assert same_bits(ours[EMBEDDING][:num_tokens], language["model.embed_tokens.weight"])
    fresh = ours[EMBEDDING][num_tokens : num_tokens + 9].float()
    assert 0.005 < fresh.std().item() < 0.05
    mean = language["lm_head.weight"].float().mean(0)
    torch.testing.assert_close(ours[HEAD][num_tokens].float(), mean, rtol=1e-2, atol=1e-3)


def test_internlm3_base(pair, tmp_path):
    """InternLM3's own names and settings, sentencepiece tokenizer, no biases."""
    pair()
    shutil.rmtree(tmp_path / "llm")
    write_folder(tmp_path / "llm", "user_defined", add_dummy_prefix=False, with_nine=False)
    rows = 424
    shapes = {
        name: shape
        for name, shape in part(internvl_chat_shapes(small_model(vocab_size=rows)), "language_model.").items()
        if not name.endswith("_proj.bias")
    }
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "llm" / "model.safetensors")
    write_json(
        tmp_path / "llm" / "config.json",
        {
            "architectures": ["InternLM3ForCausalLM"], "model_type": "internlm3", "hidden_size": 64, "hidden_act": "silu",
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
            "head_dim": 16, "vocab_size": rows, "rms_norm_eps": 1e-5, "rope_theta": 50000000, "bias": False,
            "qkv_bias": False, "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"}, "tie_word_embeddings": False,
        },
    )  # fmt: skip
    assert join(tmp_path) == 0
    model = json.loads((tmp_path / "ours" / "model.json").read_text())["model"]["language"]
    assert (model["family"], model["vocab_size"], model["rope_theta"], model["norm_eps"]) == (
        "internlm",
        429,
        5e7,
        1e-5,
    )
    assert main(["megatron-to-hf", str(tmp_path / "ours"), str(tmp_path / "native"), "--layout", "transformers"]) == 0
    text = json.loads((tmp_path / "native" / "config.json").read_text())["text_config"]
    assert (text["model_type"], text["rope_scaling"]) == ("llama", {"factor": 6.0, "rope_type": "dynamic"})
    native = load_tensors(tmp_path / "native")
    assert same_bits(
        native["language_model.model.layers.3.self_attn.q_proj.weight"],
        tensors["model.layers.3.self_attn.q_proj.weight"],
    )


def test_position_table_is_resized(pair, tmp_path):
    """InternViT's `resize_pos_embeddings`: bicubic in fp32, the class token's entry kept."""
    vision, _ = pair()
    shape = vision["embeddings.position_embedding"].shape
    table = torch.randn(shape).bfloat16()
    save_file(vision | {"embeddings.position_embedding": table}, tmp_path / "vit" / "model.safetensors")
    assert join(tmp_path, "--tile-pixels", "42") == 0
    found = load_tensors(tmp_path / "ours")["vision.position_embedding"]
    grid = table[:, 1:].float().reshape(1, 4, 4, 40).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)
    expected = torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2).bfloat16()], dim=1)
    assert same_bits(found, expected)


def test_wrong_pairs(pair, tmp_path, capsys):
    pair()
    vit, llm = tmp_path / "vit" / "config.json", tmp_path / "llm" / "config.json"
    for path, changes, message in (
        (vit, {"model_type": "siglip"}, "model_type is 'siglip', not one of an InternViT"),
        (vit, {"image_size": 35}, "a tile of 35 pixels is not a multiple of 14"),
        (vit, {"norm_type": "rms_norm"}, "unknown   encoder.layers.0.norm1.bias"),
        (llm, {"model_type": "phi3"}, "model_type is 'phi3'"),
        (llm, {"vocab_size": 319}, "mis-shaped model.embed_tokens.weight: [320, 64], the model has [319, 64]"),
        (llm, {"tie_word_embeddings": "yes"}, "'tie_word_embeddings' expected bool"),
    ):
        before = path.read_text()
        edit_json(path, **changes)
        assert join(tmp_path) == 2
        assert message in capsys.readouterr().err
        path.write_text(before)
    (tmp_path / "llm" / "tokenizer.json").unlink()
    assert join(tmp_path) == 2
    assert "--tokenizer DIR" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_rows_fit_the_tokenizer(pair, tmp_path, capsys):
    pair(rows=100)
    assert join(tmp_path) == 2
    assert "its tables have 100 rows" in capsys.readouterr().err
