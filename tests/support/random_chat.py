"""A small model with random weights that talks, as a Hugging Face folder that can be answered with as it is."""

from pathlib import Path

import torch

from internvl_megatron.data.fast_tokenizer import FastTokenizer
from internvl_megatron.data.tokenizer_build import train_small_tokenizer
from tests.support.huggingface_folders import write_chat
from tests.support.models import small_model
from tests.support.spec_layouts import internvl_chat_shapes

TEXTS = ["how many digits are there?", "there are two digits + -"]


def write_random_chat(folder: Path, seed: int, ffn_hidden_size: int = 96) -> Path:
    """Write it; the folder. Tiles have 28 pixels and 4 tokens."""
    tokenizer = train_small_tokenizer(TEXTS, 300)
    vocab_size = len(FastTokenizer(tokenizer, "small"))
    model = small_model("300m", vocab_size=vocab_size, ffn_hidden_size=ffn_hidden_size)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in internvl_chat_shapes(model).items():
        spread = 0.2 if len(shape) == 1 or "embed" in key else shape[-1] ** -0.5
        centre = 1.0 if "norm" in key and key.endswith("weight") else 0.0
        tensors[key] = centre + spread * torch.randn(shape, generator=generator)
    write_chat(folder, model, tensors)
    tokenizer.save_pretrained(str(folder))
    return folder
