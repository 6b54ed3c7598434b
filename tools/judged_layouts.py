"""Layouts that a search found, judged again for other rows, formats, GPUs and places of the encoder."""

from collections.abc import Iterator
from typing import Any

from internvl_megatron.config.overrides import with_values
from internvl_megatron.config.plan import RunPlan, plan
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.errors import ConfigError
from internvl_megatron.scaling.gpus import GPUS, GpuKind
from internvl_megatron.scaling.memory import USED_SHARE, first_stage_bytes, rank_bytes
from internvl_megatron.scaling.planner import Search
from internvl_megatron.scaling.predicted_step import StepTime, VisionSeconds, Workload, predict_step, predicted_stages
from tools.hand_layouts import FIRST_STAGE

H100 = GPUS["h100-80g"]

Judged = tuple[RunConfig, StepTime]


def ranked(found: Search, num_gpus: int, workload: Workload, gpu: GpuKind = H100, **changes: Any) -> list[Judged]:
    """Of the layouts found, those that are valid and fit with some settings changed, fastest first.

    Args:
        found: layouts of the same number of GPUs.
        num_gpus: it.
        workload: rows.
        gpu: kind of all GPUs.
        **changes: values by the field's path, dots written as two underscores.
    """
    values = {path.replace("__", "."): value for path, value in changes.items()}
    judged = []
    for choice in found.choices:
        for again in ("none", "full"):
            config = with_values(choice.config, values | {"parallel.language_recompute": again})
            try:
                made = plan(config, num_gpus)
            except ConfigError:
                continue
            if rank_bytes(config, made).total > USED_SHARE * gpu.memory_bytes:
                continue
            judged.append((config, predict_step(config, made, workload, gpu)))
            break  # keeping more is faster
    return sorted(judged, key=lambda one: one[1].total)


def fastest(found: Search, num_gpus: int, workload: Workload, gpu: GpuKind = H100, **changes: Any) -> Judged | None:
    """The first of `ranked`; None if there is none."""
    return next(iter(ranked(found, num_gpus, workload, gpu, **changes)), None)


def ranked_first_stage(found: Search, num_gpus: int, workload: Workload, has_pipeline: bool = True) -> list[Judged]:
    """The layouts found with the encoder in the first stage, where that fits, fastest first.

    Layers are divided to make room for the encoder: by `plan()`, and with several chunks a rank by `lighter_first`. Without a
    pipeline the first stage is all there is, and every replica encodes its own rows as they come.
    """
    judged: dict[str, Judged] = {}
    for config, made in _in_first_stage(found, num_gpus, workload, has_pipeline):
        if first_stage_bytes(config, made) > USED_SHARE * H100.memory_bytes:
            continue
        time, name = predict_step(config, made, workload, H100), str(made.layout)
        if name not in judged or time.total < judged[name][1].total:
            judged[name] = (config, time)
    return sorted(judged.values(), key=lambda one: one[1].total)


def _in_first_stage(
    found: Search, num_gpus: int, workload: Workload, has_pipeline: bool
) -> Iterator[tuple[RunConfig, RunPlan]]:
    """Valid ones."""
    for choice in found.choices:
        parallel, made = choice.config.parallel, choice.plan
        if (parallel.pipeline_size > 1) != has_pipeline:
            continue
        layers: list[tuple[int, ...] | None] = [None]
        if parallel.virtual_size > 1:
            vision = sum(VisionSeconds(choice.config, made, workload, H100).beside_a_row())
            rows = [stage.row for stage in predicted_stages(choice.config, made, workload, H100)]
            encoder = vision / sum(rows) * sum(made.stage_layers)
            layers.append(
                lighter_first(sum(made.stage_layers), parallel.pipeline_size, parallel.virtual_size, encoder)
            )
        for stage_layers in layers:
            for again in ("none", "full"):
                own = {
                    "parallel.sequence_parallel": parallel.sequence_parallel,
                    "parallel.stage_layers": stage_layers,
                    "parallel.language_recompute": again,
                }
                config = with_values(choice.config, FIRST_STAGE | own)
                try:
                    yield config, plan(config, num_gpus)
                except ConfigError:
                    continue


def lighter_first(num_layers: int, num_ranks: int, num_chunks: int, encoder_layers: float) -> tuple[int, ...]:
    """Layers of every stage, on the first rank as many fewer as its encoder takes, at least one in each chunk."""
    first = round((num_layers + encoder_layers) / num_ranks - encoder_layers)
    first = max(num_chunks, min(first, num_layers // num_ranks))
    others = _shared_out(num_layers - first, (num_ranks - 1) * num_chunks)
    # A rank's chunks are `num_ranks` apart; those with a layer more go around the ranks.
    of_first = _shared_out(first, num_chunks)
    return tuple(
        layer
        for chunk in range(num_chunks)
        for layer in (of_first[chunk], *others[chunk * (num_ranks - 1) : (chunk + 1) * (num_ranks - 1)])
    )


def _shared_out(total: int, parts: int) -> list[int]:
    base, more = divmod(total, parts)
    return [base + (part < more) for part in range(parts)]
