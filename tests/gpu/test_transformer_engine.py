"""On a GPU: the small model with Transformer Engine's layers, attention and FP8 against the same with torch's in bf16 or fp32."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from internvl_megatron.config.schema import Fp8Config, KernelConfig, RunConfig
from internvl_megatron.device import is_installed
from internvl_megatron.launcher import launch
from internvl_megatron.model.build import Model
from tests.support.forward import on_one_rank, row_output
from tests.support.layouts import run_config
from tests.support.models import small_model
from tests.support.rows import StepData, random_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
    pytest.mark.skipif(not is_installed("transformer_engine"), reason="Transformer Engine is not installed"),
]

TORCH = KernelConfig(layers="torch", attention="sdpa", fuse_swiglu="off", fuse_rotary="off")
SIZES = {"hidden_size": 128, "num_heads": 4, "num_kv_heads": 4, "head_size": 32, "ffn_hidden_size": 256}
"""Of a language model whose matrices consist of whole blocks of 128 x 128."""
TOKENS = 128


def _logits_and_gradients(model: Model, config: RunConfig, device: Any, data: StepData) -> dict[str, np.ndarray]:
    """Of two rows one after the other: gradients add up."""
    seen = {}
    for row in range(2):
        logits = row_output(model, config, device, data, row)[:, : config.model.language.vocab_size]
        logits.float().square().mean().backward()
        seen[f"logits {row}"] = logits.detach().float().cpu().numpy()
    return seen | {n: p.grad.float().cpu().numpy() for n, p in model.named_parameters() if p.grad is not None}


def _of(config: RunConfig) -> dict[str, np.ndarray]:
    data = random_step(config.model, num_rows=2, seed=0, tokens_per_row=TOKENS)
    return launch(on_one_rank, 1, config, None, _logits_and_gradients, data, device="cuda")[0]


def _config(family: str, dtype: str, **changes: Any) -> RunConfig:
    return run_config(small_model(family, **SIZES), device="cuda", dtype=dtype, **changes)


def _worst(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> tuple[float, str]:
    """The largest difference of a tensor in units of its norm. What is almost nothing (the true gradient of a key's bias is
    zero) counts in units of the others'."""
    assert ours.keys() == theirs.keys()
    floor = 1e-3 * float(np.median([np.linalg.norm(value) for value in theirs.values()]))
    return max(
        (float(np.linalg.norm(ours[name] - theirs[name]) / max(np.linalg.norm(theirs[name]), floor)), name)
        for name in theirs
    )


@pytest.mark.parametrize("family", ["300m", "6b"])
@pytest.mark.parametrize(("dtype", "accepted"), [("bf16", 0.05), ("fp32", 0.01)])
def test_layers_equal_torchs(family: str, dtype: str, accepted: float) -> None:
    """In fp32 Transformer Engine multiplies in TF32."""
    config = _config(family, dtype)
    fused = _of(replace(config, kernels=replace(TORCH, layers="transformer_engine")))
    worst, name = _worst(fused, _of(replace(config, kernels=TORCH)))
    assert worst < accepted, name


def test_all_fused_kernels_equal_torchs() -> None:
    config = _config("300m", "bf16")
    fused = KernelConfig(
        layers="transformer_engine", attention="transformer_engine", fuse_swiglu="on", fuse_rotary="on"
    )
    worst, name = _worst(_of(replace(config, kernels=fused)), _of(replace(config, kernels=TORCH)))
    assert worst < 0.05, name


@pytest.mark.parametrize("recipe", ["delayed", "current", "blockwise"])
def test_fp8_is_near_bf16(recipe: Any) -> None:
    """e4m3 has 3 bits of mantissa: a product of many rounded numbers is a few per cent off, a deep gradient more."""
    config = _config("300m", "bf16", kernels=replace(TORCH, layers="transformer_engine"))
    in_fp8 = _of(replace(config, fp8=Fp8Config(language=recipe, backend="transformer_engine")))
    plain = _of(config)
    row = "logits 1"  # of the second row: delayed scaling knows nothing in the first
    assert 0 < np.linalg.norm(in_fp8[row] - plain[row]) / np.linalg.norm(plain[row]) < 0.1
    if recipe == "delayed":
        return  # the first row's gradients are rounded with scale 1, and most are too small for that
    gradients = [name for name in plain if name.endswith("linear_fc2.weight") and name.startswith("language")]
    for name in gradients:
        assert np.linalg.norm(in_fp8[name] - plain[name]) / np.linalg.norm(plain[name]) < 0.3, name
