"""One process as any rank of a world of any size: messages go nowhere, and parameters take no memory.

What is built is what trains, the modules, buffers and optimizers of a rank at their full sizes, but floating-point tensors are on
torch's meta device. A rank of the 78B's 64 takes three seconds and 0.8 GB.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from internvl_megatron.config.plan import plan
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.device import Device, open_device
from internvl_megatron.ranks import RankInfo

MAKERS = {"empty", "zeros", "ones", "full", "rand", "randn", "empty_strided"}
META = torch.device("meta")
LIKE_OTHERS = {"empty_like", "zeros_like", "ones_like"}


class FakeWorldDevice(Device):
    """A CPU whose messages go nowhere."""

    @property
    def backend(self) -> str:
        """torch's, which does nothing."""
        return "fake"

    @property
    def host_backend(self) -> str:
        """The same."""
        return "fake"


class _WithoutMemory(TorchFunctionMode):
    """New floating-point tensors are on the meta device and stay there; small ones made from values, and integers, are real."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        dtype = kwargs.get("dtype")
        makes = name in MAKERS and (dtype is None or dtype.is_floating_point)
        if makes or (name in LIKE_OTHERS and args[0].is_floating_point()):
            kwargs["device"] = META
        elif func is torch.Tensor.to and args[0].is_meta:
            if kwargs.get("device") is not None:
                kwargs["device"] = META
            args = tuple(META if isinstance(one, torch.device | str) else one for one in args)
        found = func(*args, **kwargs)
        # Megatron Core asks for the type of parameters as a text.
        return found.replace("meta.", "") if isinstance(found, str) else found


@contextmanager
def without_memory() -> Iterator[None]:
    """In the block, parameters and what optimizers keep of them take no memory, and all ranks gather what this one gives."""

    def gather(found: list[Any], own: Any, group: Any = None) -> None:
        del group
        found[:] = [own] * len(found)

    with patch.object(dist, "all_gather_object", gather), _WithoutMemory():
        yield


@dataclass(frozen=True)
class BuiltBytes:
    """What a rank has made."""

    parameters: int
    """Elements, those of shards counted, others not."""
    weights: int
    """Bytes, as the two below."""
    gradients: int
    optimizer: int
    """fp32 copies of the weights, where they are kept, and both of AdamW's moments."""


def built_bytes(info: RankInfo, config: RunConfig, num_ranks: int, rank: int) -> BuiltBytes:
    """Body of a process that becomes a rank of a fake world: builds model and optimizers, and counts.

    Args:
        info: not looked at; there is one process.
        config: of a run with AdamW on a CPU.
        num_ranks: size of the world.
        rank: which rank to be.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from internvl_megatron.model.build import build_model
    from internvl_megatron.model.vision_shards import local_shard
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.train.step import Step

    del info
    made = plan(config, num_ranks)
    open_device("cpu")
    device = FakeWorldDevice(kind="cpu", index=0, attention="sdpa")
    dist.init_process_group("fake", rank=rank, world_size=num_ranks, store=FakeStore())
    groups = make_groups(made.layout, device, 60, made.vision_layout)
    with without_memory():
        model = build_model(config, groups, device, initialize=False)
        step = Step(config, model, groups, device)
        own = [local_shard(parameter.detach()) for _, parameter in model.named_parameters()]
        wrapped: list[Any] = [*step.language, getattr(step.vision, "_ddp", None)]
        gradients = sum(buffer.grad_data.nbytes for ddp in wrapped if ddp is not None for buffer in ddp.buffers)
        kept = [_kept_by(side) for side in step.optimizer.sides]
    return BuiltBytes(
        parameters=sum(tensor.numel() for tensor in own),
        weights=sum(tensor.nbytes for tensor in own),
        gradients=gradients + sum(of_shards for of_shards, _ in kept),
        optimizer=sum(state for _, state in kept),
    )


def _kept_by(side: Any) -> tuple[int, int]:
    """Bytes of (gradients that are not in buffers, optimizer state) of one side's optimizer."""
    from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer

    from internvl_megatron.train.sharded_optimizer import ShardedOptimizer

    if isinstance(side, ShardedOptimizer):
        states = [tensor for name in side.shards for tensor in side.state_of(name).values()]
        return sum(shard.own.nbytes for shard in side.shards.values()), sum(state.nbytes for state in states)
    total = 0
    for part in side.chained_optimizers if isinstance(side, ChainedOptimizer) else [side]:
        assert isinstance(part, DistributedOptimizer), f"AdamW's optimizer is sharded, this is a {type(part).__name__}"
        part._init_optimizer_states_with_dummy_values()
        masters = [tensor for group in part.shard_fp32_from_float16_groups for tensor in group]
        moments = [state[key] for state in part.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        total += sum(tensor.nbytes for tensor in (*masters, *moments))
    return 0, total
