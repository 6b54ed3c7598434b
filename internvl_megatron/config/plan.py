"""Checks a configuration as a whole and derives the numbers that follow from it. Pure: no torch, no files."""

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

from internvl_megatron.config.benchmark_rules import benchmark_problems
from internvl_megatron.config.fp8_rules import fp8_problems, row_multiple
from internvl_megatron.config.kernel_rules import kernel_problems
from internvl_megatron.config.lora_rules import lora_problems
from internvl_megatron.config.mpo_rules import mpo_problems
from internvl_megatron.config.optimizer_rules import schedule_problems
from internvl_megatron.config.ramp import ramp_problems
from internvl_megatron.config.schema import RunConfig, padded_vocab_size
from internvl_megatron.config.value_rules import (
    data_problems,
    folder_problems,
    model_problems,
    number_problems,
    time_limit_problems,
)
from internvl_megatron.errors import ConfigError
from internvl_megatron.parallel.layout import Layout, VisionLayout
from internvl_megatron.scaling.counts import forward_flops

ACCEPTED_IMBALANCE = 0.03
"""Of the tiles a rank encodes: how far the busiest exchange group may be above the mean, as predicted."""
TILES_SPREAD = {"best_fit": 0.21, "first_fit": 0.40}
"""Of the tiles of rows: standard deviation over mean, by packer, at 16K and half image tokens (docs/packing.md). Rows of 32K have
less. With fewer image tokens it is larger by about as much as there is less to encode."""


@dataclass(frozen=True)
class RunPlan:
    """What follows from a configuration and a number of ranks."""

    layout: Layout
    vision_layout: VisionLayout
    rows_per_replica: int
    """Micro-batches of one replica in a step, when the global batch has its full size."""
    balance_rows: bool
    """Replicas trade rows; False where that would change the loss, or where there is nobody to trade with."""
    stage_layers: tuple[int, ...]
    """Layers of every stage in the order rows pass them."""
    padded_vocab_size: int


def plan(config: RunConfig, world_size: int) -> RunPlan:
    """Check everything that one field alone cannot tell.

    Raises:
        ConfigError: with one line per problem, each naming the field, its value and what to set.
    """
    # Numbers first: the other checks divide by them.
    problems = number_problems(config, "") or [
        *model_problems(config.model),
        *data_problems(config),
        *_layout(config, world_size),
        *kernel_problems(config),
        *schedule_problems(config.optimizer, config.num_steps),
        *folder_problems(config),
        *time_limit_problems(config),
        *lora_problems(config),
        *mpo_problems(config),
        *benchmark_problems(config),
    ]
    if problems:
        raise ConfigError("\n".join(f"config: {problem}" for problem in problems))
    parallel = config.parallel
    data_size = world_size // _replica_size(config)
    layout = Layout(
        parallel.tensor_size,
        parallel.pipeline_size,
        data_size,
        parallel.context_size,
        parallel.virtual_size,
        parallel.context_ring_size,
    )
    rows_meet = config.loss.kind == "next_token" and config.loss.normalize == "micro_batch"
    return RunPlan(
        layout=layout,
        vision_layout=vision_layout(config, layout),
        rows_per_replica=config.rows_per_step // data_size,
        balance_rows=config.data.balance_rows and not rows_meet and data_size > 1,
        stage_layers=stage_layers(config),
        padded_vocab_size=padded_vocab_size(config.model.language.vocab_size),
    )


def vision_layout(config: RunConfig, layout: Layout) -> VisionLayout:
    """Who encodes tiles, and between whom they travel."""
    parallel = config.parallel
    if parallel.vision_placement != "all_ranks":
        first_stage_only = parallel.vision_placement == "first_stage"
        return VisionLayout(layout, _unit_ranks(config), exchange_replicas=1, first_stage_only=first_stage_only)
    replicas = parallel.vision_exchange_replicas or exchange_replicas(config, layout.data_size)
    return VisionLayout(layout, _unit_ranks(config), replicas)


def cut_multiple(config: RunConfig, layout: Layout) -> int | None:
    """Tokens that rows without their padding have a multiple of; None where rows keep it."""
    return None if config.parallel.pad_rows else math.lcm(layout.row_multiple, row_multiple(config))


