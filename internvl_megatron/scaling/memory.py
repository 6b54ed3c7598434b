"""What one rank of a run holds in the memory of its device: state in closed form, activations as an estimate.

State is weights, gradients and AdamW's: in bf16 2 + 4 bytes a parameter on every rank that has it, and 12 more (8 with moments in
bf16) divided over its copies; of a sharded vision side 16 bytes divided over all. Tests compare it with what is allocated.
Activations are those of full rows and full tile budgets, with Transformer Engine's layers as `saved_tensors` models them, at the two
moments of a step at which a rank can have most: when most rows are under way, beside what a layer's backward pass needs for itself or
the loss does, and while the encoder runs. Tests compare them with dry runs. What is left (libraries, driver, fragments) is a flat guess.
"""

from dataclasses import dataclass

from internvl_megatron.config.plan import RunPlan
from internvl_megatron.config.schema import LanguageConfig, ModelConfig, RunConfig, VisionConfig
from internvl_megatron.scaling.counts import parameter_counts
from internvl_megatron.scaling.saved_tensors import BF16, FP8_WEIGHT_BYTES, FP32, layer_shape, saved_bytes

OTHER_BYTES = 6e9
"""Taken for the driver's own memory, and for work space of the libraries."""
UNEVEN_IMAGE_TOKENS = 1.1
"""Of a rank's part of a row over an even share: 38B on 64 GPUs, dry."""
USED_SHARE = 0.95
"""Of a device's memory; the rest is lost between allocations."""


