"""Computing activations again keeps less for backward; that gradients stay the same is tested with the layouts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from internvl_megatron.config.schema import ParallelConfig
from tests.support.forward import on_one_rank, row_output
from tests.support.layouts import run_config
from tests.support.models import small_model
from tests.support.rows import random_step
from tools.tensor_bytes import TensorBytes


def kept_bytes(model: Any, config: Any, device: Any) -> tuple[int, int]:
    """What autograd keeps of one row's forward pass: on the vision side, and altogether."""
    total = [0]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        total[0] += tensor.nbytes
        return tensor

    data = random_step(config.model, 1, seed=0)
    tiles = torch.zeros(2, 3, 28, 28, dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.vision(tiles)
        vision = total[0]
        row_output(model, config, device, data, 0)
    return vision, total[0]


def vision_peak_bytes(model: Any, _config: Any, _device: Any) -> int:
    """Most that tensors take in a forward and backward pass of the encoder, whose gradients are there already."""
    tiles = torch.zeros(4, 3, 28, 28, dtype=torch.uint8)
    model.vision(tiles).sum().backward()
    parameters = [parameter for _, parameter in model.named_parameters()]
    account = TensorBytes(ignored=[*parameters, *(one.grad for one in parameters if one.grad is not None)])
    with account.in_this_thread():
        model.vision(tiles).sum().backward()
    return account.peak


@pytest.fixture(scope="module")
def kept(run_ranks: Callable[..., list[Any]]) -> Callable[..., tuple[int, int]]:
    def measure(**parallel: Any) -> tuple[int, int]:
        config = run_config(small_model(num_layers=8), parallel=ParallelConfig(**parallel))
        return run_ranks(on_one_rank, 1, config, None, kept_bytes)[0]

    return measure


def test_every_way_keeps_less(kept: Callable[..., tuple[int, int]]) -> None:
    vision, everything = kept()
    assert kept(vision_recompute="layer")[0] < vision / 2
    selective = kept(language_recompute="selective")[1]
    full = kept(language_recompute="full")[1]
    assert full < selective < everything
    assert full - vision < (everything - vision) / 2


def test_what_a_layer_computed_again_goes_before_the_next_does(run_ranks: Callable[..., list[Any]]) -> None:
    """So a layer more costs its input, and not what it computes: seven times that at least."""
    peaks, model = {}, small_model()
    for num_layers in (2, 6):
        config = run_config(
            replace(model, vision=replace(model.vision, num_layers=num_layers)),
            parallel=ParallelConfig(vision_recompute="layer"),
        )
        (peaks[num_layers],) = run_ranks(on_one_rank, 1, config, None, vision_peak_bytes)
    tokens = 1 + (model.vision.tile_pixels // model.vision.patch_pixels) ** 2
    input_bytes = 4 * tokens * model.vision.hidden_size * 4
    assert peaks[6] - peaks[2] <= 4 * 1.5 * input_bytes
