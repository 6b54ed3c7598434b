"""Bodies of test ranks: train a few steps and return what happened."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product, zip_longest
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from internvl_megatron.config.schema import RunConfig
from internvl_megatron.device import Device, open_device
from internvl_megatron.model.build import Model, build_model
from internvl_megatron.parallel.groups import Groups, make_groups
from internvl_megatron.parallel.layout import Layout
from internvl_megatron.ranks import RankInfo, joined
from internvl_megatron.train import host_memory, optimizer
from internvl_megatron.train.step import Step
from tests.support.layouts import Ranks, Scenario
from tests.support.rows import MemoryRows

Tensors = dict[str, np.ndarray]


@dataclass
class Trained:
    """What happened in every step; gradients of the first step and final parameters under layout-free names."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    updated: list[bool] = field(default_factory=list)
    failed_images: list[int] = field(default_factory=list)
    vision_calls: list[list[int]] = field(default_factory=list)
    """Tiles of every call of the vision tower, by step; dummy tiles counted."""
    gradients: Tensors = field(default_factory=dict)
    """As the optimizer saw them: reduced and clipped. SGD only: the distributed optimizer has shards of them."""
    gradients_of_steps: list[Tensors] = field(default_factory=list)
    """The same for every step, if the scenario asks for it."""
    after_first_step: Tensors = field(default_factory=dict)
    parameters: Tensors = field(default_factory=dict)
    evaluation: float = 0.0
    """Loss of the first step's rows under the final parameters, without drop path."""


def train_scenarios(
    info: RankInfo, ranks: Ranks, scenarios: dict[str, Scenario], weights: dict[str, Tensors]
) -> dict[str, Trained]:
    """Train one scenario after the other under one layout; every rank returns its shards (see `merge`).

    Args:
        info: this rank.
        ranks: the layout.
        scenarios: what to train.
        weights: full starting parameters by family.
    """
    torch.set_num_threads(1)
    # Several buckets, and activations to move, in models as small as these.
    optimizer.BUCKET_PARAMETERS, host_memory.SMALLEST_BYTES = 4000, 64
    device = open_device("cpu")
    with joined(info, device, 60):
        groups = make_groups(ranks.layout, device, 60, ranks.vision_layout)
        return {
            name: _train(scenario, scenario.config(ranks), weights[scenario.family], groups, device)
            for name, scenario in scenarios.items()
        }


def make_step(
    config: RunConfig, weights: Mapping[str, np.ndarray] | None, groups: Groups, device: Device
) -> tuple[Step, Model]:
    """A step around a model, with the given full parameters if there are any."""
    model = build_model(config, groups, device)
    if weights is not None:
        for name, parameter in model.named_parameters():
            model.load_full(name, parameter, torch.from_numpy(weights[name]))
    step = Step(config, model, groups, device)
    if config.loss.kind == "mpo":
        step.keep_as_reference()
    return step, model


def replica_rows(scenario: Scenario, config: RunConfig, step: int, layout: Layout, rank: int) -> MemoryRows:
    """A rank's share of a step: row i belongs to replica i modulo the number of replicas."""
    replica = layout.replica(rank)
    ranks = layout.replica_ranks(replica)
    own = range(replica, config.rows_per_step, layout.data_size)
    return MemoryRows(scenario.data(config, step), own, ranks.index(rank), len(ranks), scenario.broken)


