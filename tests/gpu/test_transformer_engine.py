"""On a GPU: the small model with Transformer Engine's layers, fused kernels and FP8 against the same with torch's in bf16 or fp32.

One process computes all of them: starting one with Transformer Engine takes longer than any.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from internvl_megatron.config.schema import Fp8Config, KernelConfig, RunConfig
from internvl_megatron.device import is_installed, open_device
from internvl_megatron.launcher import launch
from internvl_megatron.parallel.groups import make_groups
from internvl_megatron.parallel.layout import Layout
from internvl_megatron.ranks import RankInfo, joined
from tests.support.forward import loaded_model, row_output
from tests.support.layouts import run_config
from tests.support.models import small_model
from tests.support.rows import random_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
    pytest.mark.skipif(not is_installed("transformer_engine"), reason="Transformer Engine is not installed"),
]

SIZES = {"hidden_size": 128, "num_heads": 4, "num_kv_heads": 4, "head_size": 32, "ffn_hidden_size": 256}
"""Of a language model whose matrices consist of whole blocks of 128 x 128."""
TOKENS = 128
TORCH = KernelConfig(layers="torch", attention="sdpa", vision_attention="sdpa", fuse_swiglu="off", fuse_rotary="off")
FUSED = {
    "attention": {"attention": "transformer_engine"},
    "vision_attention": {"vision_attention": "cudnn"},
    "fuse_swiglu": {"fuse_swiglu": "on"},
    "fuse_rotary": {"fuse_rotary": "on"},
}
ALL_FUSED = {name: value for change in FUSED.values() for name, value in change.items()}
RECIPES = ("delayed", "current", "blockwise")

Seen = Mapping[str, dict[str, np.ndarray]]


def _variants() -> dict[str, RunConfig]:
    """Runs by name."""

    def config(family: str, dtype: str, layers: Any = "torch", recipe: Any = "none", **changes: Any) -> RunConfig:
        kernels = replace(TORCH, layers=layers, **changes)
        fp8 = Fp8Config(language=recipe, backend="transformer_engine")
        return run_config(small_model(family, **SIZES), device="cuda", dtype=dtype, kernels=kernels, fp8=fp8)

    te = "transformer_engine"
    found = {
        f"{family} {dtype} {layers}": config(family, dtype, layers)
        for family in ("300m", "6b")
        for dtype in ("bf16", "fp32")
        for layers in ("torch", te)
    }
    found |= {name: config("300m", "bf16", **change) for name, change in FUSED.items()}
    found["all"] = config("300m", "bf16", te, **ALL_FUSED)
    return found | {recipe: config("300m", "bf16", te, recipe) for recipe in RECIPES}


def _logits_and_gradients(info: RankInfo, variants: Mapping[str, RunConfig]) -> dict[str, dict[str, np.ndarray]]:
    """Of two rows one after the other: gradients add up. Padding is left out: what attention makes of it means nothing."""
    device, seen = open_device("cuda"), {}
    with joined(info, device, 60):
        groups = make_groups(Layout(1, 1, 1), device, 60)
        for name, config in variants.items():
            data = random_step(config.model, num_rows=2, seed=0, tokens_per_row=TOKENS)
            model, found = loaded_model(config, None, groups, device), {}
            for number, row in enumerate(data.rows):
                logits = row_output(model, config, device, data, number)
                logits = logits[: row.num_tokens, : config.model.language.vocab_size].float()
                logits.square().mean().backward()
                found[f"logits {number}"] = logits.detach().cpu().numpy()
            gradients = {n: p.grad.float().cpu().numpy() for n, p in model.named_parameters() if p.grad is not None}
            seen[name] = found | gradients
    return seen


@pytest.fixture(scope="module")
def seen() -> Seen:
    """Of all runs."""
    return launch(_logits_and_gradients, 1, _variants(), device="cuda")[0]


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
def test_layers_equal_torchs(seen: Seen, family: str, dtype: str, accepted: float) -> None:
    """In fp32 Transformer Engine multiplies in TF32."""
    worst, name = _worst(seen[f"{family} {dtype} transformer_engine"], seen[f"{family} {dtype} torch"])
    assert worst < accepted, name


@pytest.mark.parametrize("what", [*FUSED, "all"])
def test_fused_kernels_equal_torchs(seen: Seen, what: str) -> None:
    worst, name = _worst(seen[what], seen["300m bf16 torch"])
    assert worst < 0.05, name


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_is_near_bf16(seen: Seen, recipe: str) -> None:
    """e4m3 has 3 bits of mantissa: a product of many rounded numbers is a few per cent off, a deep gradient more."""
    in_fp8, plain = seen[recipe], seen["300m bf16 transformer_engine"]
    row = "logits 1"  # of the second row: delayed scaling knows nothing in the first
    assert 0 < np.linalg.norm(in_fp8[row] - plain[row]) / np.linalg.norm(plain[row]) < 0.1
    if recipe == "delayed":
        return  # the first row's gradients are rounded with scale 1, and most are too small for that
    gradients = [name for name in plain if name.endswith("linear_fc2.weight") and name.startswith("language")]
    for name in gradients:
        assert np.linalg.norm(in_fp8[name] - plain[name]) / np.linalg.norm(plain[name]) < 0.3, name
