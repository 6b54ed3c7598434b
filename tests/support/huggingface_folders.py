"""Hugging Face checkpoints with random weights, written without the package: by the safetensors library, from published
names and shapes (OpenGVLab's layout) or transformers' own modules."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from internvl_megatron.config.schema import ModelConfig
from tests.support.models import huggingface_model
from tests.support.rows import IMAGE_TOKEN
from tests.support.spec_layouts import internvl_chat_shapes

Tensors = dict[str, Tensor]


def random_bits(shapes: dict[str, tuple[int, ...]], seed: int) -> Tensors:
    """bf16 tensors of any bit pattern, not-a-numbers included: whoever computes with them changes them."""
    generator = torch.Generator().manual_seed(seed)
    low, high = -(2**15), 2**15
    return {
        name: torch.randint(low, high, shape, dtype=torch.int16, generator=generator).view(torch.bfloat16)
        for name, shape in shapes.items()
    }


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same to the last bit; `torch.equal` takes no not-a-number for equal."""
    as_bytes = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*as_bytes)


def write_chat(folder: Path, model: ModelConfig, tensors: Tensors | None = None, num_files: int = 1) -> Tensors:
    """An `InternVLChatModel` folder, with random bits unless tensors are given."""
    if tensors is None:
        tensors = random_bits(internvl_chat_shapes(model), seed=1)
    folder.mkdir(parents=True)
    write_tensors(folder, tensors, num_files)
    write_json(folder / "config.json", chat_config(model))
    return tensors


def write_transformers(
    folder: Path, model: ModelConfig, in_memory_names: bool = False, image_token: int = IMAGE_TOKEN
) -> Tensors:
    """A folder that transformers itself has saved (random weights in bf16), or the same under its names in memory."""
    reference = huggingface_model(model, image_token=image_token).to(torch.bfloat16)
    reference.save_pretrained(folder)
    tensors = load_tensors(folder)
    if in_memory_names:
        (folder / "model.safetensors").unlink()
        tensors = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
        write_tensors(folder, tensors, 1)
    return tensors


def write_tensors(folder: Path, tensors: Tensors, num_files: int) -> None:
    """One file, or several with an index."""
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    files = {f"model-{n + 1:05d}-of-{num_files:05d}.safetensors": names[n::num_files] for n in range(num_files)}
    for file, inside in files.items():
        save_file({name: tensors[name] for name in inside}, folder / file, metadata={"format": "pt"})
    placed = {name: file for file, inside in files.items() for name in inside}
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": placed}
    write_json(folder / "model.safetensors.index.json", index)


def load_tensors(folder: Path) -> Tensors:
    """All tensors of all safetensors files of a folder, by the safetensors library."""
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2))


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; a name like `vision_config__norm_type` reaches into a section, None removes."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        *sections, field = name.split("__")
        place = content
        for section in sections:
            place = place[section]
        if value is None:
            place.pop(field, None)
        else:
            place[field] = value
    write_json(path, content)


def chat_config(model: ModelConfig) -> dict[str, Any]:
    """config.json as the released checkpoints have it."""
    vision, language = model.vision, model.language
    internlm = language.family == "internlm"
    own = {"bias": False} if internlm else {"use_sliding_window": False}
    return {
        "_commit_hash": None,
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": vision.tile_pixels,
        "hidden_size": language.hidden_size,
        "image_fold": None,
        "llm_config": {
            "architectures": ["InternLM2ForCausalLM" if internlm else "Qwen2ForCausalLM"],
            "bos_token_id": 1 if internlm else 151643,
            "eos_token_id": 2 if internlm else 151643,
            "hidden_act": "silu",
            "hidden_size": language.hidden_size,
            "intermediate_size": language.ffn_hidden_size,
            "max_position_embeddings": 32768,
            "model_type": "internlm2" if internlm else "qwen2",
            "num_attention_heads": language.num_heads,
            "num_hidden_layers": language.num_layers,
            "num_key_value_heads": language.num_kv_heads,
            "rms_norm_eps": language.norm_eps,
            "rope_scaling": {"factor": 2.0, "type": "dynamic"},
            "rope_theta": language.rope_theta,
            "torch_dtype": "bfloat16",
            "vocab_size": language.vocab_size,
            **own,
        },
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "system_message": None,
        "template": "internvl2_5",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "drop_path_rate": 0.1,
            "hidden_act": "gelu",
            "hidden_size": vision.hidden_size,
            "image_size": vision.tile_pixels,
            "initializer_factor": 0.1,
            "intermediate_size": vision.ffn_hidden_size,
            "layer_norm_eps": vision.norm_eps,
            "model_type": "intern_vit_6b",
            "norm_type": vision.norm,
            "num_attention_heads": vision.num_heads,
            "num_channels": 3,
            "num_hidden_layers": vision.num_layers,
            "patch_size": vision.patch_pixels,
            "qk_normalization": vision.qk_norm,
            "qkv_bias": vision.qkv_bias,
            "shared_expert_intermediate_size": 3072,
            "torch_dtype": "bfloat16",
        },
    }
