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
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.overrides import TorchFunctionMode

from internvl_megatron.config.plan import plan
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.device import Device, open_device
from internvl_megatron.ranks import RankInfo

MAKERS = {"empty", "zeros", "ones", "full", "rand", "randn", "empty_strided"}
META = torch.device("meta")
LIKE_OTHERS = {"empty_like", "zeros_like", "ones_like"}
BACKWARD = {torch.Tensor.backward, torch.autograd.backward}
READS = {torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__float__, torch.Tensor.__bool__}


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
        elif func in BACKWARD:
            with self:  # it is set aside in here otherwise, and what a backward pass computes again makes tensors too
                return _backward(args, kwargs)
        elif func in READS and args[0].is_meta:
            # Whatever decides what the host does next, a loss or a norm: one is finite, and nothing to skip a step for.
            return getattr(torch.ones(args[0].shape, dtype=args[0].dtype), name)()
        elif func is F.scaled_dot_product_attention and args[0].is_meta:
            return _attention(*args, **kwargs)
        elif func is torch.Tensor.to and args[0].is_meta:
            if kwargs.get("device") is not None:
                kwargs["device"] = META
            args = tuple(META if isinstance(one, torch.device | str) else one for one in args)
        found = func(*args, **kwargs)
        # Megatron Core asks for the type of parameters as a text.
        return found.replace("meta.", "") if isinstance(found, str) else found


def _backward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A backward pass from the outputs that are given by place, with the gradients of these, if there are any."""
    outputs: Any
    gradients: Any
    outputs, *more = args
    given = [more.pop(0) if more else None, kwargs.pop("gradient", None), kwargs.pop("grad_tensors", None)]
    gradients = next((one for one in given if one is not None), None)
    assert not any((*more, *kwargs.values())), f"a backward pass with {kwargs or more} is not known here"
    outputs, gradients = ([one] if one is None or isinstance(one, Tensor) else one for one in (outputs, gradients))
    pairs = zip(outputs, gradients, strict=True)
    filled = tuple(torch.ones_like(output) if gradient is None else gradient for output, gradient in pairs)
    run_backward = torch.autograd.Variable._execution_engine.run_backward
    run_backward(tuple(outputs), filled, False, False, (), allow_unreachable=True, accumulate_grad=True)


def _attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
    """What a CPU computes attention with: on the meta device torch would choose another kernel, which keeps other tensors."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, is_causal=is_causal)[0]


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
    """Bytes, as those below."""
    gradients: int
    gradients_of_steps: int
    """Of them those of a sharded encoder, which are there inside a step alone."""
    optimizer: int
    """fp32 copies of the weights, where they are kept, and both of AdamW's moments."""

    @property
    def staying(self) -> int:
        """What is there between steps."""
        return self.weights + self.gradients - self.gradients_of_steps + self.optimizer


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
        return held_bytes(Step(config, model, groups, device), model)


def held_bytes(step: Any, model: Any) -> BuiltBytes:
    """What a rank's step has of its model; makes the optimizers' state if there is none yet."""
    kept = [_kept_by(side) for side in step.optimizer.sides]
    own = weights_of(model)
    of_steps = sum(of_shards for of_shards, _ in kept)
    return BuiltBytes(
        parameters=sum(tensor.numel() for tensor in own),
        weights=sum(tensor.nbytes for tensor in own),
        gradients=sum(tensor.nbytes for tensor in gradients_of(step)) + of_steps,
        gradients_of_steps=of_steps,
        optimizer=sum(tensor.nbytes for _, state in kept for tensor in state),
    )


def tensors_that_stay(step: Any, model: Any) -> list[Tensor]:
    """Those of `held_bytes` that stay from step to step: all but the gradients of a sharded encoder."""
    states = [_kept_by(side)[1] for side in step.optimizer.sides]
    # FSDP2 gathers from tensors of its own: real ones share the shards' memory, those on the meta device do not.
    gathered = [
        parameter._sharded_param_data
        for module in model.vision.modules()
        if isinstance(module, FSDPModule)
        for parameter in getattr(module._get_fsdp_state()._fsdp_param_group, "fsdp_params", ())
    ]
    return [*weights_of(model), *gathered, *gradients_of(step), *(tensor for state in states for tensor in state)]


def weights_of(model: Any) -> list[Tensor]:
    """This rank's parameters, or its shards of them."""
    from internvl_megatron.model.vision_shards import local_shard

    return [local_shard(parameter.detach()) for _, parameter in model.named_parameters()]


def gradients_of(step: Any) -> list[Tensor]:
    """The buffers of gradients."""
    wrapped: list[Any] = [*step.language, getattr(step.vision, "_ddp", None)]
    return [buffer.grad_data for ddp in wrapped if ddp is not None for buffer in ddp.buffers]


def _kept_by(side: Any) -> tuple[int, list[Tensor]]:
    """Of one side's optimizer: bytes of gradients that are not in buffers, and its state."""
    from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer

    from internvl_megatron.train.sharded_optimizer import ShardedOptimizer

    if isinstance(side, ShardedOptimizer):
        states = [tensor for name in side.shards for tensor in side.state_of(name).values()]
        return sum(shard.own.nbytes for shard in side.shards.values()), states
    found: list[Tensor] = []
    for part in side.chained_optimizers if isinstance(side, ChainedOptimizer) else [side]:
        assert isinstance(part, DistributedOptimizer), f"AdamW's optimizer is sharded, this is a {type(part).__name__}"
        if not part.optimizer.state:
            part._init_optimizer_states_with_dummy_values()
        found += [tensor for group in part.shard_fp32_from_float16_groups for tensor in group]
        found += [state[key] for state in part.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    return 0, found
