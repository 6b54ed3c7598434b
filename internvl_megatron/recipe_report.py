"""A recipe in full: every setting with its value and source, and what a GPU has to hold."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from internvl_megatron.config.overrides import changed_fields, field_paths
from internvl_megatron.config.plan import RunPlan, plan
from internvl_megatron.config.recipes import fewest_ranks, named_config, sources, summary
from internvl_megatron.config.schema import DataConfig, RunConfig
from internvl_megatron.parallel.bubble_plan import layout_against_filling, settings_against_filling
from internvl_megatron.scaling.counts import parameter_counts
from internvl_megatron.scaling.memory import rank_bytes

RECIPE, DEFAULT, YOURS, GIVEN = "the recipe", "default", "yours to set", "given"
"""Sources of settings that no table names."""
YOUR_SETTINGS = ("data.meta", "data.tokenizer", "checkpoint.load")


def report(name: str, num_ranks: int | None = None, overrides: Sequence[str] = ()) -> str:
    """The text of `recipes --show`.

    Args:
        name: of a recipe.
        num_ranks: that it is to run on; None = the fewest of the recipe as it is changed.
        overrides: what is changed of it.

    Raises:
        ConfigError: there is no such recipe or setting, or it does not go on so many ranks.
    """
    config = named_config(name, num_ranks, overrides)
    settings = sourced(name, num_ranks, overrides)
    width = max(len(setting) for setting, _ in settings)
    lines = [f"{setting:{width}s}  # {source}" for setting, source in settings]
    if num_ranks is None:
        replica = config.parallel.tensor_size * config.parallel.pipeline_size * config.parallel.context_size
        num_ranks = -(-fewest_ranks(name) // replica) * replica
    head = [f"{name}: {summary(name)}", *layout_and_memory(config, num_ranks)]
    return "\n".join([*head, "", *lines])


def _with_paths(config: RunConfig) -> RunConfig:
    """Whatever a user has to give is there: it has no part in layouts and memory."""
    data, load = config.data, config.checkpoint.load
    paths = {"meta": data.meta or "given later", "tokenizer": data.tokenizer or "given later"}
    return replace(
        config, data=replace(data, **paths), checkpoint=replace(config.checkpoint, load=load or "given later")
    )


def layout_and_memory(config: RunConfig, num_ranks: int) -> list[str]:
    """Layout, parameters, and the memory of the fullest rank; paths may be missing yet."""
    given = _with_paths(config)
    made = plan(given, num_ranks)
    held, counts = rank_bytes(given, made), parameter_counts(config.model)
    weights, gradients, optimizer, activations, total = (
        f"{value / 1e9:.1f}" for value in (held.weights, held.gradients, held.optimizer, held.activations, held.total)
    )
    return [
        f"on {num_ranks} ranks: {made.layout}, {made.rows_per_replica} rows a step and replica; {counts.total / 1e9:.3f} B "
        "parameters",
        f"fullest rank: weights {weights} GB, gradients {gradients} GB, AdamW {optimizer} GB; with activations (about "
        f"{activations} GB) and the rest about {total} GB (an estimate, not measured)",
        encoder_schedule(given, made),
    ]


def encoder_schedule(config: RunConfig, made: RunPlan) -> str:
    """When the vision encoder works, between how many replicas tiles travel, and what keeps the pauses of a pipeline empty."""
    parallel, vision, rows = config.parallel, made.vision_layout, made.rows_per_replica
    window = min(parallel.vision_window_rows or rows, rows)
    travel = f"tiles travel between {vision.exchange_replicas} of {made.layout.data_size} replicas"
    if vision.exchange_replicas == 1:
        travel = "tiles stay in their replica"
    against = [*settings_against_filling(parallel), *layout_against_filling(vision, rows)]
    if not against:
        return f"encoder: in the pauses of the pipeline; {travel}"
    if vision.first_stage_only:
        return "encoder: in the passes of the first stage"
    text = f"encoder: in phases of its own, windows of {window} rows; {travel}"
    if made.layout.pipeline_size > 1:
        share = (made.layout.pipeline_size - 1) / (made.layout.virtual_size * window + made.layout.pipeline_size - 1)
        text += f"; a window's pipeline pauses for {share:.0%}, not filled because of {', '.join(against)}"
    return text


def sourced(name: str, num_ranks: int | None = None, overrides: Sequence[str] = ()) -> list[tuple[str, str]]:
    """("path=value", source) of every setting of a recipe, as an override would write it; what is changed of it was given."""
    config, known = named_config(name, num_ranks, overrides), sources(name, num_ranks)
    known |= {override.partition("=")[0]: GIVEN for override in overrides}
    plain = RunConfig(name="", model=config.model, data=DataConfig())
    changed = set(changed_fields(plain, config))
    found = []
    for path in field_paths():
        value: Any = config
        for part in path.split("."):
            value = getattr(value, part)
        source = known.get(path, RECIPE if path in changed or path.startswith("model.") else DEFAULT)
        found.append((f"{path}={_text(value)}", YOURS if path in YOUR_SETTINGS and not value else source))
    return found


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
