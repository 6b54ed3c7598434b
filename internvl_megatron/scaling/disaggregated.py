"""How many GPUs encode and nothing else, and how the others train the language model: the fastest way found to divide them.

Tried are whole machines of encoder ranks, up to half of the GPUs, and of the others all layouts that are whole replicas. Replicas have as many
rows as each other, so the step may have some rows more or less than is asked for: what is compared is time by rows. What fits is ranked by
the busiest stage or the encoder ranks, whichever is slower; of the best, the schedule is run (`predicted_events`). The trainer has no such
ranks: this is for comparison.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from internvl_megatron.config.overrides import with_values
from internvl_megatron.config.plan import RunPlan, plan
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.errors import ConfigError
from internvl_megatron.scaling.encoder_schedules import encoder_order
from internvl_megatron.scaling.gpus import GPUS_PER_MACHINE, GpuKind
from internvl_megatron.scaling.memory import USED_SHARE, encoder_bytes, language_bytes
from internvl_megatron.scaling.planner import layout_sizes
from internvl_megatron.scaling.predicted_events import StepEvents, disaggregated_events
from internvl_megatron.scaling.predicted_step import VisionSeconds, Workload, predict_step, predicted_stages

NUM_SIMULATED = 12
"""Of the divisions found, by the rough time."""
ROWS_TOLERANCE = 1 / 16
"""How far the rows of a step may be from those asked for, as a share of them."""


@dataclass(frozen=True)
class Division:
    """GPUs that encode, and a language model on the others."""

    config: RunConfig
    plan: RunPlan
    """Of the language model's GPUs."""
    num_encoders: int
    memory_bytes: float
    """Of the fullest GPU, estimated."""
    rough_seconds: float
    """Of a row of the step."""


def divisions(config: RunConfig, num_gpus: int, workload: Workload, gpu: GpuKind) -> list[Division]:
    """All that fit, roughly fastest first."""
    machine = GPUS_PER_MACHINE if num_gpus > GPUS_PER_MACHINE else 1
    whole = {"parallel.vision_placement": "all_ranks", "parallel.vision_sharding": "replicated"}
    base = with_values(
        config, whole | {"parallel.vision_shard_ranks": None, "parallel.vision_window_rows": None}
    )  # which the language model's ranks have no use for
    found = [
        division
        for num_encoders in range(machine, num_gpus // 2 + 1, machine)
        for tried in _layouts(base, num_gpus - num_encoders, workload)
        if (division := _fitting(*tried, num_encoders, workload, gpu)) is not None
    ]
    return sorted(found, key=lambda division: division.rough_seconds)


def best_division(
    config: RunConfig, num_gpus: int, workload: Workload, gpu: GpuKind
) -> tuple[Division, StepEvents] | None:
    """The fastest by its events, by rows; None if none fits."""
    simulated = [
        (division, disaggregated_events(division.config, division.plan, division.num_encoders, workload, gpu))
        for division in divisions(config, num_gpus, workload, gpu)[:NUM_SIMULATED]
    ]
    return min(simulated, key=lambda found: found[1].total / found[0].config.rows_per_step, default=None)


def _layouts(config: RunConfig, num_gpus: int, workload: Workload) -> Iterator[tuple[RunConfig, RunPlan]]:
    """Valid ones of the language model."""
    wanted = config.rows_per_step
    for sizes in layout_sizes(config, num_gpus, workload):
        num_stages = sizes["parallel.pipeline_size"]
        data_size = num_gpus // (sizes["parallel.tensor_size"] * sizes["parallel.context_size"] * num_stages)
        # Chunks take rows in groups of as many as there are stages.
        multiple = data_size * (num_stages if sizes["parallel.virtual_size"] > 1 else 1)
        rows = multiple * max(1, round(wanted / multiple))
        if abs(rows - wanted) > ROWS_TOLERANCE * wanted:
            continue
        candidate = with_values(config, sizes | {"rows_per_step": rows})
        try:
            yield candidate, plan(candidate, num_gpus)
        except ConfigError:
            continue


def _fitting(config: RunConfig, made: RunPlan, num_encoders: int, workload: Workload, gpu: GpuKind) -> Division | None:
    """With as little computed again as fits, on both sides."""
    limit = USED_SHARE * gpu.memory_bytes
    layout = made.layout
    order = encoder_order(layout.pipeline_size, layout.virtual_size, made.rows_per_replica)
    rows = next((place for place, work in enumerate(order) if work.kind == "backprop"), len(order))
    tiles = rows * -(-config.data.tiles_per_row * layout.data_size // num_encoders)
    for again in ("none", "full"):
        of_language = replace(config, parallel=replace(config.parallel, language_recompute=again))
        language = language_bytes(of_language, made)
        if language <= limit:
            break
    else:
        return None
    for again in ("none", "layer", "full"):
        both = replace(of_language, parallel=replace(of_language.parallel, vision_recompute=again))
        encoders = encoder_bytes(both, num_encoders, tiles)
        if encoders <= limit:
            rough = _rough_seconds(both, made, num_encoders, workload, gpu)
            return Division(both, made, num_encoders, max(language, encoders), rough)
    return None


def _rough_seconds(config: RunConfig, made: RunPlan, num_encoders: int, workload: Workload, gpu: GpuKind) -> float:
    """Text alone; rows that wait for the encoder where it is slower; and the encoder's first and last row."""
    text = predict_step(config, made, replace(workload, tiles_per_row=0), gpu).total
    busiest = max(stage.row for stage in predicted_stages(config, made, workload, gpu))
    vision = VisionSeconds(config, made, workload, gpu)
    row = sum(vision.tiles(workload.tiles_per_row * made.layout.data_size / num_encoders))
    return (text + made.rows_per_replica * max(0.0, row - busiest) + row) / config.rows_per_step
