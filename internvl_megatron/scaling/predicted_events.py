"""The step of a configuration as events: the schedule it runs, with durations of the cost model; equal rows of average size.

What tensor and context parallelism send is a part of the passes, as in `predicted_step`. What follows the pipeline (sums of
gradients over the copies, the optimizer), and waiting for replicas with dearer rows, are added to the pipeline's time.
"""

from dataclasses import dataclass, replace

import numpy as np

from internvl_megatron.config.plan import RunPlan
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.parallel.bubble_plan import BubblePlan
from internvl_megatron.scaling.collective_time import Network
from internvl_megatron.scaling.encoder_schedules import (
    PipelineSeconds,
    disaggregated,
    in_bubbles,
    in_first_stage,
    phases_apart,
)
from internvl_megatron.scaling.event_time import Hop, Hops, Timeline, Work, run
from internvl_megatron.scaling.gpus import GpuKind
from internvl_megatron.scaling.language_time import neighbour_seconds
from internvl_megatron.scaling.predicted_step import (
    VisionSeconds,
    Workload,
    fills_bubbles,
    language_run,
    predict_step,
    predicted_stages,
)
from internvl_megatron.scaling.step_time import StepCase, by_stage, plan_of_step


@dataclass(frozen=True)
class StepEvents:
    """A step."""

    timeline: Timeline
    total: float
    """Seconds, with what comes after the pipeline."""
    sent_inside_share: float
    """Of the GPUs' time in the pipeline: messages of tensor and context parallelism, which are in the passes and exposed."""


def step_events(config: RunConfig, plan: RunPlan, workload: Workload, gpu: GpuKind) -> StepEvents:
    """Run the schedule that a configuration has: the encoder in all ranks' pauses or phases of its own, or in the first stage."""
    timeline = _timeline(config, plan, workload, gpu)
    time = predict_step(config, plan, workload, gpu)
    total = timeline.makespan + time.imbalance + time.data_parallel + time.update
    return StepEvents(timeline, total, _inside(config, plan, workload, gpu, timeline))


def disaggregated_events(
    config: RunConfig, plan: RunPlan, num_encoders: int, workload: Workload, gpu: GpuKind
) -> StepEvents:
    """A step with encoder ranks.

    All pipelines' rows of the same place are encoded together, and every encoder rank has the same part of their tiles, a fraction
    of one too. Messages of encoders, and to them, go on beside work at both ends.

    Args:
        config: the encoder is replicated over its ranks; of `parallel`, chunk and recomputation are taken.
        plan: of the language model, on its ranks alone.
        num_encoders: ranks that encode, beside those.
        workload: rows.
        gpu: kind of all GPUs.
    """
    vision, layout = VisionSeconds(config, plan, workload, gpu), plan.layout
    passes = pipeline_passes(config, plan, workload, gpu)
    encoded = workload.tiles_per_row * layout.data_size / num_encoders
    encode, backprop = vision.tiles(encoded)
    sent = Hop(vision.exchange(1, encoded))
    tasks = disaggregated(passes, [encode] * passes.num_rows, [backprop] * passes.num_rows)
    num_gpus = [layout.stage_size * layout.data_size] * layout.pipeline_size + [num_encoders]
    timeline = run(tasks, _hops(config, plan, workload, gpu, sent), num_gpus)
    time = predict_step(config, plan, replace(workload, tiles_per_row=0), gpu)
    reduce, update = vision.reduce(backprop, num_encoders)
    language_end = max(spans[-1].end for spans in timeline.ranks[:-1])
    ends = (language_end + time.data_parallel + time.update, timeline.makespan + reduce + update)
    return StepEvents(timeline, max(ends) + time.imbalance, _inside(config, plan, workload, gpu, timeline))


def pipeline_passes(config: RunConfig, plan: RunPlan, workload: Workload, gpu: GpuKind) -> PipelineSeconds:
    """The language model's passes, without messages between stages. A rank's work is shared out over its chunks as their layers are."""
    layers = np.array(plan.stage_layers)
    stages = predicted_stages(config, plan, workload, gpu)
    of_ranks = np.array([stage.kernels.plus(stage.messages) for stage in stages])
    ranks = np.arange(len(layers)) % plan.layout.pipeline_size
    shares = layers / np.bincount(ranks, weights=layers)[ranks]
    forward, backward = (
        np.repeat((of_ranks[ranks, kind] * shares)[:, None], plan.rows_per_replica, axis=1) for kind in (0, 1)
    )
    return PipelineSeconds(forward, backward, plan.layout.pipeline_size)


