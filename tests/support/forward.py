"""Bodies of test ranks: forward passes of a whole model on one rank."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from internvl_megatron.config.schema import RunConfig
from internvl_megatron.device import Device, open_device
from internvl_megatron.model.build import Model, build_model
from internvl_megatron.model.language import ImageTokens
from internvl_megatron.parallel.groups import Groups, make_groups
from internvl_megatron.parallel.layout import Layout
from internvl_megatron.ranks import RankInfo, joined
from internvl_megatron.train.batch import device_row
from tests.support.rows import IMAGE_TOKEN, StepData
from tests.support.training import Tensors


def on_one_rank(
    info: RankInfo, config: RunConfig, weights: Tensors | None, body: Callable[..., Any], *args: Any
) -> Any:
    """`body(model, config, device, *args)` with a model on a world of one rank."""
    torch.set_num_threads(1)
    device = open_device(config.device)
    with joined(info, device, 60):
        groups = make_groups(Layout(1, 1, 1), device, 60)
        return body(loaded_model(config, weights, groups, device), config, device, *args)


def loaded_model(config: RunConfig, weights: Tensors | None, groups: Groups, device: Device) -> Model:
    """A model with the given full parameters, or freshly initialised."""
    model = build_model(config, groups, device)
    if weights is not None:
        assert weights.keys() == dict(model.named_parameters()).keys(), "the mapping table has every parameter once"
        for name, parameter in model.named_parameters():
            model.load_full(name, parameter, torch.from_numpy(weights[name]))
    return model


@torch.no_grad()
def logits_of_rows(model: Model, config: RunConfig, device: Device, data: StepData) -> list[np.ndarray]:
    """Logits [T, padded V] of every row."""
    return [row_output(model, config, device, data, row).cpu().numpy() for row in range(len(data.rows))]


def row_output(model: Model, config: RunConfig, device: Device, data: StepData, index: int) -> torch.Tensor:
    """Logits [T, padded V] of one row."""
    row = data.rows[index]
    on_device = device_row(row, config.model.language, device, Layout(1, 1, 1), 0)
    images = None
    if row.images:
        tiles = device.put(np.concatenate([data.tiles[index, image] for image in range(len(row.images))]))
        places = device.put(np.flatnonzero(row.token_ids == IMAGE_TOKEN))
        images = ImageTokens(model.vision(tiles).flatten(0, 1), places)
    return model.language[0](on_device.token_ids, on_device.packed, images)[:, 0]
