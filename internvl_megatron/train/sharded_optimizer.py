"""The optimizer of a sharded vision side: torch's own over this rank's shards.

It has those methods of Megatron Core's optimizers that `JointOptimizer` uses. Every parameter is a DTensor, but nothing here
asks DTensors to compute: the optimizer sees the shards as plain tensors that share their memory with them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from internvl_megatron.config.schema import OptimizerConfig
from internvl_megatron.model.build import part_of
from internvl_megatron.model.vision_shards import local_shard


@dataclass(frozen=True)
class Shard:
    """A parameter of which this rank has rows."""

    parameter: torch.nn.Parameter
    """The module's DTensor, fp32."""
    own: torch.nn.Parameter
    """This rank's rows of it as the optimizer sees them: the same memory."""


class ShardedOptimizer:
    """AdamW or SGD over the shards of the trainable parameters."""

    def __init__(
        self,
        config: OptimizerConfig,
        parameters: Iterable[tuple[str, torch.nn.Parameter]],
        shard_group: dist.ProcessGroup,
    ) -> None:
        """Take the parameters of a side.

        Args:
            config: of the whole model; says which part a parameter belongs to.
            parameters: by their layout-free names (`Model.named_parameters`), with their final memory.
            shard_group: ranks that hold all shards of a parameter together.
        """
        trainable = {name: parameter for name, parameter in parameters if parameter.requires_grad}
        self.shards: dict[str, Shard] = {}
        """By layout-free name; without parameters that are frozen or of which this rank has no row."""
        self.num_updates = 0
        self._trainable = list(trainable.values())
        self._group = shard_group
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, parameter in trainable.items():
            part = part_of(name, config)
            decays = part.decay == "all" or parameter.dim() > 1
            group = groups.setdefault((part.learning_rate_scale, 1.0 if decays else 0.0), [])
            own = torch.nn.Parameter(local_shard(parameter.detach()))
            if own.numel() > 0:
                self.shards[name] = Shard(parameter, own)
                group.append(own)
        self._inner = _torch_optimizer(
            config, [{"params": own, "lr_mult": rate, "wd_mult": decay} for (rate, decay), own in groups.items()]
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """torch's parameter groups, with the factors `lr_mult` and `wd_mult`; the same on every rank but for `params`."""
        return self._inner.param_groups

    def get_parameters(self) -> list[torch.nn.Parameter]:
        """This rank's shards, their gradients in `grad`."""
        return [shard.own for shard in self.shards.values()]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in (*self._trainable, *self.get_parameters()):
            parameter.grad = None

    def prepare_grads(self) -> bool:
        """Show the optimizer this rank's rows of the gradients; they are zero where no tile gave one.

        Returns:
            False: whether a gradient is finite is seen by the norm.
        """
        for name, shard in self.shards.items():
            same = local_shard(shard.parameter.detach()).data_ptr() == shard.own.data_ptr()
            assert same, f"FSDP2 has moved {name}: the optimizer would update the memory it was in"
            gradient = shard.parameter.grad
            shard.own.grad = torch.zeros_like(shard.own) if gradient is None else local_shard(gradient)
        return False

    def get_grads_for_grad_norm(self) -> list[Tensor]:
        """Gradients of this rank's shards."""
        return [own.grad for own in self.get_parameters() if own.grad is not None]

    def get_grad_stats_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that hold all shards."""
        return self._group

    def step_with_ready_grads(self) -> bool:
        """Update this rank's shards; True, as an update always happens."""
        self._inner.step()
        self.num_updates += 1
        return True

    def reload_model_params(self) -> None:
        """Nothing to do: the module's shards are the only ones there are."""

    def state_of(self, name: str) -> dict[str, Tensor]:
        """AdamW's running means for this rank's rows of a parameter: `exp_avg` and `exp_avg_sq`, fp32, made where missing."""
        own = self.shards[name].own
        state = self._inner.state[own]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=own.device)
            state |= {key: torch.zeros_like(own) for key in ("exp_avg", "exp_avg_sq")}
        return {key: state[key] for key in ("exp_avg", "exp_avg_sq")}

    def set_num_updates(self, num_updates: int) -> None:
        """Go on counting from here; `state_of` has made the state of all parameters."""
        self.num_updates = num_updates
        for state in self._inner.state.values():
            state["step"].fill_(num_updates)


def _torch_optimizer(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Rates and decays of the groups are set before every update (`JointOptimizer.set_learning_rate`)."""
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate)
    # Fused: no temporary copies of the running means.
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )
