"""The language model's gate and activation as one compiled kernel, which is used on GPUs."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from internvl_megatron.config.schema import KernelConfig, RunConfig
from internvl_megatron.ranks import RankInfo
from tests.support.layouts import run_config
from tests.support.models import small_model
from tests.support.rows import StepData, random_step


def _logits_and_gradients(info: RankInfo, config: RunConfig, data: StepData) -> dict[str, np.ndarray]:
    from tests.support.forward import on_one_rank

    return on_one_rank(info, config, None, _of_model, data)


def _of_model(model: Any, config: RunConfig, device: Any, data: StepData) -> dict[str, np.ndarray]:
    from tests.support.forward import row_output

    assert model.language[0].config.bias_activation_fusion == (config.kernels.fuse_swiglu == "on"), "as asked"
    logits = row_output(model, config, device, data, 0)[:, : config.model.language.vocab_size]
    logits.square().mean().backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach().numpy(), **gradients}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for the CPU with g++")
def test_fused_swiglu_has_the_values_and_gradients_of_the_plain_one(run_ranks: Callable[..., list[Any]]) -> None:
    config = run_config(small_model())
    data = random_step(config.model, num_rows=1, seed=0)
    runs = (replace(config, kernels=KernelConfig(fuse_swiglu=choice)) for choice in ("on", "off"))
    fused, plain = (run_ranks(_logits_and_gradients, 1, run, data)[0] for run in runs)
    assert fused.keys() == plain.keys()
    for name in plain:
        difference = np.linalg.norm(fused[name] - plain[name])
        assert difference <= 1e-5 * np.linalg.norm(plain[name]) + 1e-9, name
