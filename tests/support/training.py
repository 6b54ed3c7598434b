"""Bodies of test ranks: train a few steps and return what happened."""

from dataclasses import dataclass

import numpy as np
import torch

from internvl_megatron.config.schema import RunConfig
from internvl_megatron.ranks import RankInfo


@dataclass
class Trained:
    """Losses and norms of every step; full gradients of the first step under layout-free names; final parameters."""

    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, np.ndarray]
    parameters: dict[str, np.ndarray]


def train_steps(info: RankInfo, config: RunConfig, weights: dict[str, np.ndarray] | None, rows_seed: int) -> Trained:
    """Train `config.num_steps` steps on random rows; every rank returns its shards (merged by `merge`)."""
    from internvl_megatron.device import open_device
    from internvl_megatron.model.build import build_model
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.parallel.layout import Layout
    from internvl_megatron.ranks import joined
    from internvl_megatron.train.step import Step
    from tests.support.layouts import MemoryRows, random_rows

    torch.set_num_threads(1)
    device = open_device("cpu")
    sizes = config.parallel
    with joined(info, device, 60):
        layout = Layout(
            sizes.tensor_size, sizes.pipeline_size, info.world_size // sizes.tensor_size // sizes.pipeline_size
        )
        groups = make_groups(layout, device, 60)
        model = build_model(config, groups, device)
        if weights is not None:
            for name, parameter in model.named_parameters():
                model.load_full(name, parameter, torch.from_numpy(weights[name]))
        step = Step(config, model, groups, device)
        result = Trained([], [], {}, {})
        replica = layout.replica(info.rank)
        place = layout.replica_ranks(replica).index(info.rank)
        for number in range(config.num_steps):
            rows, tiles = random_rows(config.model, config.rows_per_step, rows_seed + number)
            mine = range(replica, config.rows_per_step, layout.data_size)
            own_tiles = {(mine.index(row), image): value for (row, image), value in tiles.items() if row in mine}
            batch = MemoryRows([rows[row] for row in mine], own_tiles, place, len(layout.replica_ranks(replica)))
            outcome = step.run(batch, number)  # pyright: ignore[reportArgumentType]
            result.losses.append(outcome.loss)
            result.grad_norms.append(outcome.grad_norm)
            if number == 0:
                # SGD without sharding: main_grad holds the whole reduced (and, in fp32, clipped) gradient
                result.gradients = {name: p.main_grad.clone().numpy() for name, p in model.named_parameters()}
        result.parameters = {name: p.detach().clone().numpy() for name, p in model.named_parameters()}
        return result


def merge(shards: list[Trained], config: RunConfig, what: str) -> dict[str, np.ndarray]:
    """Full tensors from all ranks' shards, by name (first replica)."""
    from internvl_megatron.parallel.layout import Layout

    sizes = config.parallel
    layout = Layout(sizes.tensor_size, sizes.pipeline_size, len(shards) // sizes.tensor_size // sizes.pipeline_size)
    full: dict[str, np.ndarray] = {}
    for stage in range(layout.pipeline_size):
        ranks = [layout.rank(tensor, 0, stage) for tensor in range(layout.tensor_size)]
        for name in getattr(shards[ranks[0]], what):
            full[name] = join(name, [getattr(shards[rank], what)[name] for rank in ranks])
    return full


def join(name: str, parts: list[np.ndarray]) -> np.ndarray:
    """Shards of a tensor, joined along the axis its name says (independent of the code under test)."""
    if not name.startswith("language.") or len(parts) == 1:
        return parts[0]
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
