"""The reference all layouts are held against: transformers' InternVL in one process, plain PyTorch around it.

Nothing of the package computes here; only the names of parameters are translated, to compare them.
"""

import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint_convert.mapping import mapping, on_disk_name
from internvl_megatron.config.schema import ModelConfig, OptimizerConfig, RunConfig
from internvl_megatron.data.rows import Row
from tests.support.layouts import Ranks, Scenario
from tests.support.models import huggingface_model
from tests.support.rows import StepData
from tests.support.training import Tensors, Trained

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def train_reference(scenario: Scenario, ranks: Ranks) -> Trained:
    """Train a scenario the plain way. Of the layout only the number of replicas matters, to `micro_batch` losses."""
    config = scenario.config(ranks)
    reference = huggingface_model(config.model)
    optimizer = _optimizer(reference, config.optimizer)
    result = Trained()
    for step in range(config.num_steps):
        data = without_broken_images(scenario.data(config, step), scenario)
        optimizer.zero_grad()
        loss = _loss(reference, data, config, ranks.layout.data_size)
        if loss is None:
            result.losses.append(0.0)
            result.updated.append(False)
            continue
        loss.backward()
        trained = [parameter for parameter in reference.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        limit = config.optimizer.clip_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(trained, limit).item()
        if step == 0:
            result.gradients = our_tensors(gradients_of(reference), config.model)
        result.losses.append(loss.item())
        result.grad_norms.append(norm)
        result.updated.append(not (scenario.overflow_in and step == 0))
        for group in optimizer.param_groups:
            group["lr"] = _rate(config.optimizer, step, config.num_steps) * group["scale"]
        if result.updated[-1]:
            optimizer.step()
    result.parameters = our_tensors(reference.state_dict(), config.model)
    with torch.no_grad():
        loss = _loss(
            reference, without_broken_images(scenario.data(config, 0), scenario), config, ranks.layout.data_size
        )
    result.evaluation = 0.0 if loss is None else loss.item()
    return result


def row_logits(reference: torch.nn.Module, row: Row, tiles: list[np.ndarray]) -> Tensor:
    """Logits [T, V] of one packed row; `tiles` are those of its images in order.

    Segments are kept apart by an additive mask: with a mask of another kind, or none, transformers would take
    fractional positions for the starts of new samples, or let samples see each other.
    """
    segment = torch.from_numpy(np.repeat(np.arange(len(row.segment_lengths)), row.segment_lengths))
    place = torch.arange(len(segment))
    seen = (segment[:, None] == segment[None]) & (place[:, None] >= place[None])
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    pixels = {"pixel_values": normalized(np.concatenate(tiles))} if tiles else {}
    output = reference(
        input_ids=torch.from_numpy(row.token_ids).long()[None],
        attention_mask=mask[None, None],
        position_ids=torch.from_numpy(row.positions).float()[None] / 256,
        use_cache=False,
        **pixels,
    )
    return output.logits[0]


def normalized(tiles: np.ndarray) -> Tensor:
    """uint8 [T, 3, H, W] to ImageNet-normalised values."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (torch.from_numpy(tiles).float() / 255 - mean) / std


def from_huggingface(tensors: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Parameters under our names, whole, from a transformers model's tensors under either style of names."""
    renamed = {on_disk_name(name): tensor for name, tensor in tensors.items()}
    entries = mapping(model, "transformers")
    assert renamed.keys() == {name for entry in entries for name in entry.hf_names}, "the table has every tensor once"
    return {entry.name: entry.transform.join([renamed[name] for name in entry.hf_names]) for entry in entries}


def our_tensors(tensors: dict[str, Tensor], model: ModelConfig) -> Tensors:
    """Tensors under our names."""
    return {name: tensor.detach().clone().numpy() for name, tensor in from_huggingface(tensors, model).items()}


def gradients_of(reference: torch.nn.Module) -> dict[str, Tensor]:
    """Gradients under the names of the parameters, zero where there is none."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in reference.named_parameters()}


def images_of(data: StepData, row: int) -> list[np.ndarray]:
    """Tiles of a row's images, in order."""
    return [data.tiles[row, image] for image in range(len(data.rows[row].images))]


def without_broken_images(data: StepData, scenario: Scenario) -> StepData:
    """What is left of a step when images cannot be decoded: black tiles, and no loss on their samples."""
    rows, tiles = list(data.rows), dict(data.tiles)
    for row, image in scenario.broken & data.tiles.keys():
        tiles[row, image] = np.zeros_like(tiles[row, image])
        ends = np.cumsum(rows[row].segment_lengths)
        sample = int((ends <= rows[row].image_starts[image]).sum())
        inside = np.repeat(np.arange(len(ends)), rows[row].segment_lengths) == sample
        rows[row] = replace(rows[row], weights=np.where(inside, 0, rows[row].weights))
    return StepData(rows, tiles)


def _loss(reference: torch.nn.Module, data: StepData, config: RunConfig, num_replicas: int) -> Tensor | None:
    """Weighted cross entropy of the global batch; None without any weight."""
    sums, weights = [], []
    for index, row in enumerate(data.rows):
        logits = row_logits(reference, row, images_of(data, index))
        losses = F.cross_entropy(logits, torch.from_numpy(row.targets).long(), ignore_index=-100, reduction="none")
        sums.append((losses * torch.from_numpy(row.weights)).sum())
        weights.append(float(row.weights.sum(dtype=np.float64)))
    if sum(weights) == 0:
        return None
    if config.loss.normalize == "step":
        return torch.stack(sums).sum() / sum(weights)
    micro_steps = [slice(first, first + num_replicas) for first in range(0, len(sums), num_replicas)]
    # A micro-step without any weight counts as a loss of 0; upstream divides by zero there.
    totals = [sum(weights[rows]) or 1.0 for rows in micro_steps]
    means = [torch.stack(sums[rows]).sum() / total for rows, total in zip(micro_steps, totals, strict=True)]
    return torch.stack(means).mean()


def _optimizer(reference: torch.nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """One group for every parameter: its part says its rate, its decay, and whether it is trained at all."""
    groups = []
    for name, parameter in reference.named_parameters():
        part = config.vision if "vision_tower" in name else config.language
        part = config.projector if "multi_modal_projector" in name else part
        parameter.requires_grad_(part.trainable)
        decays = part.decay == "all" or parameter.dim() > 1
        if part.trainable:
            decay = config.weight_decay if decays else 0.0
            groups.append({"params": [parameter], "scale": part.learning_rate_scale, "weight_decay": decay})
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps)


def _rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    warmup = math.ceil((config.warmup_ratio or 0.0) * num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    fraction = (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup))) / 2
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * fraction
