"""Both sides' optimizers behind one: one learning rate, one gradient norm, one decision to update.

The language model and the vision tower are sharded differently, so each has its own optimizer. Whatever must be joint is joined here: the global gradient norm, clipping by it, and that either both take a step or none does.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from internvl_megatron.config.optimizer_rules import num_decay_steps, num_schedule_steps, num_warmup_steps
from internvl_megatron.config.schema import OptimizerConfig, PartConfig, RunConfig
from internvl_megatron.model.build import torch_dtype
from internvl_megatron.train.sharded_optimizer import ShardedOptimizer


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Learning rate of a step counted from 0: linear warm-up, then as `schedule` says.

    `wsd` is "warm-up, stable, decay" (MiniCPM, arXiv 2404.06395) with a linear decay. Warm-up begins at the first step's share,
    not at 0, so that no step is lost. Steps count the same whatever number of rows they have. Behind its schedule's end a run stays at
    the minimum; one that ends before does not get there.
    """
    warmup_steps, horizon = num_warmup_steps(config, num_steps), num_schedule_steps(config, num_steps)
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "wsd":
        share = min(1.0, max(0, horizon - step) / num_decay_steps(config, num_steps))
    else:
        progress = (step - warmup_steps) / max(1, horizon - warmup_steps)
        share = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.min_learning_rate + share * (config.learning_rate - config.min_learning_rate)


PARTS = ("vision", "projector", "language")
"""Of the model: vision encoder, projector, language model."""

BUCKET_PARAMETERS: int | None = None
"""Parameters whose gradients travel together where communication overlaps; None = Megatron Core's choice (40 M or more)."""


def distributed(
    module: MegatronModule, groups: ProcessGroupCollection, config: RunConfig, may_overlap: bool = True
) -> DistributedDataParallel:
    """Wrap one side of the model for data parallelism, with ZeRO-1 where the optimizer supports it.

    From here on parameters have a place in a gradient buffer, which Transformer Engine's linear layers can add to.
    """
    parallel, is_sharded = config.parallel, _is_sharded(config.optimizer)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.dtype == "bf16",
        overlap_grad_reduce=may_overlap and parallel.overlap_gradients,
        overlap_param_gather=may_overlap and parallel.overlap_parameters and is_sharded,
        bucket_size=BUCKET_PARAMETERS,
        use_distributed_optimizer=is_sharded,
        check_for_nan_in_grad=False,
    )
    wrapped = DistributedDataParallel(module.config, settings, module, pg_collection=groups)
    for layer in module.modules():
        if hasattr(layer, "fuse_wgrad_accumulation"):
            setattr(layer, "fuse_wgrad_accumulation", config.kernels.fuse_gradient_accumulation)
    return wrapped


def _is_sharded(config: OptimizerConfig) -> bool:
    """Megatron Core's distributed optimizer shards Adam only; SGD keeps whole parameters on every rank."""
    return config.name == "adamw"


@dataclass(frozen=True)
class UpdateResult:
    """What one update did."""

    grad_norm: float
    """Norm over all parameters of both sides, before clipping."""
    part_grad_norms: dict[str, float]
    """The same over the trained ones of `PARTS` alone."""
    updated: bool
    """False where the step was bad: then neither side changed."""


