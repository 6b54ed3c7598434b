"""What a rank holds of a sharded vision side: a part of everything between steps, and nothing whole."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from internvl_megatron.config.models import INTERNVL3
from internvl_megatron.config.schema import ParallelConfig, RunConfig
from internvl_megatron.device import open_device
from internvl_megatron.ranks import RankInfo, joined
from internvl_megatron.scaling.counts import parameter_counts
from tests.support.layouts import ADAMW, LAYOUTS, Ranks, Scenario, run_config
from tools.fake_world import FakeWorldDevice

pytestmark = pytest.mark.parallel

GIGABYTE = 1e9
WORLD_SIZE = 64


@dataclass
class Held:
    """Elements by kind of what a rank holds."""

    shards: int
    optimized: int
    dtypes: set[torch.dtype]


def _as_rank_of_a_large_world(info: RankInfo, config: RunConfig, rank: int) -> Held:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from internvl_megatron.config.plan import plan
    from internvl_megatron.model.build import build_model
    from internvl_megatron.model.vision_shards import local_shard
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.train.vision_side import vision_side

    open_device("cpu")
    device = FakeWorldDevice(kind="cpu", index=0, attention="sdpa")
    dist.init_process_group("fake", rank=rank, world_size=WORLD_SIZE, store=FakeStore())
    made = plan(config, WORLD_SIZE)
    groups = make_groups(made.layout, device, 60, made.vision_layout)
    model = build_model(config, groups, device, initialize=False)
    own = [local_shard(parameter.detach()) for parameter in model.vision.parameters()]
    side = vision_side(config, model, groups)
    assert side.optimizer is not None, "the encoder is trained"
    optimized: list[torch.Tensor] = [*side.optimizer.get_parameters()]
    return Held(
        shards=sum(tensor.numel() for tensor in own),
        optimized=sum(tensor.numel() for tensor in optimized),
        dtypes={tensor.dtype for tensor in (*own, *optimized)},
    )


@pytest.mark.parametrize("rank", [0, 63])
def test_internvit_6b_takes_less_than_2_gb_of_each_of_64_ranks(run_ranks: Callable[..., list[Any]], rank: int) -> None:
    """Rank 0 has most: parameters of one row, like the table of positions, are its own."""
    model = INTERNVL3["78B"]
    # Of the language model only the width counts here, which is the projector's.
    model = replace(model, language=replace(model.language, num_layers=4, vocab_size=512))
    config = run_config(
        model,
        dtype="bf16",
        optimizer=ADAMW,
        parallel=ParallelConfig(tensor_size=8, pipeline_size=4, sequence_parallel=True, vision_sharding="sharded"),
    )
    config = replace(config, data=replace(config.data, meta="m", tokenizer="t", tokens_per_row=16384))
    (held,) = run_ranks(_as_rank_of_a_large_world, 1, config, rank)
    counts = parameter_counts(model)
    share = (counts.vision + counts.projector) / WORLD_SIZE
    assert held.shards == pytest.approx(share, rel=0.05), "the vision side is spread evenly"
    assert (held.optimized, held.dtypes) == (held.shards, {torch.float32})
    # The optimizer works on the shards themselves: weight, gradient and Adam's two running means, all fp32.
    assert 4 * 4 * held.shards < 2 * GIGABYTE


@dataclass
class Bytes:
    """Of what a rank holds of the vision side after a step."""

    shards: int
    gradients: int
    adam: int
    whole: int
    """Parameters that are gathered, outside of all passes."""
    notes: int
    """Forward passes that FSDP2 remembers."""
    everything: int
    """Of all parameters over all ranks, fp32."""


def _after_a_step(info: RankInfo, ranks: Ranks, scenario: Scenario) -> list[Bytes]:
    """After a step, and after an evaluation that followed it."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    from internvl_megatron.model.vision_shards import local_shard
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.train.sharded_optimizer import ShardedOptimizer
    from tests.support.training import make_step, replica_rows

    torch.set_num_threads(1)
    device = open_device("cpu")
    config = scenario.config(ranks)
    with joined(info, device, 60):
        groups = make_groups(ranks.layout, device, 60, ranks.vision_layout)
        step, model = make_step(config, None, groups, device)
        rows: Any = replica_rows(scenario, config, 0, ranks.layout, info.rank)
        optimizer = step.optimizer.vision

        def held() -> Bytes:
            parameters = list(model.vision.parameters())
            sharded = [parameter.detach() for parameter in parameters if isinstance(parameter, DTensor)]
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            states = []
            if isinstance(optimizer, ShardedOptimizer):
                states = [tensor for name in optimizer.shards for tensor in optimizer.state_of(name).values()]
            modules = [module for module in model.vision.modules() if isinstance(module, FSDPModule)]
            return Bytes(
                shards=sum(local_shard(parameter).nbytes for parameter in sharded),
                gradients=sum(local_shard(gradient).nbytes for gradient in gradients),
                adam=sum(state.nbytes for state in states),
                whole=sum(parameter.nbytes for parameter in parameters if not isinstance(parameter, DTensor)),
                notes=len(modules[0]._get_fsdp_state()._comm_ctx.post_forward_order),
                everything=sum(4 * parameter.numel() for parameter in sharded),
            )

        step.run(rows, 0)
        found = [held()]
        step.evaluate(rows)
        return [*found, held()]


@pytest.mark.parametrize("trainable", [True, False])
def test_between_steps_a_rank_holds_its_share_and_nothing_whole(
    run_ranks: Callable[..., list[Any]], trainable: bool
) -> None:
    parts = {name: replace(getattr(ADAMW, name), trainable=trainable) for name in ("vision", "projector")}
    scenario = Scenario(
        changes={"optimizer": replace(ADAMW, **parts)}, parallel_changes={"vision_sharding": "sharded"}
    )
    ranks = run_ranks(_after_a_step, 2, LAYOUTS["DP2"], scenario)
    for when in (0, 1):
        held = [found[when] for found in ranks]
        assert sum(one.shards for one in held) == held[0].everything
        for one in held:
            assert (one.whole, one.notes) == (0, 0)
            assert (one.gradients, one.adam) == ((one.shards, 2 * one.shards) if trainable else (0, 0))
