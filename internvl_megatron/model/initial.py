"""Fresh parameters: each made of the seed and its name alone, whatever the layout and whatever else is made."""

import hashlib

import torch
from torch import Tensor

from internvl_megatron.config.schema import ModelConfig
from internvl_megatron.model.adapter import A, B


def fresh_parameter(name: str, shape: tuple[int, ...], model: ModelConfig, seed: int) -> Tensor:
    """A freshly initialised parameter over all ranks, fp32.

    Matrices and embeddings are normal with `init_std`, output projections of the language model's and the vision
    encoder's residual branches included; norm weights are 1, biases 0, LayerScale its configured value. Of an adapter, A is
    uniform within 1 / sqrt(inputs) and B is 0, as in PEFT (Kaiming's uniform with a = sqrt(5)).

    Args:
        name: layout-free name (`Model.named_parameters`).
        shape: shape over all tensor-parallel ranks.
        model: sizes and `init_std`.
        seed: of the run.
    """
    leaf, owner = name.rsplit(".", 1)[-1], name.rsplit(".", 2)[-2]
    if leaf in ("ls1", "ls2"):
        return torch.full(shape, model.vision.layer_scale_init)
    if leaf in ("bias", B):
        return torch.zeros(shape)
    if "norm" in owner:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if leaf == A:
        return (2 * torch.rand(shape, generator=generator) - 1) * shape[1] ** -0.5
    return torch.randn(shape, generator=generator) * model.init_std
