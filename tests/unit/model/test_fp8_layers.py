"""Which layers round to FP8, and tiles that are filled up for it; on one rank."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from internvl_megatron.config.schema import Fp8Config
from internvl_megatron.device import Device
from internvl_megatron.model.fp8_layers import fp8_recipe, layer_linears
from internvl_megatron.model.fp8_linear import Fp8ColumnParallelLinear, Fp8Linear, Fp8RowParallelLinear
from internvl_megatron.model.layer_specs import TORCH
from tests.support.forward import on_one_rank
from tests.support.layouts import run_config
from tests.support.models import small_model

CONFIG = run_config(small_model())


def test_layers_at_both_ends_are_left_out() -> None:
    fp8 = Fp8Config(language="mxfp8", vision="current", first_bf16_layers=1, last_bf16_layers=2)
    config = replace(CONFIG, fp8=fp8)
    assert [fp8_recipe(config, "language", layer) for layer in range(4)] == [None, "mxfp8", None, None]
    assert [fp8_recipe(config, "vision", layer) for layer in range(2)] == ["current", "current"]
    assert fp8_recipe(config, "projector") is None
    kernels = Device(kind="cpu", index=0, attention="sdpa").kernels(config)
    assert layer_linears(config, "language", 0, kernels) is TORCH
    assert layer_linears(config, "language", 1, replace(kernels, fp8="transformer_engine")) is TORCH
    assert layer_linears(config, "language", 1, kernels).row.keywords == {"recipe": "mxfp8"}


def kinds_of_layers(model: Any, config: Any, device: Any) -> dict[str, str]:
    """Recipes of all emulated layers by their parameters' names."""
    del config, device
    found = {}
    for side, module in (("vision", model.vision), ("language", model.language[0])):
        for name, part in module.named_modules():
            if isinstance(part, Fp8ColumnParallelLinear | Fp8RowParallelLinear | Fp8Linear):
                found[f"{side}.{name}"] = part.rounding.recipe
    return found


@pytest.mark.parametrize("family", ["300m", "6b"])
def test_all_linear_layers_but_the_vocabulary_s(run_ranks: Callable[..., list[Any]], family: str) -> None:
    fp8 = Fp8Config(language="delayed", vision="current", projector="mxfp8", first_bf16_layers=1)
    config = run_config(small_model(family), fp8=fp8)
    found = run_ranks(on_one_rank, 1, config, None, kinds_of_layers)[0]
    inside = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    expected = {f"language.decoder.layers.{layer}.{name}": "delayed" for layer in (1, 2, 3) for name in inside}
    expected |= {f"vision.encoder.layers.{layer}.{name}": "current" for layer in (0, 1) for name in inside}
    expected |= {f"vision.projector.linear_{number}": "mxfp8" for number in (1, 2)}
    assert found == expected


def outputs_and_gradients(model: Any, config: Any, device: Any, multiple: int) -> dict[str, np.ndarray]:
    """Of three tiles with drop path, computed in multiples."""
    del config, device
    tower = model.vision
    tower.tile_multiple = multiple
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8, generator=generator)
    scale = torch.tensor([1.25, 0.0, 1.25]).expand(2, 2, 3)
    calls: list[int] = []
    tower.projector.register_forward_hook(lambda _module, inputs, _output: calls.append(len(inputs[0])))
    output = tower(tiles, scale)
    output.backward(torch.randn(output.shape, generator=generator))
    assert calls == [-(-3 // multiple) * multiple]
    found = {name: parameter.grad.clone().numpy() for name, parameter in tower.named_parameters()}
    return {"output": output.detach().numpy(), **found}


def test_filled_up_tiles_change_neither_outputs_nor_gradients(run_ranks: Callable[..., list[Any]]) -> None:
    plain = run_ranks(on_one_rank, 1, CONFIG, None, outputs_and_gradients, 1)[0]
    filled = run_ranks(on_one_rank, 1, CONFIG, None, outputs_and_gradients, 8)[0]
    assert plain["output"].shape == filled["output"].shape == (3, 4, 64)
    for name, values in plain.items():
        np.testing.assert_allclose(filled[name], values, rtol=1e-4, atol=1e-6 * np.abs(values).max(), err_msg=name)
