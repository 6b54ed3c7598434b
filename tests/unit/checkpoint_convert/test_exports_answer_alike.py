"""Exports of models with random weights, loaded by whoever is to use them, compute what this project computes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoint_convert.__main__ import main
from checkpoint_convert.logits import compare_logits, prompt_logits
from internvl_megatron.data.conversation import Turn, render_prompt
from internvl_megatron.data.tokenizer import load_tokenizer
from internvl_megatron.inference.prompt import Prompt
from internvl_megatron.inference.settings import Generation
from tests.support.huggingface_folders import chat_config, load_tensors, write_chat
from tests.support.internlm import internlm2_logits, internlm3_logits
from tests.support.spec_layouts import internvl_chat_shapes

KINDS = ["300m", "6b", "internlm"]
QUESTION = "How many digits are there?"
LOGIT_TOLERANCE = 1e-4
MARGIN = 1e-3
NUM_STEPS = 12


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "noise.png"
    Image.fromarray(np.random.default_rng(3).integers(0, 255, (60, 90, 3), np.uint8)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def exports(tmp_path_factory, models, tokenizers):
    """By kind: a folder with `chat`, the source of fp32 weights of ordinary size; `ours`; `native`."""
    made = {}
    for kind in KINDS:
        root = tmp_path_factory.mktemp(kind)
        torch.manual_seed(7)
        tensors = {}
        for name, shape in internvl_chat_shapes(models[kind]).items():
            spread = 0.2 if len(shape) == 1 or "embed" in name else shape[-1] ** -0.5
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            tensors[name] = centre + spread * torch.randn(shape)
        write_chat(root / "chat", models[kind], tensors)
        for path in tokenizers[kind].iterdir():
            (root / "chat" / path.name).write_bytes(path.read_bytes())
        run("hf-to-megatron", root / "chat", root / "ours")
        run("megatron-to-hf", root / "ours", root / "native", "--layout", "transformers")
        made[kind] = root
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_all_three(exports, picture, kind):
    """Ours on Megatron Core; transformers' own loader on its layout; transformers filled through the table."""
    root = exports[kind]
    for prompt in (Prompt(QUESTION), Prompt(QUESTION, (picture,)), Prompt("<image> <image>?", (picture, picture))):
        ours, native, chat = (prompt_logits(root / folder, prompt) for folder in ("ours", "native", "chat"))
        assert ours.shape == native.shape
        assert np.abs(ours).max() > 1, "the model says something"
        np.testing.assert_allclose(ours, native, atol=LOGIT_TOLERANCE)
        np.testing.assert_allclose(ours, chat, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_with_an_image(exports, run_ranks, picture, kind):
    """transformers' `generate` on what its own processor is given, and our generator, up to the first close call."""
    from transformers import InternVLForConditionalGeneration

    root = exports[kind]
    model: Any = InternVLForConditionalGeneration.from_pretrained(str(root / "native"), local_files_only=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    inputs = native_inputs(root / "native", picture)
    with torch.no_grad():
        made = model.generate(
            **inputs, max_new_tokens=NUM_STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    margins = [top[0] - top[1] for top in (step[0].topk(2).values.tolist() for step in made.logits)]
    clear = next((n for n, margin in enumerate(margins) if margin < MARGIN), len(margins))
    theirs = made.sequences[0, inputs["input_ids"].shape[1] :].tolist()[:clear]
    assert len(theirs) >= 4, f"the first close call is too early to see anything: {margins}"
    tokenizer = load_tokenizer(root / "ours" / "huggingface")
    prompt = Prompt(QUESTION, (picture,), system="")
    settings = Generation(max_new_tokens=len(theirs))
    answer = run_ranks("internvl_megatron.inference.run:generate_rank", 1, root / "ours", [prompt], settings, "cpu")
    expected = [token for token in theirs if token != tokenizer.turn_end_id]
    assert answer[0][0] == tokenizer.decode(expected).strip()


def native_inputs(folder, picture):
    """What transformers' own processor makes of a message, which must be what our pipeline makes of it."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(str(folder), local_files_only=True)
    content = [{"type": "image", "path": picture}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == f"<|im_start|>user\n<IMG_CONTEXT>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    inputs = processor(images=[Image.open(picture)], text=[text], return_tensors="pt")
    tokenizer = load_tokenizer(folder)
    num_tiles = len(inputs["pixel_values"])
    ours = render_prompt([Turn("human", f"<image>\n{QUESTION}")], [num_tiles * 4], tokenizer, "")
    assert inputs["input_ids"][0].tolist() == ours.token_ids.tolist()
    return {name: inputs[name] for name in ("input_ids", "pixel_values", "attention_mask")}


@pytest.mark.parametrize("kind", KINDS)
def test_processor_and_generation_settings(exports, models, kind):
    """The class defaults are another model's: 384 pixels, CLIP's mean, tied tables, the wrong end."""
    from transformers import AutoConfig, AutoProcessor, GenerationConfig

    folder = exports[kind] / "native"
    processor = AutoProcessor.from_pretrained(str(folder), local_files_only=True)
    for part in (processor.image_processor, processor.video_processor):
        assert (part.size["height"], part.size["width"]) == (28, 28)
        assert list(part.image_mean) == [0.485, 0.456, 0.406]
        assert list(part.image_std) == [0.229, 0.224, 0.225]
        assert part.resample == 3
    assert processor.image_processor.max_patches == 12
    assert processor.image_seq_length == 4
    tokenizer = load_tokenizer(folder)
    assert GenerationConfig.from_pretrained(str(folder)).eos_token_id == tokenizer.turn_end_id
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    assert config.image_token_id == tokenizer.image_context_id
    assert config.tie_word_embeddings is False
    assert config.text_config.model_type == ("llama" if kind == "internlm" else "qwen2")
    assert config.text_config.rope_parameters["rope_theta"] == models[kind].language.rope_theta
    assert config.text_config.rope_parameters["rope_type"] == "dynamic"
    assert config.text_config.eos_token_id == tokenizer.turn_end_id
    assert config.vision_config.attention_bias is (kind != "6b")
    assert config.vision_config.use_qk_norm is (kind == "6b")


@pytest.mark.parametrize("kind", KINDS)
def test_custom_export_has_exactly_the_published_tensors_and_files(exports, models, tmp_path, kind):
    run("megatron-to-hf", exports[kind] / "native", tmp_path / "chat", "--layout", "internvl-chat")
    found = {name: tuple(tensor.shape) for name, tensor in load_tensors(tmp_path / "chat").items()}
    assert found == internvl_chat_shapes(models[kind])
    written = json.loads((tmp_path / "chat" / "config.json").read_text())
    released = chat_config(models[kind])
    for name, value in released.items():
        if not isinstance(value, dict) and name not in ("_commit_hash", "system_message", "torch_dtype"):
            assert written[name] == value, name
    for section, extra in (
        ("vision_config", {"drop_path_rate", "shared_expert_intermediate_size"}),
        ("llm_config", {"eos_token_id"}),
    ):
        for name in released[section].keys() - extra - {"torch_dtype"}:
            assert written[section][name] == released[section][name], (section, name)
    files = {path.name for path in (tmp_path / "chat").iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer_config.json",
        "README.md",
    } <= files
    assert ({"vocab.json", "merges.txt", "added_tokens.json"} if kind != "internlm" else {"tokenizer.model"}) <= files
    note = (tmp_path / "chat" / "README.md").read_text()
    assert "licence" in note
    assert "modeling_internvl_chat.py" in note


def test_slow_tokenizer_files_give_the_same_ids(exports, tmp_path):
    """OpenGVLab's code loads vocab.json and merges.txt; here they alone are read."""
    run("megatron-to-hf", exports["300m"] / "native", tmp_path / "chat", "--layout", "internvl-chat")
    (tmp_path / "chat" / "tokenizer.json").unlink()
    slow, fast = load_tokenizer(tmp_path / "chat"), load_tokenizer(exports["300m"] / "native")
    assert len(slow) == len(fast)
    for text in ("How many digits are there?", "  two\n\nlines 123 <ref>x</ref>", "图片 🙂", "<|im_end|>"):
        assert slow.encode(text) == fast.encode(text)
    assert slow.image_context_id == fast.image_context_id


def test_internlm2_and_internlm3_against_plain_pytorch(exports, models):
    """9B in all three forms: InternLM2's names from the source, Llama's from the export, and our own."""
    root, config = exports["internlm"], models["internlm"].language
    tokenizer = load_tokenizer(root / "ours" / "huggingface")
    token_ids = torch.from_numpy(render_prompt([Turn("human", QUESTION)], [], tokenizer).token_ids).long()
    assert token_ids[0] == tokenizer.bos_id
    fused = internlm2_logits(load_tensors(root / "chat"), config, token_ids, "language_model.")
    apart = internlm3_logits(load_tensors(root / "native"), config, token_ids, "language_model.")
    ours = prompt_logits(root / "ours", Prompt(QUESTION))
    np.testing.assert_allclose(fused[-len(ours) :].numpy(), ours, atol=LOGIT_TOLERANCE)
    np.testing.assert_allclose(apart[-len(ours) :].numpy(), ours, atol=LOGIT_TOLERANCE)


def test_check_compares_logits(exports, picture, tmp_path, capsys):
    root = exports["300m"]
    run("check", root / "chat", root / "ours", "--image", picture, "--prompt", QUESTION)
    assert "logits agree: largest difference" in capsys.readouterr().out
    tensors = load_tensors(root / "chat")
    tensors["language_model.model.norm.weight"] = tensors["language_model.model.norm.weight"] * 1.01
    write_chat(tmp_path / "other", models_of(root), tensors)
    for path in (root / "ours" / "huggingface").iterdir():
        if path.name != "config.json":
            (tmp_path / "other" / path.name).write_bytes(path.read_bytes())
    assert main(["check", str(root / "ours"), str(tmp_path / "other"), "--prompt", QUESTION]) == 1
    out = capsys.readouterr().out
    assert "logits DIFFER" in out
    assert not compare_logits(root / "ours", tmp_path / "other", QUESTION, [picture]).agree


def models_of(root: Path):
    from internvl_megatron.checkpoint.weights import read_model

    return read_model(root / "ours")
