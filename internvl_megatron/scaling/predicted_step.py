"""How long a training step of a configuration takes on so many GPUs of a kind: a prediction, and what it is made of.

Shapes, layouts and the schedule are the trainer's (`plan`); kernels and messages are timed by `kernel_time` and
`collective_time`. The factors below make the parts come out as measured on one H200; what a real step of many GPUs has beside them,
nobody has measured for this project. docs/scaling.md lists what is assumed.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Literal

from internvl_megatron.config.plan import RunPlan
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.parallel.bubble_plan import can_fill_bubbles, settings_against_filling
from internvl_megatron.scaling.collective_time import Network
from internvl_megatron.scaling.counts import parameter_counts
from internvl_megatron.scaling.gpus import GpuKind
from internvl_megatron.scaling.kernel_time import Kernels, Passes
from internvl_megatron.scaling.language_time import (
    OURS,
    LanguageRun,
    StageTime,
    data_parallel_seconds,
    pipeline_seconds,
    stage_times,
)
from internvl_megatron.scaling.vision_time import (
    VisionRun,
    chunk_gathers,
    reduce_seconds,
    tile_passes,
)

LANGUAGE_FACTOR: dict[Literal["bf16", "fp8"], float] = {"bf16": 1.29, "fp8": 1.41}
"""On the language model's kernels: phase `decode` of the 8B on one H200 (benchmarks/results/gpu_check_2026-11-28.json; FP8:
`current`). A test compares."""
VISION_FACTORS = {"300M": 1.05, "6B": 1.29}
"""On the vision side's kernels. 300M: phases `encode` and `backprop` of the same run; 6B: not measured, taken for the
language model's."""


@dataclass(frozen=True)
class Workload:
    """Rows as training sees them, on average."""

    tokens_per_row: float
    """Padding not counted."""
    pairs_per_row: float
    """Sum over the samples of a row of their length squared."""
    supervised_per_row: float
    tiles_per_row: float
    pairs_spread: float = 0.0
    """Standard deviation over mean of the rows' pairs."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the slowest rank, by what they are spent on."""

    language: float
    """Kernels of the busiest stage."""
    language_messages: float
    """Exposed messages of tensor and context parallelism and between stages."""
    pauses: float
    """Of that stage: pipeline warm-up and cool-down, less what is encoded in them."""
    imbalance: float
    """Waiting for the replica whose rows cost most."""
    vision: float
    """Encoding, before and after the pipeline and in its pauses."""
    vision_messages: float
    data_parallel: float
    """Exposed sums of gradients and gathers of parameters of both modules."""
    update: float

    @property
    def total(self) -> float:
        """Of the step."""
        return sum(asdict(self).values())


def language_run(config: RunConfig, plan: RunPlan, workload: Workload) -> LanguageRun:
    """The language model's part."""
    parallel = config.parallel
    return LanguageRun(
        language=config.model.language,
        layout=plan.layout,
        stage_layers=plan.stage_layers,
        rows_per_replica=plan.rows_per_replica,
        tokens_per_row=config.data.tokens_per_row if parallel.pad_rows else round(workload.tokens_per_row),
        pairs_per_row=workload.pairs_per_row,
        supervised_per_row=workload.supervised_per_row,
        sequence_parallel=parallel.sequence_parallel,
        recompute="full" if parallel.language_recompute == "full" else "none",
        trainable=config.optimizer.language.trainable,
    )


def vision_run(config: RunConfig, plan: RunPlan) -> VisionRun:
    """The vision side's part."""
    parallel = config.parallel
    shard_ranks = parallel.vision_shard_ranks or plan.layout.world_size
    return VisionRun(
        config.model,
        parallel.vision_chunk_tiles,
        parallel.vision_recompute,
        config.optimizer.vision.trainable,
        shard_ranks if parallel.vision_sharding == "sharded" else 1,
    )


