"""The vision side on this rank, and how its copies or shards are kept together: the two ways `Step` can have it.

`replicated`: every rank has all of it; Megatron Core sums gradients and shards the optimizer's state (ZeRO-1). `sharded`: every
rank has a part of everything; FSDP2 gathers parameters layer by layer and scatters gradients while a chunk is computed.
"""

import contextlib
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from internvl_megatron.config.schema import RunConfig
from internvl_megatron.model.build import Model
from internvl_megatron.parallel.groups import Groups
from internvl_megatron.parallel.vision_mesh import SHARDS
from internvl_megatron.train.optimizer import (
    distributed,
    gather_in_next_forward,
    gather_parameters,
    megatron_optimizer,
)
from internvl_megatron.train.sharded_optimizer import ShardedOptimizer


class VisionSide(ABC):
    """InternViT and projector of this rank. What it does between ranks is collective over the vision side's ranks."""

    module: torch.nn.Module
    """Wrapped for its kind of data parallelism."""
    optimizer: MegatronOptimizer | ShardedOptimizer | None
    """None if nothing is trainable."""

    def __call__(self, tiles: Tensor, residual_scale: Tensor | None) -> Tensor:
        """Encode tiles, as `VisionTower.forward` does."""
        return self.module(tiles, residual_scale)

    def train(self) -> None:
        """Before a step."""
        self.module.train()

    def eval(self) -> None:
        """Before an evaluation."""
        self.module.eval()

    @abstractmethod
    def clear(self) -> None:
        """Forget what is left of the last step, but for what the optimizer's `zero_grad` forgets."""

    @abstractmethod
    def backward_pass(self, is_last: bool) -> AbstractContextManager[None]:
        """Goes around every backward pass; every rank must have the same ones, and say of the same one that it is the last."""

    @abstractmethod
    def reduce(self) -> None:
        """Have gradients summed over all ranks, after the last backward pass of a step with images."""

    @abstractmethod
    def gather_in_next_forward(self) -> None:
        """After an update: the next forward pass may find parameters that other ranks have updated."""

    @abstractmethod
    def gather_parameters(self) -> None:
        """Have this rank's parameters up to date for readers outside of a forward pass."""


class ReplicatedVision(VisionSide):
    """Every rank has all parameters and gradients."""

    def __init__(self, config: RunConfig, model: Model, groups: Groups) -> None:
        parts = config.optimizer
        # Inside the pipeline the encoder runs backward once a row, and only some of its ranks do.
        in_pipeline = groups.vision_layout.first_stage_only
        self._groups = groups.vision
        self.module = self._ddp = distributed(model.vision, groups.vision, config, may_overlap=not in_pipeline)
        vision_parts = {"module.projector.*": parts.projector, "*": parts.vision}
        self.optimizer = megatron_optimizer(config, [self._ddp], groups.vision, vision_parts)

    def clear(self) -> None:
        """Clear the gradient buffer."""
        self._ddp.zero_grad_buffer()

    def backward_pass(self, is_last: bool) -> AbstractContextManager[None]:
        """Reductions may start in the one backward pass that every rank has: the last."""
        return contextlib.nullcontext() if is_last else self._ddp.no_sync()

    def reduce(self) -> None:
        """Sum the gradient buffers, or wait until they are summed."""
        finalize_model_grads([self._ddp], None, pg_collection=self._groups)

    def gather_in_next_forward(self) -> None:
        """Where gathers overlap with it."""
        gather_in_next_forward(self._ddp)

    def gather_parameters(self) -> None:
        """Where that has been left to the next forward pass."""
        gather_parameters(self._ddp)


class ShardedVision(VisionSide):
    """Every rank has a part of all parameters, gradients and optimizer state."""

    def __init__(self, config: RunConfig, model: Model) -> None:
        assert model.vision_mesh is not None, "the model is not sharded"
        self.module = model.vision
        named = [(name, parameter) for name, parameter in model.named_parameters() if name.startswith("vision.")]
        self.optimizer = None
        if any(parameter.requires_grad for _, parameter in named):
            self.optimizer = ShardedOptimizer(config.optimizer, named, model.vision_mesh.get_group(SHARDS))

    def __call__(self, tiles: Tensor, residual_scale: Tensor | None) -> Tensor:
        """Encode tiles, as `VisionTower.forward` does."""
        output = super().__call__(tiles, residual_scale)
        if not output.requires_grad:
            self._drop_notes()
        return output

    def clear(self) -> None:
        """Gradients are parameters' own, which the optimizer forgets."""

    def backward_pass(self, is_last: bool) -> AbstractContextManager[None]:
        """Every pass reduces: whole gradients are never kept from one to the next."""
        del is_last
        return contextlib.nullcontext()

    def reduce(self) -> None:
        """Done by every backward pass."""

    def gather_in_next_forward(self) -> None:
        """Every forward pass does."""

    def gather_parameters(self) -> None:
        """This rank's shards are always up to date."""

    def _drop_notes(self) -> None:
        """Drop what FSDP2 notes of forward passes: only a backward pass does otherwise, and without one they pile up."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                state = module._get_fsdp_state()
                state._comm_ctx.post_forward_order.clear()
                if state._fsdp_param_group is not None:
                    state._fsdp_param_group._post_forward_indices.clear()


def vision_side(config: RunConfig, model: Model, groups: Groups) -> VisionSide:
    """The vision side as the configuration wants it."""
    return ReplicatedVision(config, model, groups) if model.vision_mesh is None else ShardedVision(config, model)