def _train(
    scenario: Scenario, config: RunConfig, weights: Mapping[str, np.ndarray], groups: Groups, device: Device
) -> Trained:
    step, model = make_step(config, weights, groups, device)
    result = Trained()
    calls: list[int] = []
    model.vision.register_forward_pre_hook(lambda _module, inputs: calls.append(len(inputs[0])))
    overflow = _overflow(scenario, model, groups)
    batches: list[Any] = [
        replica_rows(scenario, config, number, groups.layout, groups.rank) for number in range(config.num_steps)
    ]
    for number, (batch, following) in enumerate(zip_longest(batches, batches[1:])):
        outcome = step.run(batch, number, following)
        result.losses.append(outcome.loss)
        result.grad_norms.append(outcome.grad_norm)
        result.updated.append(outcome.updated)
        result.failed_images.append(outcome.agreement.num_failed_images)
        result.vision_calls.append(calls.copy())
        calls.clear()
        if scenario.keeps_gradients:
            result.gradients_of_steps.append(_gradients(model))
        if number == 0:
            if config.optimizer.name == "sgd":
                result.gradients = _gradients(model)
            if overflow is not None:
                overflow.remove()
            step.gather_parameters()
            result.after_first_step = parameters_of(model)
    step.gather_parameters()
    result.parameters = parameters_of(model)
    batch = replica_rows(scenario, config, 0, groups.layout, groups.rank)
    result.evaluation = step.evaluate(batch)  # pyright: ignore[reportArgumentType]
    return result


def _overflow(scenario: Scenario, model: Model, groups: Groups) -> RemovableHandle | None:
    parameter = dict(model.named_parameters()).get(scenario.overflow_in or "")
    if parameter is None or groups.rank != groups.layout.world_size - 1:
        return None
    if isinstance(parameter, DTensor):  # autograd sees gathered parameters only: spoil this rank's rows of the sum
        return parameter.register_post_accumulate_grad_hook(_spoil)
    return parameter.register_hook(lambda gradient: gradient + float("inf"))


def _spoil(parameter: torch.Tensor) -> None:
    assert isinstance(parameter.grad, DTensor), "sharded parameters get sharded gradients"
    parameter.grad.to_local().fill_(float("inf"))


def parameters_of(model: Model) -> Tensors:
    """This rank's part of all parameters; sharded ones whole (collective)."""
    return {name: _array(parameter) for name, parameter in model.named_parameters()}


def _gradients(model: Model) -> Tensors:
    return {name: _array(_gradient(parameter)) for name, parameter in model.named_parameters()}


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What the optimizer has seen; zero if it was frozen or no tile gave one."""
    gradient = parameter.grad if isinstance(parameter, DTensor) else getattr(parameter, "main_grad", None)
    return torch.zeros_like(parameter) if gradient is None or not parameter.requires_grad else gradient


def _array(tensor: torch.Tensor) -> np.ndarray:
    """Values of a tensor; those of a sharded one over all ranks (collective)."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().float().clone().numpy()


def merge(shards: list[Tensors], layout: Layout) -> Tensors:
    """Full tensors from the shards of all ranks, by name; replicas must hold the same."""
    full: Tensors = {}
    for replica, context, stage in product(*map(range, (layout.data_size, layout.context_size, layout.pipeline_size))):
        ranks = [layout.rank(tensor, replica, stage, context) for tensor in range(layout.tensor_size)]
        for name in shards[ranks[0]]:
            tensor = join(name, [shards[rank][name] for rank in ranks])
            if name in full:
                np.testing.assert_array_equal(tensor, full[name], err_msg=f"{name} differs between copies")
            full[name] = tensor
    return full


def join(name: str, parts: list[np.ndarray]) -> np.ndarray:
    """Shards of a tensor, joined along the axis its name says (independent of the code under test)."""
    if "lora" in name:
        axes = {"linear_qkv.lora_b": 0, "linear_fc1.lora_b": 1, "linear_proj.lora_a": 1, "linear_fc2.lora_a": 1}
        axis = axes.get(".".join(name.split(".")[-2:])) if name.startswith("language.") else None
        if axis is not None:
            return np.concatenate(parts, axis=axis)
    elif name.startswith("language.") and len(parts) > 1:
        if name.endswith("linear_fc1.weight"):
            halves = [np.split(part, 2) for part in parts]
            return np.concatenate([*(half[0] for half in halves), *(half[1] for half in halves)])
        if "linear_qkv" in name or "word_embeddings" in name or "output_layer" in name:
            return np.concatenate(parts)
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            return np.concatenate(parts, axis=1)
    for part in parts[1:]:
        np.testing.assert_array_equal(part, parts[0], err_msg=f"{name} differs between tensor-parallel ranks")
    return parts[0]