def exchange_replicas(config: RunConfig, data_size: int) -> int:
    """The fewest replicas between which tiles must travel for every rank to encode about as many.

    Inside an exchange group ranks differ by a tile; the groups differ by what their rows of a window happen to hold.
    """
    rows_per_replica = config.rows_per_step // data_size
    rows = min(config.parallel.vision_window_rows or rows_per_replica, rows_per_replica)
    for replicas in range(1, data_size + 1):
        if data_size % replicas or replicas * _replica_size(config) % _unit_ranks(config):
            continue
        spread = TILES_SPREAD[config.data.packing]
        if excess_of_busiest(data_size // replicas, replicas * rows, spread) <= ACCEPTED_IMBALANCE:
            return replicas
    return data_size


def excess_of_busiest(num_groups: int, rows_of_group: int, spread: float) -> float:
    """Tiles of the group that has most, over the mean, less 1: expected.

    A group's tiles are taken as normal. The largest of n is on average at the quantile (n - 3/8) / (n + 1/4) (Blom).
    """
    deviations = NormalDist().inv_cdf((num_groups - 3 / 8) / (num_groups + 1 / 4))
    return spread * deviations / math.sqrt(rows_of_group)


def _unit_ranks(config: RunConfig) -> int:
    """Ranks that encode a tile together."""
    parallel = config.parallel
    return parallel.tensor_size if parallel.vision_placement == "colocated" else parallel.vision_tensor_size


def _layout(config: RunConfig, world_size: int) -> list[str]:
    parallel, data = config.parallel, config.data
    tensor, pipeline = parallel.tensor_size, parallel.pipeline_size
    problems = []
    replica_size, context = _replica_size(config), parallel.context_size
    if world_size % replica_size:
        parts = f"parallel.tensor_size={tensor} x parallel.pipeline_size={pipeline}"
        if context > 1:
            parts += f" x parallel.context_size={context}"
        problems.append(
            f"{parts} = {replica_size} ranks a replica, which does not divide the {world_size} ranks of this run: change "
            f"them, or start a multiple of {replica_size} ranks (--nproc)"
        )
    data_size = max(1, world_size // replica_size)
    shared = {"rows_per_step": config.rows_per_step}
    if config.eval_every_steps is not None:
        shared["eval_rows"] = config.eval_rows
    problems += [
        f"{name}={rows} must be a multiple of the {data_size} replicas"
        for name, rows in shared.items()
        if rows % data_size
    ]
    problems += ramp_problems(config, data_size)
    problems += _stages(config, data_size)
    if pipeline * parallel.virtual_size > config.model.language.num_layers:
        return problems  # the checks below look at every stage
    problems += _vision(config, data_size)
    problems += tensor_problems(config)
    if parallel.sequence_parallel and tensor == 1:
        problems.append("parallel.sequence_parallel=true needs parallel.tensor_size > 1")
    if parallel.language_offload and config.kernels.loss_chunk_tokens is None:
        problems.append(
            "parallel.language_offload=true with kernels.loss_chunk_tokens=null would move all logits of a row to host memory "
            "and back; leave kernels.loss_chunk_tokens out"
        )
    if data.tokens_per_row % (tensor * context):
        size = f"parallel.tensor_size={tensor}"
        if context > 1:
            size += f" x parallel.context_size={context}"
        problems.append(f"data.tokens_per_row={data.tokens_per_row} must be a multiple of {size}")
    return problems + _context(config) + fp8_problems(config, _unit_ranks(config))


def tensor_problems(config: RunConfig) -> list[str]:
    """Sizes of the language model that its tensor-parallel ranks cannot share."""
    language, tensor = config.model.language, config.parallel.tensor_size
    problems = []
    for what, value in (
        ("model.language.num_heads", language.num_heads),
        ("model.language.ffn_hidden_size", language.ffn_hidden_size),
        (
            f"the padded vocabulary (model.language.vocab_size={language.vocab_size})",
            padded_vocab_size(language.vocab_size),
        ),
    ):
        if value % tensor:
            problems.append(f"parallel.tensor_size={tensor} must divide {what}={value}")
    if language.num_kv_heads % tensor and tensor % language.num_kv_heads:
        problems.append(
            f"parallel.tensor_size={tensor} must divide model.language.num_kv_heads={language.num_kv_heads}, or be a "
            "multiple of it"
        )
    return problems


def stage_layers(config: RunConfig) -> tuple[int, ...]:
    """Layers of every pipeline stage in the order rows pass them."""
    parallel = config.parallel
    if parallel.stage_layers is not None:
        return parallel.stage_layers
    num_layers, num_stages = config.model.language.num_layers, parallel.pipeline_size * parallel.virtual_size
    if parallel.vision_placement == "first_stage" and parallel.virtual_size == 1 < num_stages <= num_layers:
        return _beside_the_encoder(config)
    return (num_layers // num_stages,) * num_stages


def _beside_the_encoder(config: RunConfig) -> tuple[int, ...]:
    """Layers of every stage where the first one also runs the vision encoder, for the fastest slowest stage.

    Counted for rows that are half image tokens (or as many as fit the tile budget), half of the rest supervised.
    """
    model, data, num_stages = config.model, config.data, config.parallel.pipeline_size
    tiles = min(data.tiles_per_row, data.tokens_per_row // 2 // model.vision.tokens_per_tile)
    supervised = (data.tokens_per_row - tiles * model.vision.tokens_per_tile) // 2
    work = forward_flops(model, data.tokens_per_row, tiles, data.tokens_per_row**2)
    tables = replace(model, language=replace(model.language, num_layers=0))
    head = forward_flops(tables, supervised, 0, 0).language
    layers = work.language - forward_flops(tables, data.tokens_per_row, 0, 0).language
    cost = [0.0] * num_stages
    cost[0] += work.vision + work.projector
    cost[-1] += head
    counts = [1] * num_stages
    per_layer = layers / model.language.num_layers
    for _ in range(model.language.num_layers - num_stages):
        lightest = min(range(num_stages), key=lambda stage: cost[stage] + counts[stage] * per_layer)
        counts[lightest] += 1
    return tuple(counts)


def _stages(config: RunConfig, data_size: int) -> list[str]:
    """How layers are divided over the pipeline, and how many rows its schedule takes at a time."""
    parallel, num_layers = config.parallel, config.model.language.num_layers
    pipeline, virtual = parallel.pipeline_size, parallel.virtual_size
    num_stages = pipeline * virtual
    what = f"parallel.pipeline_size={pipeline}" + (f" x parallel.virtual_size={virtual}" if virtual > 1 else "")
    if num_stages > num_layers:
        return [f"{what} is more stages than model.language.num_layers={num_layers}: every stage needs a layer"]
    problems = []
    chosen = parallel.vision_placement == "first_stage" and virtual == 1
    if parallel.stage_layers is None:
        if not chosen and num_layers % num_stages:
            more = num_layers % num_stages
            split = [num_layers // num_stages + (index < more) for index in range(num_stages)]
            problems.append(
                f"{what} must divide model.language.num_layers={num_layers}, or say how they are divided: "
                f"parallel.stage_layers={','.join(map(str, split))}"
            )
    elif len(parallel.stage_layers) != num_stages or sum(parallel.stage_layers) != num_layers:
        problems.append(
            f"parallel.stage_layers={','.join(map(str, parallel.stage_layers))} must be {num_stages} numbers ({what}) that "
            f"add up to model.language.num_layers={num_layers}"
        )
    elif min(parallel.stage_layers) < 1:
        problems.append("parallel.stage_layers: every stage needs a layer")
    if virtual > 1 and pipeline == 1:
        problems.append(f"parallel.virtual_size={virtual} needs parallel.pipeline_size > 1")
    elif virtual > 1:
        rows = config.rows_per_step // data_size
        window = parallel.vision_window_rows or rows
        counts = {"rows of a replica in a step (rows_per_step)": rows, "parallel.vision_window_rows": window}
        if config.eval_every_steps is not None:
            counts["rows of a replica in an evaluation (eval_rows)"] = config.eval_rows // data_size
        problems += [
            f"parallel.virtual_size={virtual}: the {name} are {count}, which must be a multiple of {pipeline} "
            "(parallel.pipeline_size)"
            for name, count in counts.items()
            if count % pipeline
        ]
    return problems


def _vision(config: RunConfig, data_size: int) -> list[str]:
    """Who encodes tiles: units must be whole, exchange groups too, and the baselines cannot do everything."""
    parallel, vision = config.parallel, config.model.vision
    placement, unit = parallel.vision_placement, _unit_ranks(config)
    problems = []
    replicas = parallel.vision_exchange_replicas
    if placement != "all_ranks":
        if replicas not in (None, 1):
            problems.append(
                f"parallel.vision_exchange_replicas={replicas}: with parallel.vision_placement={placement} tiles stay in their "
                "replica; leave it out"
            )
        replicas = 1
    elif replicas is not None and data_size % replicas:
        problems.append(
            f"parallel.vision_exchange_replicas={replicas} must divide the {data_size} replicas (1 = tiles stay in their "
            "replica; leave it out to have it chosen)"
        )
    stage = parallel.tensor_size * parallel.context_size
    ranks = stage if placement == "first_stage" else _replica_size(config) * (replicas or data_size)
    if ranks % unit:
        problems.append(
            f"parallel.vision_tensor_size={unit} must divide the {ranks} ranks that share tiles out; 1 is fastest"
        )
    if vision.ffn_hidden_size % unit:
        colocated = placement == "colocated"
        problems.append(
            f"parallel.{'tensor_size' if colocated else 'vision_tensor_size'}={unit} must divide "
            f"model.vision.ffn_hidden_size={vision.ffn_hidden_size} (heads may be any number)"
            + ("; or leave parallel.vision_placement out" if colocated else "; 1 is fastest")
        )
    if placement == "colocated":
        if parallel.pipeline_size > 1 or parallel.context_size > 1:
            problems.append(
                "parallel.vision_placement=colocated: needs parallel.pipeline_size=1 and parallel.context_size=1; the default, "
                "all_ranks, does not"
            )
        if parallel.vision_tensor_size not in (1, parallel.tensor_size):
            problems.append(
                "parallel.vision_placement=colocated: tiles are encoded by the language model's tensor-parallel ranks; leave "
                "parallel.vision_tensor_size out"
            )
    if placement == "first_stage" and parallel.vision_recompute == "full":
        problems.append(
            "parallel.vision_placement=first_stage: the encoder runs inside the pipeline, which cannot run it a second time "
            "from tiles; set parallel.vision_recompute=layer"
        )
    return problems + _vision_shards(config, data_size * _replica_size(config))


def _vision_shards(config: RunConfig, world_size: int) -> list[str]:
    """What goes together with a sharded vision side."""
    parallel = config.parallel
    shard_ranks, problems = parallel.vision_shard_ranks, []
    if parallel.vision_sharding == "replicated":
        if shard_ranks is not None:
            problems.append(
                f"parallel.vision_shard_ranks={shard_ranks} needs parallel.vision_sharding=sharded; leave it out"
            )
        return problems
    if parallel.vision_placement != "all_ranks":
        problems.append(
            f"parallel.vision_sharding=sharded: needs all ranks to encode at the same time, and with "
            f"parallel.vision_placement={parallel.vision_placement} they do not; set parallel.vision_sharding=replicated, or "
            "leave parallel.vision_placement out"
        )
    if parallel.vision_tensor_size > 1:
        problems.append(
            f"parallel.vision_sharding=sharded: the encoder is split already and is not tensor parallel as well; leave "
            f"parallel.vision_tensor_size={parallel.vision_tensor_size} out"
        )
    if shard_ranks is not None and world_size % shard_ranks:
        problems.append(
            f"parallel.vision_shard_ranks={shard_ranks} must divide the {world_size} ranks of this run; leave it out to split "
            "the vision side over all of them"
        )
    return problems


def _context(config: RunConfig) -> list[str]:
    """Context parallelism trades parts of the row for heads: both kinds of heads must go around."""
    language, data, tensor, ring = (
        config.model.language,
        config.data,
        config.parallel.tensor_size,
        config.parallel.context_ring_size,
    )
    problems = []
    if config.parallel.context_size % ring:
        problems.append(
            f"parallel.context_ring_size={ring} must divide parallel.context_size={config.parallel.context_size}"
        )
    if ring > 1 and data.sample_multiple_tokens % (2 * ring):
        problems.append(
            f"data.sample_multiple_tokens={data.sample_multiple_tokens} must be a multiple of {2 * ring} (twice "
            "parallel.context_ring_size): every sample is divided over the ring by itself"
        )
    context = max(1, config.parallel.context_size // ring)  # ranks that share heads
    if language.num_heads % (tensor * context):
        problems.append(
            f"parallel.tensor_size={tensor} x {_sharing(config)} must divide model.language.num_heads={language.num_heads}"
        )
    local_kv_heads = max(1, language.num_kv_heads // tensor)
    if local_kv_heads % context and context % local_kv_heads:
        problems.append(
            f"{_sharing(config)} must divide the {local_kv_heads} key/value heads of a tensor-parallel rank "
            f"(model.language.num_kv_heads={language.num_kv_heads}), or be a multiple of them"
        )
    return problems


def _sharing(config: RunConfig) -> str:
    """The context-parallel ranks that share heads, in words."""
    size, ring = config.parallel.context_size, config.parallel.context_ring_size
    return f"parallel.context_size={size}" + (f" / parallel.context_ring_size={ring}" if ring > 1 else "")


def _replica_size(config: RunConfig) -> int:
    """Ranks of one copy of the language model."""
    return config.parallel.tensor_size * config.parallel.pipeline_size * config.parallel.context_size