class JointOptimizer:
    """The optimizers of the vision tower and the language model."""

    def __init__(
        self,
        config: RunConfig,
        vision: MegatronOptimizer | ShardedOptimizer | None,
        projector: Sequence[torch.nn.Parameter],
        language: MegatronOptimizer | None,
        device: torch.device,
    ) -> None:
        """Join the sides' optimizers; None stands for a side without trainable parameters.

        Args:
            config: of the run.
            vision: of vision encoder and projector.
            projector: which of the vision side's parameters are the projector's.
            language: of the language model.
            device: where gradients are.
        """
        self._device = device
        self._projector = projector
        self.config = config.optimizer
        self.num_steps = config.num_steps
        self.vision = vision
        self.language = language
        self.sides = tuple(side for side in (self.vision, self.language) if side is not None)
        # Kept here, because a checkpoint brings the factors of its own time.
        self._factors = [[(group["lr_mult"], group["wd_mult"]) for group in side.param_groups] for side in self.sides]

    def set_learning_rate(self, step: int) -> float:
        """Set the rates and weight decays for a step counted from 0; returns the rate that parts have factors on."""
        rate = learning_rate(self.config, step, self.num_steps)
        for optimizer, factors in zip(self.sides, self._factors, strict=True):
            for group, (rate_factor, decay_factor) in zip(optimizer.param_groups, factors, strict=True):
                group["lr"] = rate * rate_factor
                group["weight_decay"] = self.config.weight_decay * decay_factor
        return rate

    def zero_grad(self) -> None:
        """Forget the last step's gradients (the DDP buffers are cleared by themselves).

        Megatron Core's plain optimizers leave `param.grad` as an alias of the DDP buffer: kept, the next backward would
        add every gradient twice.
        """
        for optimizer in self.sides:
            optimizer.zero_grad()

    def reload_parameters(self) -> None:
        """Take over weights that were put into the modules from outside (the optimizers keep fp32 copies in bf16)."""
        for optimizer in self.sides:
            optimizer.reload_model_params()

    @torch.no_grad()
    def clip_and_step(self, is_good: Callable[[float], bool] = math.isfinite) -> UpdateResult:
        """Clip by the joint norm and update both sides, or neither if the norm is not finite or not good for another reason.

        In bf16 nothing else looks: without a loss scaler Megatron Core applies non-finite gradients.
        """
        for optimizer in self.sides:
            optimizer.prepare_grads()
        # The one thing of an update that the host waits for.
        squares = torch.stack([self._squared_norms(side) for side in self.sides]).double().sum(dim=0).tolist()
        grad_norm = math.sqrt(sum(squares))
        settings = (self.config.vision, self.config.projector, self.config.language)
        part_grad_norms = {
            part: math.sqrt(square)
            for part, square, setting in zip(PARTS, squares, settings, strict=True)
            if setting.trainable
        }
        if not (is_good(grad_norm) and math.isfinite(grad_norm)):
            return UpdateResult(grad_norm, part_grad_norms, updated=False)
        for optimizer in self.sides:
            parameters: list[torch.Tensor] = [*optimizer.get_parameters()]
            if self.config.clip_grad_norm is not None and parameters:
                has_own_place = self.config.moments == "bf16"  # Megatron Core keeps their gradients under another name
                clip_grad_by_total_norm_fp32(parameters, self.config.clip_grad_norm, grad_norm, has_own_place)
            optimizer.step_with_ready_grads()
        return UpdateResult(grad_norm, part_grad_norms, updated=True)

    def _squared_norms(self, side: MegatronOptimizer | ShardedOptimizer) -> torch.Tensor:
        """Of the gradients of a side by `PARTS`, over all ranks that hold some of them: fp32 [3] on the device; collective.

        The host reads Megatron Core's own norm of each side, and, without Transformer Engine or Apex, that of every gradient
        by itself.
        """
        total = torch.zeros(len(PARTS), device=self._device)
        for optimizer in getattr(side, "chained_optimizers", [side]):
            squares = torch.zeros(len(PARTS), device=self._device)
            for place, gradients in enumerate(self._gradients_of_parts(optimizer, side is self.language)):
                if gradients:
                    squares[place] += torch.nn.utils.get_total_norm(gradients).square()
            torch.distributed.all_reduce(squares, group=optimizer.get_grad_stats_parallel_group())
            total += squares
        return total

    def _gradients_of_parts(self, optimizer: Any, is_language: bool) -> tuple[list[torch.Tensor], ...]:
        """Those of an optimizer's gradients that this rank has to count, by `PARTS`."""
        gradients: list[torch.Tensor] = optimizer.get_grads_for_grad_norm()
        if is_language:
            return [], [], gradients
        owned = [_optimized(optimizer, parameter) for parameter in self._projector if parameter.requires_grad]
        name = "decoupled_grad" if self.config.moments == "bf16" else "grad"
        of_projector = {id(getattr(parameter, name)) for parameter in owned if parameter is not None}
        vision = [gradient for gradient in gradients if id(gradient) not in of_projector]
        return vision, [gradient for gradient in gradients if id(gradient) in of_projector], []


