"""Which linear layers round to FP8: by part of the model, by layer, and by who computes it."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch

from internvl_megatron.config.fp8_rules import tile_multiple
from internvl_megatron.config.plan import stage_layers
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.device import Device, Kernels
from internvl_megatron.model.adapter import Adapter, adapter_rank
from internvl_megatron.model.fp8_format import Recipe
from internvl_megatron.model.fp8_history import AmaxHistories
from internvl_megatron.model.fp8_linear import Fp8ColumnParallelLinear, Fp8Linear, Fp8RowParallelLinear
from internvl_megatron.model.language import LanguageModel
from internvl_megatron.model.layer_specs import Linears, linears_of, transformer_engine_linear
from internvl_megatron.model.vision import VisionKernels

Part = Literal["language", "vision", "projector"]


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


def layer_linears(config: RunConfig, part: Part, layer: int, kernels: Kernels) -> Linears:
    """What a transformer layer is made of.

    Args:
        config: of the run.
        part: of the model, language or vision.
        layer: number in the part, from 0, counted over all pipeline stages.
        kernels: what computes the layers. Transformer Engine's are told by a context around them what to round; emulated
            ones are others.
    """
    recipe, rank = fp8_recipe(config, part, layer), adapter_rank(f"{part}.", config.lora)
    if recipe is None or kernels.fp8 == "transformer_engine":
        linears = linears_of(kernels.language if part == "language" else kernels.vision)
        if rank is None:
            return linears
        return replace(linears, norm_and_column=None, adapter=Adapter(rank, config.lora.scale, config.lora.layers))
    return Linears(
        column=partial(Fp8ColumnParallelLinear, recipe=recipe), row=partial(Fp8RowParallelLinear, recipe=recipe)
    )


def language_linears(config: RunConfig, kernels: Kernels) -> list[list[Linears]]:
    """Of every layer of the whole language model, by stage in the order rows pass them."""
    numbers = iter(range(config.model.language.num_layers))
    return [
        [layer_linears(config, "language", layer, kernels) for layer in islice(numbers, count)]
        for count in stage_layers(config)
    ]


def vision_kernels(config: RunConfig, kernels: Kernels) -> VisionKernels:
    """Of the encoder and the projector."""
    projector, recipe = torch.nn.Linear, fp8_recipe(config, "projector")
    if recipe is not None:
        is_emulated = kernels.fp8 == "emulated"
        projector = partial(Fp8Linear, recipe=recipe) if is_emulated else transformer_engine_linear
    return VisionKernels(
        layer_linears(config, "vision", 0, kernels), projector, tile_multiple(config), kernels.vision_attention
    )


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
