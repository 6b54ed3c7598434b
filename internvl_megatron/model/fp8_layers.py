"""Which linear layers round to FP8: by part of the model, by layer, and by who computes it."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch

from internvl_megatron.config.fp8_rules import tile_multiple
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.device import Device
from internvl_megatron.model.fp8_format import Recipe
from internvl_megatron.model.fp8_history import AmaxHistories
from internvl_megatron.model.fp8_linear import Fp8ColumnParallelLinear, Fp8Linear, Fp8RowParallelLinear
from internvl_megatron.model.language import LanguageModel
from internvl_megatron.model.layer_specs import TORCH, Linears
from internvl_megatron.model.vision import VisionLinears

Part = Literal["language", "vision", "projector"]
Backend = Literal["transformer_engine", "emulated"]


def fp8_backend(config: RunConfig, device: Device) -> Backend:
    """Who computes in FP8, if anything does."""
    if config.fp8.backend != "auto":
        return config.fp8.backend
    return "emulated" if device.kind == "cpu" else "transformer_engine"


def fp8_recipe(config: RunConfig, part: Part, layer: int = 0) -> Recipe | None:
    """How a layer's products are rounded; None = they are not.

    Args:
        config: of the run.
        part: of the model.
        layer: number in the part, from 0, counted over all pipeline stages.
    """
    fp8 = config.fp8
    recipe: Recipe | Literal["none"] = getattr(fp8, part)
    last = config.model.language.num_layers - fp8.last_bf16_layers
    is_left_out = part == "language" and not fp8.first_bf16_layers <= layer < last
    return None if recipe == "none" or is_left_out else recipe


def layer_linears(config: RunConfig, part: Part, layer: int, backend: Backend, plain: Linears = TORCH) -> Linears:
    """What a transformer layer is made of.

    Args:
        config: of the run.
        part: of the model.
        layer: number in the part, from 0, counted over all pipeline stages.
        backend: Transformer Engine's layers (`plain`) are told by a context around them what to round; emulated ones are others.
        plain: what layers are made of without FP8.
    """
    recipe = fp8_recipe(config, part, layer)
    if recipe is None or backend == "transformer_engine":
        return plain
    return Linears(
        column=partial(Fp8ColumnParallelLinear, recipe=recipe), row=partial(Fp8RowParallelLinear, recipe=recipe)
    )


def language_linears(config: RunConfig, device: Device) -> list[Linears]:
    """Of every layer of the whole language model."""
    backend = fp8_backend(config, device)
    return [layer_linears(config, "language", layer, backend) for layer in range(config.model.language.num_layers)]


def vision_linears(config: RunConfig, device: Device) -> VisionLinears:
    """Of the encoder and the projector."""
    backend = fp8_backend(config, device)
    projector, recipe = torch.nn.Linear, fp8_recipe(config, "projector")
    if recipe is not None and backend == "emulated":
        projector = partial(Fp8Linear, recipe=recipe)
    return VisionLinears(layer_linears(config, "vision", 0, backend), projector, tile_multiple(config))


def with_histories(chunks: Sequence[LanguageModel], num_steps: int, device: Device) -> AmaxHistories | None:
    """Give every layer with emulated delayed scaling its place in histories; None if this rank has no such layer."""
    layers: dict[str, Any] = {}
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            number: Any = layer.layer_number  # from 1, over all stages
            for name, module in layer.named_modules():
                if (
                    isinstance(module, Fp8ColumnParallelLinear | Fp8RowParallelLinear)
                    and module.rounding.recipe == "delayed"
                ):
                    layers[f"layers.{number - 1}.{name}"] = module
    if not layers:
        return None
    histories = AmaxHistories(list(layers), num_steps, device.torch_device)
    for name, module in layers.items():
        module.rounding.amax = histories.of(name)
    return histories
