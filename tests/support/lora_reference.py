"""Low-rank adapters in plain PyTorch: transformers' InternVL computed with W + scale * B A in place of W.

An adapter is of a matrix of Megatron Core; the table of names says which of transformers' its rows are.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoint_convert.mapping import Entry, in_memory_name, mapping
from internvl_megatron.config.schema import LoraConfig, ModelConfig, RunConfig
from tests.support.layouts import Ranks, Scenario
from tests.support.models import huggingface_model
from tests.support.reference import _loss, _rate, our_tensors
from tests.support.training import Tensors, Trained

ATTENTION, MLP = ("linear_qkv", "linear_proj"), ("linear_fc1", "linear_fc2")


def adapted_entries(model: ModelConfig, lora: LoraConfig) -> dict[str, Entry]:
    """Matrices with adapters: the beginning of the names of each, and its row of the table."""
    layers = {"all": ATTENTION + MLP, "attention": ATTENTION, "mlp": MLP}[lora.layers]
    ranks = {"language": lora.language_rank, "vision": lora.vision_rank, "projector": None}
    return {
        entry.name.removesuffix(".weight"): entry
        for entry in mapping(model, "transformers")
        if ranks[entry.part] and entry.name.endswith(tuple(f"{layer}.weight" for layer in layers))
    }


def random_adapters(model: ModelConfig, lora: LoraConfig, seed: int = 3) -> Tensors:
    """Adapters that change something from the beginning, so that A has a gradient too."""
    generator, adapters = np.random.default_rng(seed), {}
    for name, entry in adapted_entries(model, lora).items():
        rank = lora.language_rank if entry.part == "language" else lora.vision_rank
        assert rank is not None, "only parts with a rank have adapters"
        outputs, inputs = entry.shape
        gated = entry.part == "language" and "linear_fc1" in name
        shape_b = (2, outputs // 2, rank) if gated else (outputs, rank)
        for end, shape, spread in (("lora_a", (rank, inputs), inputs**-0.5), ("lora_b", shape_b, 0.1)):
            adapters[f"{name}.{end}"] = (spread * generator.standard_normal(shape)).astype(np.float32)
    return adapters


def merged_model(
    reference: torch.nn.Module, config: RunConfig, start: Tensors, adapters: dict[str, Tensor]
) -> Callable[..., Any]:
    """A model like the reference whose adapted matrices are W + scale * B A, W as in `start`."""
    changed = {}
    for name, entry in adapted_entries(config.model, config.lora).items():
        a, b = (adapters[f"{name}.{end}"] for end in ("lora_a", "lora_b"))
        whole = torch.from_numpy(start[entry.name]) + config.lora.scale * b.reshape(-1, b.shape[-1]) @ a
        parts = entry.transform.split(whole)
        changed |= {in_memory_name(hf): part for hf, part in zip(entry.hf_names, parts, strict=True)}
    return lambda **inputs: torch.func.functional_call(reference, changed, (), inputs)


def train_lora_reference(scenario: Scenario, ranks: Ranks, start: Tensors) -> Trained:
    """Train the adapters, and the projector if that is asked for, the plain way."""
    config = scenario.config(ranks)
    reference = huggingface_model(config.model)
    adapters = {
        name: torch.from_numpy(value.copy()).requires_grad_() for name, value in start.items() if "lora" in name
    }
    parts, groups = config.optimizer, []
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_("multi_modal_projector" in name and parts.projector.trainable)
        if parameter.requires_grad:
            groups.append({"params": [parameter], "scale": parts.projector.learning_rate_scale})
    for name, parameter in adapters.items():
        part = parts.language if name.startswith("language.") else parts.vision
        groups.append({"params": [parameter], "scale": part.learning_rate_scale})
    if parts.name == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=1.0)
    else:
        decay, betas = parts.weight_decay, (parts.beta1, parts.beta2)
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=parts.eps, weight_decay=decay)
    trained: list[Tensor] = [group["params"][0] for group in groups]
    result = Trained()

    def loss_of(step: int) -> Tensor:
        model: Any = merged_model(reference, config, start, adapters)
        loss = _loss(model, scenario.data(config, step), config, ranks.layout.data_size)
        assert loss is not None, "every step has targets"
        return loss

    for step in range(config.num_steps):
        optimizer.zero_grad()
        loss = loss_of(step)
        loss.backward()
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        result.losses.append(loss.item())
        result.grad_norms.append(torch.nn.utils.clip_grad_norm_(trained, parts.clip_grad_norm or np.inf).item())
        result.updated.append(True)
        if step == 0:
            whole = {
                name: parameter.grad if parameter.requires_grad and parameter.grad is not None else parameter * 0
                for name, parameter in reference.named_parameters()
            }
            result.gradients = our_tensors(whole, config.model) | {
                name: parameter.grad.numpy().copy()
                for name, parameter in adapters.items()
                if parameter.grad is not None
            }
        for group in optimizer.param_groups:
            group["lr"] = _rate(parts, step, config.num_steps) * group["scale"]
        optimizer.step()
    result.parameters = our_tensors(reference.state_dict(), config.model) | {
        name: parameter.detach().numpy() for name, parameter in adapters.items()
    }
    with torch.no_grad():
        result.evaluation = loss_of(0).item()
    return result
