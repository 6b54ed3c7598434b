"""Both sides' optimizers behind one: one learning rate, one gradient norm, one decision to update.

The language model and the vision tower are sharded differently, so each has its own Megatron Core optimizer. Whatever
must be joint is joined here: the global gradient norm, clipping by it, and that either both take a step or none does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from internvl_megatron.config.schema import OptimizerConfig, RunConfig
from internvl_megatron.model.build import torch_dtype


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Learning rate of a step counted from 0: linear warm-up, then cosine to the minimum (or constant)."""
    warmup_steps = math.ceil(config.warmup_ratio * num_steps)
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.min_learning_rate + cosine * (config.learning_rate - config.min_learning_rate)


def distributed(module: MegatronModule, groups: ProcessGroupCollection, config: RunConfig) -> DistributedDataParallel:
    """Wrap one side of the model for data parallelism, with ZeRO-1 where the optimizer supports it."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.dtype == "bf16",
        overlap_grad_reduce=False,
        use_distributed_optimizer=_is_sharded(config.optimizer),
        check_for_nan_in_grad=False,
    )
    return DistributedDataParallel(module.config, settings, module, pg_collection=groups)


def _is_sharded(config: OptimizerConfig) -> bool:
    """Megatron Core's distributed optimizer shards Adam only; SGD keeps whole parameters on every rank."""
    return config.name == "adamw"


@dataclass(frozen=True)
class UpdateResult:
    """What one update did."""

    grad_norm: float
    """Norm over all parameters of both sides, before clipping."""
    updated: bool
    """False where the norm was not finite: then neither side changed."""


class JointOptimizer:
    """The optimizers of the vision tower and the language model."""

    def __init__(
        self,
        config: RunConfig,
        vision: DistributedDataParallel,
        language: Sequence[DistributedDataParallel],
        vision_groups: ProcessGroupCollection,
        language_groups: ProcessGroupCollection,
    ) -> None:
        self.config = config.optimizer
        self.num_steps = config.num_steps
        self.vision = _optimizer(config, [vision], vision_groups)
        self.language = _optimizer(config, language, language_groups)

    def set_learning_rate(self, step: int) -> float:
        """Set both optimizers' rates for a step counted from 0 and return the language model's."""
        rate = learning_rate(self.config, step, self.num_steps)
        for optimizer, scale in ((self.language, 1.0), (self.vision, self.config.vision_learning_rate_scale)):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
        return rate

    def zero_grad(self) -> None:
        """Forget the last step's gradients (the DDP buffers are cleared by themselves).

        Megatron Core's plain optimizers leave `param.grad` as an alias of the DDP buffer: kept, the next backward would
        add every gradient twice.
        """
        for optimizer in (self.vision, self.language):
            optimizer.zero_grad()

    def reload_parameters(self) -> None:
        """Take over weights that were put into the modules from outside (the optimizers keep fp32 copies in bf16)."""
        for optimizer in (self.vision, self.language):
            optimizer.reload_model_params()

    @torch.no_grad()
    def clip_and_step(self) -> UpdateResult:
        """Clip by the joint norm and update both sides, or neither if the norm is not finite.

        In bf16 nothing else looks: without a loss scaler Megatron Core applies non-finite gradients.
        """
        sides = (self.vision, self.language)
        for optimizer in sides:
            optimizer.prepare_grads()
        grad_norm = math.sqrt(sum(float(optimizer.get_grad_norm()) ** 2 for optimizer in sides))
        if not math.isfinite(grad_norm):
            return UpdateResult(grad_norm, updated=False)
        for optimizer in sides:
            parameters: list[torch.Tensor] = [*optimizer.get_parameters()]
            if self.config.clip_grad_norm is not None and parameters:
                clip_grad_by_total_norm_fp32(parameters, self.config.clip_grad_norm, grad_norm)
            optimizer.step_with_ready_grads()
        return UpdateResult(grad_norm, updated=True)


def _optimizer(
    config: RunConfig, modules: Sequence[DistributedDataParallel], groups: ProcessGroupCollection
) -> MegatronOptimizer:
    optimizer = config.optimizer
    dtype = torch_dtype(config.dtype)
    settings: dict[str, Any] = {
        "optimizer": "adam" if optimizer.name == "adamw" else "sgd",
        "lr": optimizer.learning_rate,
        "min_lr": optimizer.min_learning_rate,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.beta1,
        "adam_beta2": optimizer.beta2,
        "adam_eps": optimizer.eps,
        "sgd_momentum": 0.0,
        "clip_grad": 0.0,
        "bf16": dtype == torch.bfloat16,
        "params_dtype": dtype,
        "use_distributed_optimizer": _is_sharded(optimizer),
    }
    # No overrides: weight decay on every parameter, as InternVL's DeepSpeed runs have it.
    return get_megatron_optimizer(
        CoreOptimizerConfig(**settings),
        list(modules),
        config_overrides={},
        use_gloo_process_groups=False,
        pg_collection=groups,
    )
