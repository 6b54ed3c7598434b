"""Megatron Core's settings for layers that Transformer Engine runs in FP8, from a run's `Fp8Config`.

Megatron Core's blocks enter Transformer Engine's FP8 context by these settings: around every layer, or around all of them with
delayed scaling, whose largest magnitudes are agreed on over the language model's tensor-, context- and data-parallel ranks. The
other recipes agree on nothing, so that the vision encoder's block can do the same with groups of its own.
"""

from typing import Any

from internvl_megatron.config.schema import RunConfig

# Gradients are e5m2, for its range, where a whole tensor has one scale.
_NAMES = {
    "none": (None, None),
    "delayed": ("hybrid", "delayed"),
    "current": ("hybrid", "tensorwise"),
    "blockwise": ("e4m3", "blockwise"),
    "mxfp8": ("e4m3", "mxfp8"),
}
"""Ours: Megatron Core's for the number format and the recipe."""


def fp8_of_recipe(recipe: str) -> dict[str, Any]:
    """Settings of one recipe; none for 'none'."""
    number_format, name = _NAMES[recipe]
    if number_format is None:
        return {}
    return {"fp8": number_format, "fp8_recipe": name}


def fp8_of_language(config: RunConfig, rows_per_replica: int) -> dict[str, Any]:
    """Settings of the language model.

    Args:
        config: of the run.
        rows_per_replica: micro-batches of a replica in a step. Transformer Engine notes the largest magnitudes of delayed
            scaling after every pass through a run of layers, of which a rank has `virtual_size` a micro-batch.
    """
    fp8 = config.fp8
    settings = fp8_of_recipe(fp8.language)
    if not settings:
        return {}
    if fp8.language == "delayed":
        passes = rows_per_replica * config.parallel.virtual_size
        settings |= {"fp8_amax_history_len": fp8.history_steps * passes, "fp8_amax_compute_algo": "max"}
    if fp8.first_bf16_layers or fp8.last_bf16_layers:
        settings |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": fp8.first_bf16_layers,
            "num_layers_at_end_in_bf16": fp8.last_bf16_layers,
        }
    return settings