def _optimized(optimizer: Any, parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """What an optimizer has in place of a parameter: this rank's shard of it, or an fp32 copy; None if that is elsewhere."""
    if isinstance(optimizer, ShardedOptimizer):
        return next((shard.own for shard in optimizer.shards.values() if shard.parameter is parameter), None)
    places = getattr(optimizer, "model_param_group_index_map", None)
    if places is None:
        copy = getattr(parameter, "main_param", None)
        return parameter if copy is None else copy
    if parameter not in places:
        return None
    group, place = places[parameter]
    return optimizer.optimizer.param_groups[group]["params"][place]


def gather_in_next_forward(module: DistributedDataParallel) -> None:
    """Make the next forward pass gather what the optimizers have updated, where that overlaps.

    Megatron Core notes it when it finishes reducing gradients, which the vision side does not do in a step without images.
    """
    if module.ddp_config.overlap_param_gather:
        module.reset_param_sync_dispatch_state()


def gather_parameters(module: DistributedDataParallel) -> None:
    """Have all parameters up to date on this rank, as whoever reads them outside of a forward pass needs; collective."""
    if module.ddp_config.overlap_param_gather:
        module.start_param_sync(force_sync=True)


def megatron_optimizer(
    config: RunConfig,
    modules: Sequence[DistributedDataParallel],
    groups: ProcessGroupCollection,
    parts: Mapping[str, PartConfig],
) -> MegatronOptimizer | None:
    """Optimizer of one side; None if none of its parts is trainable.

    Args:
        config: of the run.
        modules: the side's module, or its chunks.
        groups: process groups of the side.
        parts: parts of the side by a pattern of their parameters' names; the first that fits counts.
    """
    if not any(part.trainable for part in parts.values()):
        return None
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
        "overlap_param_gather": config.parallel.overlap_parameters and _is_sharded(optimizer),
    }
    if optimizer.moments == "bf16":
        # Checkpoints hold fp32 weights whatever the moments are, so they are kept whole, not as what bf16 ones lack.
        settings |= {"use_precision_aware_optimizer": True, "store_param_remainders": False}
        settings |= {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}
    # Only these two of the keys that Megatron Core's type lists for a group differ; `set_learning_rate` applies them.
    overrides: Any = {
        ParamKey(with_name_predicate=ParamWithNamePredicate(f"{pattern}/{decays}", _fits(parts, pattern, decays))): {
            "lr_mult": part.learning_rate_scale,
            "wd_mult": 1.0 if decays else 0.0,
        }
        for pattern, part in parts.items()
        for decays in (True, False)
    }
    return get_megatron_optimizer(
        CoreOptimizerConfig(**settings),
        list(modules),
        config_overrides=overrides,
        use_gloo_process_groups=False,
        pg_collection=groups,
    )


def _fits(parts: Mapping[str, PartConfig], pattern: str, decays: bool) -> Callable[[torch.nn.Parameter, str], bool]:
    """Whether a parameter belongs to a part, and weight decay applies to it or not."""

    def fits(parameter: torch.nn.Parameter, name: str) -> bool:
        first = next(candidate for candidate in parts if fnmatch(name, candidate))
        return first == pattern and decays == (parts[pattern].decay == "all" or parameter.dim() > 1)

    return fits
