"""An AdamW with the interface, and the copies, of Transformer Engine's `FusedAdam`, and Megatron Core told to use it, on a CPU."""

import sys
from collections.abc import Callable
from copy import deepcopy
from itertools import chain
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    """With fp32 weights and, as its arguments say, moments in bf16; after `fused_adam.py` of Transformer Engine 2.20."""

    copied_bytes = 0
    """Of fp32 copies of moments, and of state that was allocated anew, wherever that happened, by all optimizers."""

    def __init__(
        self,
        params: Any,
        *,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        master_weight_dtype: torch.dtype = torch.float32,
        master_weights: bool = False,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        **defaults: Any,
    ) -> None:
        super().__init__(params, {name: defaults[name] for name in ("lr", "betas", "eps", "weight_decay")})
        self.master_weights, self.use_decoupled_grad = master_weights, use_decoupled_grad
        self.store_param_remainders = store_param_remainders
        self.name_to_dtype_map = {
            "exp_avg": exp_avg_dtype,
            "exp_avg_sq": exp_avg_sq_dtype,
            "master_param": master_weight_dtype,
        }

    def get_unscaled_state(self, param: Tensor, state_name: str, skip_unscale: bool = False) -> Tensor:
        """fp32, unless told otherwise."""
        state = self.state[param][state_name]
        assert state.dtype == self.name_to_dtype_map[state_name], (state_name, state.dtype)
        if skip_unscale or state.dtype == torch.float32:
            return state
        FusedAdam.copied_bytes += 4 * state.numel()
        return state.float()

    def set_scaled_state(self, param: Tensor, state_name: str, unscaled_state: Tensor) -> None:
        """Put fp32 values where the state is, which is made if it is not there."""
        assert unscaled_state.dtype == torch.float32, (state_name, unscaled_state.dtype)
        if state_name not in self.state[param]:
            self._initialize_state(param, state_name)
        self.state[param][state_name].copy_(unscaled_state)

    def _initialize_state(self, param: Tensor, state_name: str) -> None:
        state = torch.zeros_like(param, dtype=self.name_to_dtype_map[state_name])
        FusedAdam.copied_bytes += state.nbytes
        self.state[param][state_name] = state

    def initialize_state(self, param: Tensor, store_param_remainders: bool) -> None:
        """Of a parameter that has none."""
        assert not store_param_remainders, "weights are kept whole"
        for name in ("exp_avg", "exp_avg_sq", "master_param"):
            self._initialize_state(param, name)
        self.set_scaled_state(param, "master_param", param.detach().float())

    def state_dict(self) -> dict[str, Any]:
        """All state in fp32."""
        state_dict = super().state_dict()
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        for number, values in state_dict["state"].items():
            unscaled = {name: self.get_unscaled_state(params[number], name) for name in values}
            state_dict["state"][number] = unscaled
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Allocates everything anew."""
        super().load_state_dict(state_dict)
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        for number, values in deepcopy(state_dict["state"]).items():
            self.state[params[number]] = {}
            for name, value in values.items():
                self.set_scaled_state(params[number], name, value.float())

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """AdamW in fp32."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), count = group["betas"], group["step"]
            for param in group["params"]:
                if not self.state[param]:
                    self.initialize_state(param, self.store_param_remainders)
                gradient = param.decoupled_grad.float()
                names = ("exp_avg", "exp_avg_sq", "master_param")
                mean, square, weight = (
                    self.get_unscaled_state(param, name, skip_unscale=True).float() for name in names
                )
                mean = mean.lerp(gradient, 1 - beta1)
                square = square.lerp(gradient.square(), 1 - beta2)
                denominator = (square / (1 - beta2**count)).sqrt() + group["eps"]
                weight = weight * (1 - group["lr"] * group["weight_decay"])
                weight = weight - group["lr"] * mean / (1 - beta1**count) / denominator
                for name, value in zip(names, (mean, square, weight), strict=True):
                    self.set_scaled_state(param, name, value)
                param.copy_(weight)


def use_fused_adam(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Have Megatron Core take it for Transformer Engine's; to be called where a process may stay like that, on a CPU.

    Args:
        set_attribute: `setattr`, or what undoes it later.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    package, pytorch, optimizers = (
        ModuleType(f"transformer_engine{name}") for name in ("", ".pytorch", ".pytorch.optimizers")
    )
    setattr(optimizers, "FusedAdam", FusedAdam)
    setattr(package, "__version__", "0.0.0")  # as where there is none: only the optimizer is to change
    sys.modules |= {module.__name__: module for module in (package, pytorch, optimizers)}
    for module in (optimizer, distrib_optimizer):
        set_attribute(module, "Adam", FusedAdam)
    set_attribute(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    set_attribute(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    set_attribute(distrib_optimizer, "USING_TE_OPTIMIZER", True)
