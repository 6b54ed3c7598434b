"""A recipe in full: every setting with its value and source, and what a GPU has to hold."""

from dataclasses import replace
from typing import Any

from internvl_megatron.config.overrides import changed_fields, field_paths
from internvl_megatron.config.plan import plan
from internvl_megatron.config.recipes import fewest_ranks, find_recipe, sources, summary
from internvl_megatron.config.schema import DataConfig, RunConfig
from internvl_megatron.scaling.counts import parameter_counts
from internvl_megatron.scaling.memory import rank_bytes

RECIPE, DEFAULT, YOURS = "the recipe", "default", "yours to set"
"""Sources of settings that no table names."""
YOUR_SETTINGS = ("data.meta", "data.tokenizer", "checkpoint.load")


def report(name: str, num_ranks: int | None = None) -> str:
    """The text of `recipes --show`; None = on the fewest ranks of the recipe.

    Raises:
        ConfigError: there is no such recipe, or it does not go on so many ranks.
    """
    config = find_recipe(name, num_ranks)
    settings = sourced(name, num_ranks)
    width = max(len(setting) for setting, _ in settings)
    lines = [f"{setting:{width}s}  # {source}" for setting, source in settings]
    num_ranks = fewest_ranks(name) if num_ranks is None else num_ranks
    return "\n".join([f"{name}: {summary(name)}", *layout_and_memory(config, num_ranks), "", *lines])


def layout_and_memory(config: RunConfig, num_ranks: int) -> list[str]:
    """Layout, parameters, and the memory of the fullest rank; paths may be missing yet."""
    given = replace(
        config,
        data=replace(config.data, meta="given later", tokenizer="given later"),
        checkpoint=replace(config.checkpoint, load="given later"),
    )
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
    ]


def sourced(name: str, num_ranks: int | None = None) -> list[tuple[str, str]]:
    """("path=value", source) of every setting of a recipe, as an override would write it."""
    config, known = find_recipe(name, num_ranks), sources(name, num_ranks)
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