def _timeline(config: RunConfig, plan: RunPlan, workload: Workload, gpu: GpuKind) -> Timeline:
    vision, layout = VisionSeconds(config, plan, workload, gpu), plan.layout
    passes = pipeline_passes(config, plan, workload, gpu)
    num_gpus = [layout.stage_size * layout.data_size] * layout.pipeline_size
    if workload.tiles_per_row == 0:
        return run(passes.tasks(), _hops(config, plan, workload, gpu, Hop()), num_gpus)
    if plan.vision_layout.first_stage_only:
        encode, backprop = vision.beside_a_row()
        tasks = in_first_stage(passes, [encode] * passes.num_rows, [backprop] * passes.num_rows)
        return run(tasks, _hops(config, plan, workload, gpu, Hop()), num_gpus)
    if fills_bubbles(config, plan) and (made := _bubble_plan(config, plan, workload, passes, vision)) is not None:
        encode, backprop = _chunk_seconds(made, plan, vision)
        # Chunks travel beside the pipeline's work, a slot's at a time.
        sent = Hop(vision.exchange(1, vision.tiles_per_rank(1)))
        return run(in_bubbles(passes, made, encode, backprop), _hops(config, plan, workload, gpu, sent), num_gpus)
    window_rows = min(config.parallel.vision_window_rows or passes.num_rows, passes.num_rows)
    windows = [min(window_rows, passes.num_rows - first) for first in range(0, passes.num_rows, window_rows)]
    exchange = [vision.exchange(rows, vision.tiles_per_rank(rows)) for rows in windows]
    alone = layout.pipeline_size == 1  # ranks trade with other replicas', which are no ranks here
    encode, backprop = (
        [part + alone * sent for part, sent in zip(parts, exchange, strict=True)]
        for parts in zip(*map(vision.window, windows), strict=True)
    )
    tasks = phases_apart(passes, encode, backprop, window_rows)
    return run(tasks, _hops(config, plan, workload, gpu, Hop(exchange[0], exchange[0])), num_gpus)


def _hops(config: RunConfig, plan: RunPlan, workload: Workload, gpu: GpuKind, embeddings: Hop) -> Hops:
    """Messages between stages, and of embeddings there or gradients back."""
    between = Hop(*neighbour_seconds(language_run(config, plan, workload), Network(gpu)))

    def hop(sender: int, _receiver: int, work: Work) -> Hop:
        # The first stage's gradients of a row are for those alone who encoded it.
        of_images = work.kind == "encode" or (work.kind == "backward" and sender == work.chunk == 0)
        return embeddings if of_images else between

    return hop


def _bubble_plan(
    config: RunConfig, plan: RunPlan, workload: Workload, passes: PipelineSeconds, vision: VisionSeconds
) -> BubblePlan | None:
    """The trainer's plan for one replica with equal rows."""
    layout, num_tiles = plan.layout, round(workload.tiles_per_row)
    chunk_tiles = config.parallel.vision_chunk_tiles
    case = StepCase(config.model, layout.pipeline_size, layout.stage_size, "in_bubbles", chunk_tiles=chunk_tiles)
    shape = (passes.num_rows, 1)
    of_tile = vision.tiles(chunk_tiles).forward / chunk_tiles
    row_tiles = float(passes.forward.sum(axis=0).mean()) / layout.pipeline_size / of_tile
    return plan_of_step(case, np.full(shape, num_tiles), np.full(shape, row_tiles))


def _chunk_seconds(made: BubblePlan, plan: RunPlan, vision: VisionSeconds) -> tuple[np.ndarray, np.ndarray]:
    """Of (encode, backprop), [P, C, T] each. What every rank runs is a dummy tile where it has none."""
    layout = plan.layout
    counts = np.zeros((layout.pipeline_size * layout.stage_size, made.num_chunks), dtype=np.int64)
    np.add.at(counts, (made.encoder, made.chunk), 1)
    counts[:, [0, -1]] = np.maximum(counts[:, [0, -1]], 1)
    # A tile alone takes longer than one of several.
    seconds = np.array([vision.tiles(count) for count in range(counts.max() + 1)])[counts]
    encode, backprop = (
        by_stage(seconds[..., kind], layout.pipeline_size, layout.stage_size)[:, :, 0] for kind in (0, 1)
    )
    return encode, backprop


def _inside(config: RunConfig, plan: RunPlan, workload: Workload, gpu: GpuKind, timeline: Timeline) -> float:
    sent = sum(sum(stage.messages) for stage in predicted_stages(config, plan, workload, gpu))
    ranks = plan.layout.stage_size * plan.layout.data_size
    return plan.rows_per_replica * sent * ranks / (sum(timeline.num_gpus) * timeline.makespan)