@dataclass(frozen=True)
class RankBytes:
    """Bytes on the rank that has most."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def state(self) -> float:
        """What is there all the time."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """With activations and all that is not counted singly: an estimate."""
        return self.state + self.activations + OTHER_BYTES


def rank_bytes(config: RunConfig, plan: RunPlan) -> RankBytes:
    """Memory of the rank that has most, for AdamW."""
    stages = [_state_of_stage(config, plan, stage) for stage in range(plan.layout.pipeline_size)]
    vision = _state_of_vision(config, plan)
    fullest = max(
        range(len(stages)), key=lambda stage: sum(stages[stage]) + _language_activations(config, plan, stage)
    )
    weights, gradients, optimizer = (one + other for one, other in zip(stages[fullest], vision, strict=True))
    return RankBytes(weights, gradients, optimizer, _activations(config, plan, fullest))


@dataclass(frozen=True)
class SaveBytes:
    """Host memory that saving takes on the rank that takes most, besides what the run has anyway."""

    fast: float
    """In the fast format: what the rank writes, once. It stays between saves."""
    layout_free: float
    """In the layout-free format: the optimizer state of the rank's whole parameters, gathered, and its share of the weights. Once
    written, the former is freed."""


def save_bytes(config: RunConfig, plan: RunPlan) -> SaveBytes:
    """Host memory of a save, for AdamW; a parameter more or less, as ranks share out whole ones."""
    layout, counts = plan.layout, parameter_counts(config.model)
    kept = 4 + (8 if config.optimizer.moments == "fp32" else 4)  # an fp32 weight and two moments
    weight = 2 if config.dtype == "bf16" else 4
    language = max(stage_parameters(config.model, plan, stage) for stage in range(layout.pipeline_size))
    copies = layout.data_size * layout.context_size
    fast = language * (weight + kept) / copies
    layout_free = language * (weight / copies + kept)
    vision = counts.vision + counts.projector
    if config.parallel.vision_sharding == "sharded":  # written as it is in both formats
        shard = vision / (config.parallel.vision_shard_ranks or layout.world_size) * (weight + kept)
        return SaveBytes(fast + shard, layout_free + shard)
    per_rank = vision / plan.vision_layout.tensor_size
    return SaveBytes(
        fast + vision * (weight + kept) / layout.world_size,
        layout_free + per_rank * kept + vision * weight / layout.world_size,
    )


def stage_parameters(model: ModelConfig, plan: RunPlan, stage: int) -> int:
    """Parameters of the language model on a rank of a pipeline stage."""
    language, layout = model.language, plan.layout
    tensor, num_stages = layout.tensor_size, layout.pipeline_size
    layers = sum(plan.stage_layers[stage::num_stages])
    table = plan.padded_vocab_size // tensor * language.hidden_size
    parameters = layers * _layer_parameters(language, tensor)
    if stage == 0:
        parameters += table
    if stage == num_stages - 1:
        parameters += table + language.hidden_size  # the norm after the last layer
    return parameters


def tile_activation_bytes(vision: VisionConfig) -> int:
    """What the vision encoder keeps of a tile for backward in bf16.

    Of a layer its input, both norms', q, k and v together, attention's, the projection's, the first sum and the MLP's output (10 widths);
    the MLP before and after GELU; where queries and keys have norms, these norms' inputs, copied out of q, k and v, and outputs.
    """
    widths = 10 + (4 if vision.qk_norm else 0)
    values = (vision.patches_per_side**2 + 1) * (widths * vision.hidden_size + 2 * vision.ffn_hidden_size)
    return BF16 * vision.num_layers * values


def _layer_parameters(language: LanguageConfig, tensor_size: int) -> int:
    """Of a layer on one of the ranks it is split over; key and value weights are divided too where there are fewer heads."""
    width, heads = language.hidden_size, language.num_heads * language.head_size
    qkv = heads + 2 * language.num_kv_heads * language.head_size
    attention = (qkv * (width + language.qkv_bias) + heads * width) // tensor_size
    return attention + 3 * width * (language.ffn_hidden_size // tensor_size) + 2 * width


def _state(config: RunConfig, parameters: int, num_copies: int, trainable: bool) -> tuple[float, float, float]:
    """Bytes of (weights, gradients, optimizer) of parameters whose optimizer state is divided over their copies."""
    in_bf16 = config.dtype == "bf16"
    weights = (2 if in_bf16 else 4) * parameters
    if not trainable:
        return weights, 0, 0
    moments = 8 if config.optimizer.moments == "fp32" else 4
    masters = 4 if in_bf16 else 0
    return weights, 4 * parameters, (masters + moments) * parameters / num_copies


def _state_of_stage(config: RunConfig, plan: RunPlan, stage: int) -> tuple[float, float, float]:
    parameters = stage_parameters(config.model, plan, stage)
    num_copies = plan.layout.data_size * plan.layout.context_size
    return _state(config, parameters, num_copies, config.optimizer.language.trainable)


def _state_of_vision(config: RunConfig, plan: RunPlan) -> tuple[float, float, float]:
    counts, parts, world_size = parameter_counts(config.model), config.optimizer, plan.layout.world_size
    sides = ((counts.vision, parts.vision.trainable), (counts.projector, parts.projector.trainable))
    if config.parallel.vision_sharding == "sharded":
        ranks = config.parallel.vision_shard_ranks or world_size
        vision = config.model.vision
        # Class token and position table are of one row, which the first rank has.
        of_one_row = (2 + vision.patches_per_side**2) * vision.hidden_size
        undivided = of_one_row * (ranks - 1) / ranks
        shards = ((counts.vision / ranks + undivided, sides[0][1]), (counts.projector / ranks, sides[1][1]))
        weights = sum(4 * shard for shard, _ in shards)
        gradients = sum(4 * shard for shard, trainable in shards if trainable)
        return weights, gradients, 2 * gradients
    return vision_state(config, world_size)


def vision_state(config: RunConfig, num_copies: int) -> tuple[float, float, float]:
    """Bytes of (weights, gradients, optimizer) of a vision side that so many ranks have, each all of it."""
    counts, parts = parameter_counts(config.model), config.optimizer
    sides = ((counts.vision, parts.vision.trainable), (counts.projector, parts.projector.trainable))
    states = [_state(config, parameters, num_copies, trainable) for parameters, trainable in sides]
    weights, gradients, optimizer = (sum(values) for values in zip(*states, strict=True))
    return weights, gradients, optimizer


def _parts(config: RunConfig) -> int:
    """Ranks over which the tokens of a row are divided between layers."""
    parallel = config.parallel
    return parallel.context_size * (parallel.tensor_size if parallel.sequence_parallel else 1)


def _embedding_bytes(config: RunConfig, tokens: int) -> float:
    """Of the image tokens that a rank of the first stage has, of so many in its replica."""
    parts = _parts(config)
    return BF16 * tokens * config.model.language.hidden_size / parts * (UNEVEN_IMAGE_TOKENS if parts > 1 else 1.0)


def _window_rows(config: RunConfig, plan: RunPlan) -> int:
    """Of a replica, encoded together; a window may be longer than a step."""
    return min(plan.rows_per_replica, config.parallel.vision_window_rows or plan.rows_per_replica)


def rows_under_way(config: RunConfig, plan: RunPlan, stage: int) -> float:
    """Of which a stage keeps its activations when it keeps most, a chunk of a row as a part of one."""
    layout = plan.layout
    stages, chunks = layout.pipeline_size, layout.virtual_size
    rows = _window_rows(config, plan)
    if chunks == 1:
        return min(rows, stages - stage)
    # Megatron Core's interleaved schedule: passes before the first backward pass, and the one it is the backward pass of.
    return min(rows, (2 * (stages - stage - 1) + (chunks - 1) * stages + 1) / chunks)


def _language_activations(config: RunConfig, plan: RunPlan, stage: int) -> float:
    """Of the rows that are under way on a stage when most are, and of the pass that runs then."""
    shape, stages = layer_shape(config), plan.layout.pipeline_size
    in_fp8, again = config.fp8.language != "none", config.parallel.language_recompute == "full"
    saved = saved_bytes(shape, "transformer_engine", in_fp8).total
    width, feed_forward = shape.language.hidden_size, shape.language.ffn_hidden_size / shape.tensor_size
    kept = BF16 * shape.tokens_between * width if again else saved
    layers, rows = sum(plan.stage_layers[stage::stages]), rows_under_way(config, plan, stage)
    # A layer's backward pass: gradients of gate, up and their product; its input, whole, and the gradient of that.
    one_pass = BF16 * shape.tokens * (3 * feed_forward + 2 * width)
    # Rounded copies of the stage's weights are kept from micro-batch to micro-batch.
    one_layer = FP8_WEIGHT_BYTES * _layer_parameters(config.model.language, shape.tensor_size)
    rounded = layers * one_layer if in_fp8 else 0.0
    passing = one_pass + saved * again
    if stage == stages - 1:
        passing = max(passing, _loss_bytes(config, plan))
    return layers * rows * kept + rounded + passing


def _loss_bytes(config: RunConfig, plan: RunPlan) -> float:
    """Of the output layer and the loss: its weight's gradient in fp32 and once more in bf16, the whole row before and its gradient, and
    logits of a chunk in both formats."""
    shape = layer_shape(config)
    width, columns = shape.language.hidden_size, plan.padded_vocab_size / shape.tensor_size
    positions = min(shape.tokens, config.kernels.loss_chunk_tokens or shape.tokens)
    row = 3 * BF16 * shape.tokens * width
    return (FP32 + BF16) * columns * (width + positions) + row


def _activations(config: RunConfig, plan: RunPlan, stage: int) -> float:
    """Language model and encoder together: they do not have all of theirs at the same time."""
    vision, parallel, data = config.model.vision, config.parallel, config.data
    window_rows = _window_rows(config, plan)
    replica_ranks = plan.layout.stage_size * plan.layout.pipeline_size
    tiles = -(-window_rows * data.tiles_per_row // replica_ranks)  # of a rank, in a window
    embeddings = 0.0
    if stage == 0:
        tokens = window_rows * data.tiles_per_row * vision.tokens_per_tile
        embeddings = _embedding_bytes(config, tokens)
    pixels, kept, at_a_time = encoder_activations(config, tiles)
    gathered = 0.0
    if parallel.vision_sharding == "sharded":
        # Weights of two layers in bf16, gradients of one in fp32; the position table, of one row, as if every rank had as much of it.
        ranks = parallel.vision_shard_ranks or plan.layout.world_size
        gathered = 8 * parameter_counts(config.model).vision / vision.num_layers
        gathered += BF16 * ranks * vision.patches_per_side**2 * vision.hidden_size
    if parallel.sequence_parallel:  # Megatron Core keeps the memory that rows' tokens are gathered in
        shape = layer_shape(config)
        gathered += BF16 * shape.tokens * shape.language.hidden_size
    language = _language_activations(config, plan, stage)
    return pixels + embeddings + kept + max(language, at_a_time + gathered)


def encoder_activations(config: RunConfig, tiles: int) -> tuple[float, float, float]:
    """Of tiles whose backward pass is still to come, on a rank: (pixels, what is kept of all, what is there of a chunk at a time)."""
    vision, recompute = config.model.vision, config.parallel.vision_recompute
    chunk_tiles = min(config.parallel.vision_chunk_tiles, tiles)
    per_tile = tile_activation_bytes(vision)
    layer_inputs = 2 * vision.num_layers * (vision.patches_per_side**2 + 1) * vision.hidden_size
    kept, at_a_time = {
        "none": (tiles * per_tile, 0.0),
        "layer": (tiles * layer_inputs, chunk_tiles * per_tile / vision.num_layers),
        "full": (0.0, chunk_tiles * per_tile),
    }[recompute]
    return tiles * 3.0 * vision.tile_pixels**2, kept, at_a_time


def first_stage_bytes(config: RunConfig, plan: RunPlan) -> float:
    """The rank that has most, where the ranks of the first stage encode, and have the encoder, alone: an estimate."""
    layout = plan.layout
    rows = min(plan.rows_per_replica, layout.pipeline_size)
    tiles = rows * -(-config.data.tiles_per_row // layout.stage_size)
    encoder = sum(vision_state(config, layout.stage_size * layout.data_size)) + sum(encoder_activations(config, tiles))
    return OTHER_BYTES + max(
        _bytes_of_stage(config, plan, stage) + (encoder if stage == 0 else 0) for stage in range(layout.pipeline_size)
    )


def language_bytes(config: RunConfig, plan: RunPlan) -> float:
    """The rank that has most, where none of these ranks encodes: an estimate."""
    tokens = min(plan.rows_per_replica, plan.layout.pipeline_size) * config.data.tiles_per_row
    tokens *= config.model.vision.tokens_per_tile
    embeddings = _embedding_bytes(config, tokens)
    return OTHER_BYTES + max(
        _bytes_of_stage(config, plan, stage) + (embeddings if stage == 0 else 0)
        for stage in range(plan.layout.pipeline_size)
    )


def encoder_bytes(config: RunConfig, num_ranks: int, tiles: int) -> float:
    """A rank of those that do nothing but encode, and have the encoder each, with so many tiles under way: an estimate."""
    return OTHER_BYTES + sum(vision_state(config, num_ranks)) + sum(encoder_activations(config, tiles))


def _bytes_of_stage(config: RunConfig, plan: RunPlan, stage: int) -> float:
    """The language model's."""
    return sum(_state_of_stage(config, plan, stage)) + _language_activations(config, plan, stage)
