"""Which kernels a configuration may ask for, and what they become on a device."""

import importlib.util
from dataclasses import replace
from importlib.machinery import ModuleSpec
from typing import Any

import pytest

from internvl_megatron.config.kernel_rules import kernel_problems
from internvl_megatron.config.schema import BadStepConfig, Fp8Config, KernelConfig, ParallelConfig, RunConfig
from internvl_megatron.device import REPEATABLE_ALGORITHMS, Device, Kernels
from internvl_megatron.errors import ConfigError
from tests.support.layouts import run_config
from tests.support.models import small_model

BASE = run_config(small_model(), dtype="bf16", device="auto")
SHARDED = ParallelConfig(vision_sharding="sharded")
BF16_MOMENTS = replace(BASE.optimizer, name="adamw", moments="bf16")


def config(kernels: dict[str, Any] | None = None, fp8: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    return replace(BASE, kernels=KernelConfig(**kernels or {}), fp8=Fp8Config(**fp8 or {}), **changes)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (config({"layers": "transformer_engine"}, device="cpu"), "kernels.layers=transformer_engine"),
        (config({"attention": "flash_attn"}, device="cpu"), "kernels.attention=flash_attn"),
        (config({"fuse_rotary": "on"}, device="cpu"), "kernels.fuse_rotary=on"),
        (config({"vision_attention": "cudnn"}, device="cpu"), "set kernels.vision_attention=sdpa"),
        (config({"layers": "transformer_engine"}, parallel=SHARDED), "parallel.vision_sharding=sharded"),
        (config(device="cpu", optimizer=BF16_MOMENTS), "optimizer.moments=bf16"),
        (config(dtype="fp32", optimizer=BF16_MOMENTS), "needs dtype=bf16"),
        (config(parallel=SHARDED, optimizer=BF16_MOMENTS), "needs parallel.vision_sharding=replicated"),
        (config(optimizer=replace(BF16_MOMENTS, name="sgd")), "needs optimizer.name=adamw"),
    ],
)
def test_what_cannot_be_is_refused_with_the_field_and_its_value(asked: RunConfig, named: str) -> None:
    (problem,) = kernel_problems(asked)
    assert named in problem


@pytest.mark.parametrize(
    "asked",
    [
        BASE,
        config(parallel=SHARDED),
        config({"layers": "transformer_engine", "attention": "transformer_engine"}),
        config({"attention": "sdpa", "layers": "torch"}, device="cpu"),
        config(optimizer=BF16_MOMENTS),
    ],
)
def test_what_may_be_is_not(asked: RunConfig) -> None:
    assert kernel_problems(asked) == []


def device_with(monkeypatch: pytest.MonkeyPatch, *packages: str) -> Device:
    """A GPU of a machine that has these packages, and torch's own attention."""
    there = {*packages, "torch", "torch.nn.attention.varlen"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleSpec(name, None) if name in there else None)
    from internvl_megatron.device import packed_attention_kernel

    return Device(kind="cuda", index=0, attention=packed_attention_kernel())


def test_on_a_cpu_everything_is_torchs() -> None:
    cpu = Device(kind="cpu", index=0, attention="sdpa")
    wanted = Kernels("torch", "torch", "sdpa", "sdpa", "emulated", fuse_swiglu=False, fuse_rotary=False)
    assert cpu.kernels(BASE) == wanted
    assert cpu.kernels(config({"fuse_swiglu": "on"})) == replace(wanted, fuse_swiglu=True)
    for field, value in (
        ("layers", "transformer_engine"),
        ("attention", "torch_varlen"),
        ("vision_attention", "cudnn"),
        ("fuse_rotary", "on"),
    ):
        with pytest.raises(ConfigError, match=f"kernels.{field}={value}: its kernels need a GPU"):
            cpu.kernels(config({field: value}))


def test_with_transformer_engine_a_gpu_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = device_with(monkeypatch, "transformer_engine", "flash_attn")
    te = "transformer_engine"
    assert gpu.kernels(BASE) == Kernels(te, te, te, "sdpa", te, fuse_swiglu=True, fuse_rotary=True)
    plain = {"layers": "torch", "attention": "flash_attn", "fuse_swiglu": "off", "fuse_rotary": "off"}
    assert gpu.kernels(config(plain)) == Kernels(
        "torch", "torch", "flash_attn", "sdpa", te, fuse_swiglu=False, fuse_rotary=False
    )
    assert replace(gpu, is_hopper=True).kernels(BASE).vision_attention == "cudnn"
    in_shards = gpu.kernels(config(parallel=SHARDED))
    assert (in_shards.language, in_shards.vision) == (te, "torch")
    exact = gpu.kernels(config(dtype="fp32"))
    assert (exact.language, exact.vision) == ("torch", "torch"), "it would multiply in TF32"
    assert replace(gpu, is_hopper=True).kernels(config(dtype="fp32")).vision_attention == "sdpa"
    with pytest.raises(ConfigError, match=r"fp8.vision=current: needs Transformer Engine's layers"):
        gpu.kernels(config(fp8={"vision": "current"}, parallel=SHARDED))


def test_steps_are_computed_twice_where_attention_gives_the_same_bits_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = BadStepConfig(recheck_every_steps=10)
    gpu = device_with(monkeypatch, "transformer_engine", "flash_attn")
    for value in (None, "1"):
        if value is not None:
            monkeypatch.setenv(REPEATABLE_ALGORITHMS, value)
        else:
            monkeypatch.delenv(REPEATABLE_ALGORITHMS, raising=False)
        with pytest.raises(
            ConfigError, match=r"recheck_every_steps=10: .*set NVTE_ALLOW_NONDETERMINISTIC_ALGO=0 in the"
        ):
            gpu.kernels(config(bad_steps=twice))
    gpu.kernels(config())
    gpu.kernels(config(dtype="fp32", bad_steps=twice))
    monkeypatch.setenv(REPEATABLE_ALGORITHMS, "0")
    gpu.kernels(config(bad_steps=twice))
    with pytest.raises(ConfigError, match=r"kernels.attention=flash_attn.*set kernels.attention=transformer_engine"):
        gpu.kernels(config({"attention": "flash_attn"}, bad_steps=twice))
    monkeypatch.delenv(REPEATABLE_ALGORITHMS)
    Device(kind="cpu", index=0, attention="sdpa").kernels(config(bad_steps=twice))


def test_without_transformer_engine_a_gpu_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = device_with(monkeypatch)
    wanted = Kernels(
        "torch", "torch", "torch_varlen", "sdpa", "transformer_engine", fuse_swiglu=True, fuse_rotary=False
    )
    assert gpu.kernels(BASE) == wanted
    refused: list[dict[str, Any]] = [
        {"kernels": {"layers": "transformer_engine"}},
        {"kernels": {"attention": "transformer_engine"}},
        {"kernels": {"fuse_rotary": "on"}},
        {"optimizer": BF16_MOMENTS},
        {"fp8": {"language": "current"}},
    ]
    for asked in refused:
        with pytest.raises(ConfigError, match=r"pip install 'internvl_megatron\[gpu\]'"):
            gpu.kernels(config(**asked))
    emulated = gpu.kernels(config(fp8={"language": "current", "backend": "emulated"}))
    assert (emulated.language, emulated.fp8) == ("torch", "emulated")