def predicted_stages(config: RunConfig, plan: RunPlan, workload: Workload, gpu: GpuKind) -> list[StageTime]:
    """Seconds of every pipeline stage on one row, without an encoder in the first one."""
    return stage_times(language_run(config, plan, workload), _kernels(config, gpu), Network(gpu), OURS)


def _kernels(config: RunConfig, gpu: GpuKind) -> Kernels:
    precision = "bf16" if config.fp8.language == "none" else "fp8"
    factor = LANGUAGE_FACTOR[precision] if gpu.factors is None else gpu.factors.language
    return Kernels(gpu, precision, factor)


def predict_step(config: RunConfig, plan: RunPlan, workload: Workload, gpu: GpuKind) -> StepTime:
    """Predict the time of a step; `parallel.vision_placement` is not `colocated`.

    Args:
        config: checked by `plan`.
        plan: of it.
        workload: its rows.
        gpu: kind of all GPUs.
    """
    assert config.parallel.vision_placement != "colocated", "tensor-parallel encoders are not timed"
    kernels, network = _kernels(config, gpu), Network(gpu)
    run = language_run(config, plan, workload)
    num_rows, window_rows = plan.rows_per_replica, config.parallel.vision_window_rows or plan.rows_per_replica
    stages = predicted_stages(config, plan, workload, gpu)
    vision = VisionSeconds(config, plan, workload, gpu)
    in_first_stage = plan.vision_layout.first_stage_only
    if in_first_stage:
        stages[0] = replace(stages[0], kernels=stages[0].kernels.plus(vision.beside_a_row()))
    busiest = max(stages, key=lambda stage: stage.row)
    fills = fills_bubbles(config, plan)
    num_windows = 1 if workload.tiles_per_row == 0 or in_first_stage else -(-num_rows // window_rows)
    # Every window of rows fills and empties the pipeline.
    pauses = num_windows * pipeline_seconds(run, stages)[1]
    encode, backprop = (0.0, 0.0) if in_first_stage else vision.window(min(window_rows, num_rows))
    encoding = num_windows * (encode + backprop)
    if fills:
        first, last = vision.row()
        pauses -= min(pauses, encoding - first - last)
    exposed, update = data_parallel_seconds(run, stages, kernels, network, OURS)
    reduce, vision_update = vision.reduce(backprop, plan.layout.world_size)
    return StepTime(
        language=num_rows * sum(busiest.kernels),
        language_messages=num_rows * (sum(busiest.messages) + sum(busiest.to_neighbours)),
        pauses=pauses,
        imbalance=_imbalance(config, plan, workload, run, kernels),
        vision=encoding,
        vision_messages=0.0 if in_first_stage else num_windows * vision.messages(min(window_rows, num_rows)),
        data_parallel=exposed + reduce,
        update=update + vision_update,
    )


class VisionSeconds:
    """Seconds of the vision side of one configuration."""

    def __init__(self, config: RunConfig, plan: RunPlan, workload: Workload, gpu: GpuKind) -> None:
        self._plan, self._workload = plan, workload
        self._run = vision_run(config, plan)
        is_large = config.model.vision.hidden_size > 1024
        factor = VISION_FACTORS["6B" if is_large else "300M"] if gpu.factors is None else gpu.factors.vision
        self._kernels = Kernels(gpu, "bf16", factor)
        self._network = Network(gpu)

    def tiles_per_rank(self, num_rows: int) -> float:
        """Tiles of the busiest rank when replicas have so many rows each."""
        layout = self._plan.layout
        tiles = self._workload.tiles_per_row * num_rows * layout.data_size
        return math.ceil(tiles / layout.world_size) if tiles else 0

    def tiles(self, count: float) -> Passes:
        """Seconds of so many tiles on a rank, as many of them side by side as a chunk has."""
        if not count:
            return Passes(0.0, 0.0)
        run = replace(self._run, chunk_tiles=min(self._run.chunk_tiles, math.ceil(count)))
        once = tile_passes(run, self._kernels).times(count)
        return once if run.trainable else once._replace(backward=0.0)

    def beside_a_row(self) -> Passes:
        """Seconds in which the ranks of the first stage encode a row's tiles."""
        return self.tiles(math.ceil(self._workload.tiles_per_row / self._plan.layout.stage_size))

    def window(self, num_rows: int) -> tuple[float, float]:
        """Seconds of (encode, backprop) of one window."""
        tiles = self.tiles_per_rank(num_rows)
        if not tiles:
            return 0.0, 0.0
        run = replace(self._run, chunk_tiles=min(self._run.chunk_tiles, int(tiles)))
        gathers, num_chunks = chunk_gathers(run, self._kernels, self._network), -(-tiles // run.chunk_tiles)
        encode, backprop = self.tiles(tiles)
        return encode + gathers.forward * num_chunks, backprop + run.trainable * gathers.backward * num_chunks

    def row(self) -> tuple[float, float]:
        """What cannot be done in pauses: the first row's tiles forward, the last one's backward, shared by all ranks."""
        return self.window(1)

    def messages(self, num_rows: int) -> float:
        """Exposed seconds of a window's exchange: embeddings there and gradients back; tiles are sent ahead."""
        return 2 * self.exchange(num_rows, self.tiles_per_rank(num_rows))

    def exchange(self, num_rows: int, encoded: float) -> float:
        """Seconds until the embeddings of a replica's rows are with those who own their tokens, or gradients back.

        Args:
            num_rows: of every replica.
            encoded: tiles of a rank that encodes.
        """
        if not self._workload.tiles_per_row or self._plan.layout.world_size == 1:
            return 0.0
        owned = self._workload.tiles_per_row * num_rows / self._plan.layout.stage_size
        width, per_tile = self._run.model.language.hidden_size, self._run.model.vision.tokens_per_tile
        num_bytes = 2 * width * per_tile * max(owned, encoded)
        # To any rank of the exchange group: if it is on several machines, most are on others.
        return self._network.message(num_bytes, stride=self._plan.layout.world_size // 2)

    def reduce(self, beside: float, num_ranks: int) -> tuple[float, float]:
        """Seconds of (exposed sums of gradients, optimizer) of an encoder that so many ranks have.

        Args:
            beside: seconds of the backward pass that messages may hide in.
            num_ranks: all of them, sharded or not.
        """
        counts = parameter_counts(self._run.model)
        if not self._run.trainable or not self._workload.tiles_per_row:
            return 0.0, 0.0
        divided = self._run.shard_ranks if self._run.shard_ranks > 1 else num_ranks
        update = self._kernels.update((counts.vision + counts.projector) / divided)
        return reduce_seconds(self._run, num_ranks, self._network, beside), update


def fills_bubbles(config: RunConfig, plan: RunPlan) -> bool:
    """As `WindowMaker` decides."""
    against = settings_against_filling(config.parallel)
    return not against and can_fill_bubbles(plan.vision_layout, plan.rows_per_replica)


def _imbalance(config: RunConfig, plan: RunPlan, workload: Workload, run: LanguageRun, kernels: Kernels) -> float:
    """Expected excess of the largest of the replicas' sums of pairs, in attention of the busiest stage; none where rows are shared
    out by cost."""
    replicas = plan.layout.data_size
    if replicas == 1 or config.data.balance_rows:
        return 0.0
    heads = run.language.num_heads * run.language.head_size / plan.layout.tensor_size
    layers = max(sum(run.stage_layers[s :: plan.layout.pipeline_size]) for s in range(plan.layout.pipeline_size))
    attention = layers * sum(kernels.causal_attention(workload.pairs_per_row / plan.layout.context_size, heads))
    spread = workload.pairs_spread * math.sqrt(2 * math.log(replicas) * plan.rows_per_replica)
    return spread * attention
