"""Memory in closed form against what ranks of large worlds allocate, and against a measurement."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from internvl_megatron.config.overrides import apply_overrides
from internvl_megatron.config.plan import plan
from internvl_megatron.config.recipes import find_recipe
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.ranks import RankInfo
from internvl_megatron.scaling.memory import rank_bytes
from tests.support.fake_world import FakeWorldDevice
from tools.gpu_cases import Case, Way

LAYERS = 2
"""Of every stage and of the encoder; widths are the released ones."""


def _cut(name: str, num_ranks: int) -> RunConfig:
    """A recipe with few layers and tokens: the rest of the model is that of the size."""
    config = apply_overrides(find_recipe(name, num_ranks), ["data.meta=m", "data.tokenizer=t", "device=cpu"])
    model, stages = config.model, config.parallel.pipeline_size
    language = replace(model.language, num_layers=LAYERS * stages, vocab_size=8000)
    return replace(config, model=replace(model, vision=replace(model.vision, num_layers=LAYERS), language=language))


def _allocated(info: RankInfo, config: RunConfig, num_ranks: int, rank: int) -> tuple[int, int, int]:
    """Bytes of (weights, gradients, optimizer state) that a rank has made."""
    import torch
    import torch.distributed as dist
    from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from internvl_megatron.device import open_device
    from internvl_megatron.model.build import build_model
    from internvl_megatron.model.vision_shards import local_shard
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.train.sharded_optimizer import ShardedOptimizer
    from internvl_megatron.train.step import Step

    open_device("cpu")
    device = FakeWorldDevice(kind="cpu", index=0, attention="sdpa")
    dist.init_process_group("fake", rank=rank, world_size=num_ranks, store=FakeStore())
    made = plan(config, num_ranks)
    groups = make_groups(made.layout, device, 60, made.vision_layout)
    model = build_model(config, groups, device, initialize=False)
    step = Step(config, model, groups, device)
    weights = sum(local_shard(parameter.detach()).nbytes for _, parameter in model.named_parameters())
    wrapped: list[Any] = [*step.language, getattr(step.vision, "_ddp", None)]
    gradients = sum(buffer.grad_data.nbytes for module in wrapped if module is not None for buffer in module.buffers)
    state = 0
    for side in step.optimizer.sides:
        if isinstance(side, ShardedOptimizer):
            shards = sum(shard.own.nbytes for shard in side.shards.values())
            gradients, state = gradients + shards, state + 2 * shards
            continue
        parts: list[Any] = side.chained_optimizers if isinstance(side, ChainedOptimizer) else [side]
        for part in parts:
            assert isinstance(part, DistributedOptimizer)
            masters = [tensor for group in part.shard_fp32_from_float16_groups for tensor in group]
            assert all(tensor.dtype == torch.float32 for tensor in masters)
            state += 3 * sum(tensor.nbytes for tensor in masters)  # and both of Adam's moments, like the masters
    return weights, gradients, state


@pytest.mark.parametrize(
    ("name", "num_ranks", "rank"),
    [
        ("internvl3_1b_pretrain", 8, 0),
        pytest.param("internvl3_9b_sft", 64, 5, marks=pytest.mark.slow),
        pytest.param("internvl3_38b_sft", 16, 0, marks=pytest.mark.slow),
        ("internvl3_78b_pretrain", 64, 0),
    ],
)
def test_state_is_what_a_rank_of_a_large_world_allocates(
    run_ranks: Callable[..., list[Any]], name: str, num_ranks: int, rank: int
) -> None:
    config = _cut(name, num_ranks)
    held = rank_bytes(config, plan(config, num_ranks))
    ((weights, gradients, optimizer),) = run_ranks(_allocated, 1, config, num_ranks, rank)
    assert weights == pytest.approx(held.weights, rel=0.005)
    assert gradients == pytest.approx(held.gradients, rel=0.005)
    assert optimizer == pytest.approx(held.optimizer, rel=0.01), "shards are not all of the same size"


def test_the_estimate_is_near_what_was_measured() -> None:
    """One H200, 25 layers of the 8B, rows of 4K: 124.7 GB allocated (benchmarks/results/gpu_check_2026-11-28.json)."""
    case = Case("8B", "bf16", 4096, num_layers=25, way=Way("bf16", "full", 24))
    config = case.config("auto")
    assert rank_bytes(config, plan(config, 1)).total == pytest.approx(124.7e9, rel=0.05)
