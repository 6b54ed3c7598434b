"""The Hugging Face baseline trains on the same rows: its loss is ours, packed and padded, with V2PE."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from internvl_megatron.config.schema import Fp8Config, ModelConfig, ParallelConfig, RunConfig
from internvl_megatron.data.rows import Row
from internvl_megatron.device import Device
from internvl_megatron.ranks import RankInfo
from tests.support.reference import our_tensors
from tests.support.training import Tensors
from tools.gpu_cases import Attention, Samples, Setting, benchmark_rows, model_of, run_config
from tools.huggingface_baseline import Baseline, build, packed_batches, padded_batches
from tools.image_text_rows import RandomPixels

CPU = Device(kind="cpu", index=0, attention="sdpa")
SETTINGS: list[tuple[Samples, Attention]] = [("packed", "torch_varlen"), ("packed", "sdpa"), ("padded", "sdpa")]


def our_loss(info: RankInfo, config: RunConfig, rows: list[Row], weights: Tensors) -> float:
    """Of the real step, before its update."""
    from internvl_megatron.device import open_device
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.parallel.layout import Layout
    from internvl_megatron.ranks import joined
    from tests.support.training import make_step

    torch.set_num_threads(1)
    device = open_device("cpu")
    with joined(info, device, 60):
        step, _ = make_step(config, weights, make_groups(Layout(1, 1, 1), device, 60), device)
        batch: Any = RandomPixels(rows, config.model, 0, 1)
        return step.run(batch, 0).loss


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return model_of("1B", is_dry=True)


@pytest.fixture(scope="module")
def rows(model: ModelConfig) -> list[Row]:
    return benchmark_rows(model, 2, 4096)


@pytest.fixture(scope="module")
def config(model: ModelConfig) -> RunConfig:
    config = run_config("test", model, 4096, Fp8Config(), "cpu")
    return replace(config, dtype="fp32", rows_per_step=2, parallel=ParallelConfig())


def noisy(model: ModelConfig) -> Any:
    """The baseline's model, every weight random and so large that attention sees positions: nothing hides behind ones, zeros
    or even weights."""
    reference = build(model, Setting("packed", "sdpa"), torch.float32, CPU)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in reference.parameters():
            spread = 0.2 if parameter.dim() == 1 else 2 * parameter.shape[-1] ** -0.5
            parameter += spread * torch.randn(parameter.shape, generator=generator)
    return reference


@pytest.mark.parallel
def test_losses_equal_ours(
    run_ranks: Callable[..., list[Any]], model: ModelConfig, config: RunConfig, rows: list[Row]
) -> None:
    state = noisy(model).state_dict()
    (ours,) = run_ranks(our_loss, 1, config, rows, our_tensors(state, model))
    for samples, attention in SETTINGS:
        baseline = Baseline(config, rows, Setting(samples, attention), CPU)
        baseline.model.load_state_dict(state)
        with torch.no_grad():
            theirs = float(sum(baseline.losses()))
        assert theirs == pytest.approx(ours, rel=1e-4), (samples, attention)


def test_gradients_of_all_settings_are_alike(model: ModelConfig, config: RunConfig, rows: list[Row]) -> None:
    state, found = noisy(model).state_dict(), []
    for setting in [*(Setting(*names) for names in SETTINGS), Setting("packed", "torch_varlen", recomputes=True)]:
        baseline = Baseline(config, rows, setting, CPU)
        baseline.model.load_state_dict(state)
        for loss in baseline.losses():
            loss.backward()
        found.append([parameter.grad for parameter in baseline.model.parameters()])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert (one - two).norm() <= 1e-4 * one.norm() + 1e-7


def test_a_step_learns(config: RunConfig, rows: list[Row]) -> None:
    learning = replace(config, optimizer=replace(config.optimizer, learning_rate=1e-3))
    baseline = Baseline(learning, rows, Setting("packed", "torch_varlen"), CPU)
    losses = [float(baseline.step()) for _ in range(4)]
    assert losses[-1] < losses[0] - 0.1


def test_all_samples_are_in_the_batches_once(model: ModelConfig, rows: list[Row]) -> None:
    tiles = RandomPixels(rows, model, 0, 1).tiles().tiles
    num_tokens = sum(row.num_tokens for row in rows)
    supervised = sum(int((row.weights > 0).sum()) for row in rows)
    packed, padded = packed_batches(rows, tiles), padded_batches(rows, tiles, 256)
    assert sum(batch.token_ids.numel() for batch in packed) == num_tokens
    assert sum(batch.token_ids.shape[0] for batch in padded) == sum(row.num_samples for row in rows)
    assert len(padded) < sum(row.num_samples for row in rows), "short samples share a batch"
    for batches in (packed, padded):
        assert sum(len(batch.targets) for batch in batches) == supervised
        assert sum(len(batch.pixels) for batch in batches) == sum(row.num_tiles for row in rows)
    assert all(batch.token_ids.numel() <= 256 for batch in padded)


def test_fractional_positions_reach_the_baseline(model: ModelConfig, rows: list[Row]) -> None:
    (first, *_) = packed_batches(rows, RandomPixels(rows, model, 0, 1).tiles().tiles)
    fractions = first.positions.numpy() % 1
    assert np.count_nonzero(fractions), "V2PE steps below one"
