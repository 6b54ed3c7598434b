"""How long the language model's part of a training step takes on every pipeline stage: kernels and messages of a row.

Letters: T tensor-parallel, C context-parallel, P pipeline ranks, V model chunks of a rank. Rows are full and alike. Durations
are of the rank, not of the row: tensor and context parallelism divide tokens and heads between ranks.
"""

from dataclasses import dataclass
from typing import Literal

from internvl_megatron.config.schema import LanguageConfig, padded_vocab_size
from internvl_megatron.parallel.layout import Layout
from internvl_megatron.scaling.collective_time import Group, Network
from internvl_megatron.scaling.counts import language_layer_parameters
from internvl_megatron.scaling.kernel_time import Kernels, Passes, Product


@dataclass(frozen=True)
class Habits:
    """What trainers do differently, that shows in the time of a step."""

    tensor_hidden_share: float = 0.0
    """Of the messages of tensor parallelism, those that go on beside products. Megatron Core as this project runs it: none."""
    neighbours_hidden_share: float = 0.5
    """Of the interleaved schedule's messages between stages, which it sends beside its passes. NVIDIA's LoRA rows (VPP20, one layer a
    message) take longer by 60 % (bf16) and 100 % (FP8) of them where they leave the machine; the rest of the schedule hides some."""
    context: Literal["all_to_all", "ring"] = "all_to_all"
    """Trade tokens for heads, or pass keys and values on beside attention."""
    gradient_bytes: int = 4
    """Of a gradient when it is summed over the copies."""
    all_positions: bool = False
    """Compute the output layer for every position, not for supervised ones alone."""


OURS = Habits()
"""This project."""


@dataclass(frozen=True)
class LanguageRun:
    """A language model, how it is spread, and the rows it trains on."""

    language: LanguageConfig
    layout: Layout
    stage_layers: tuple[int, ...]
    """Of the P x V stages in the order rows pass them."""
    rows_per_replica: int
    tokens_per_row: int
    """Computed: with padding."""
    pairs_per_row: float
    """Sum over the samples of a row of their length squared."""
    supervised_per_row: float
    sequence_parallel: bool = True
    recompute: Literal["none", "full"] = "none"
    trainable: bool = True

    def parameters(self, stage: int) -> float:
        """Of a rank on a pipeline stage."""
        language, layout = self.language, self.layout
        layers = sum(self.stage_layers[stage :: layout.pipeline_size])
        tables = (stage == 0) + (stage == layout.pipeline_size - 1)
        table = padded_vocab_size(language.vocab_size) * language.hidden_size
        return (layers * language_layer_parameters(language) + tables * table) / layout.tensor_size


@dataclass(frozen=True)
class StageTime:
    """Seconds of a pipeline stage on one row, all its chunks together."""

    kernels: Passes
    messages: Passes
    """Exposed ones, of tensor and context parallelism."""
    to_neighbours: Passes
    """Exposed messages between stages."""

    @property
    def passes(self) -> Passes:
        """All of it."""
        return self.kernels.plus(self.messages).plus(self.to_neighbours)

    @property
    def row(self) -> float:
        """Forward and backward."""
        return sum(self.passes)


def layer_kernels(run: LanguageRun, kernels: Kernels) -> Passes:
    """One layer on one row, without computing anything again."""
    language, layout = run.language, run.layout
    tensor, context = layout.tensor_size, layout.context_size
    tokens, width = run.tokens_per_row / context, language.hidden_size
    heads = language.num_heads * language.head_size
    key_values = 2 * max(language.num_kv_heads, tensor) * language.head_size  # repeated where there are fewer heads
    feed_forward = language.ffn_hidden_size
    host = kernels.gpu.layer_host_seconds
    total = Passes(host, 2 * host).plus(kernels.causal_attention(run.pairs_per_row / context, heads / tensor))
    for shape in (
        Product(tokens, width, (heads + key_values) / tensor),
        Product(tokens, heads / tensor, width),
        Product(tokens, width, 2 * feed_forward / tensor),
        Product(tokens, feed_forward / tensor, width),
    ):
        total = total.plus(kernels.product(shape, run.trainable))
    # Values a token reads and writes. Two norms (2 each) and residual sums (3 each), split along the row under sequence
    # parallelism; rotation of queries and keys (2 each); gate, up and their product (3; 5 backward).
    along_row = width * tokens / (tensor if run.sequence_parallel else 1)
    in_heads = (heads + key_values / 2) * tokens / tensor
    gated = feed_forward * tokens / tensor
    forward, backward = 10 * along_row + 2 * in_heads + 3 * gated, 15 * along_row + 2 * in_heads + 5 * gated
    return total.plus(kernels.elementwise(2 * forward, 2 * backward))


def layer_messages(run: LanguageRun, network: Network, habits: Habits, in_fp8: bool = False) -> tuple[Passes, Passes]:
    """Messages of one layer on one row: all of (tensor parallelism, context parallelism), exposed or not."""
    language, layout = run.language, run.layout
    tensor, context = layout.tensor_size, layout.context_size
    row_bytes = 2 * run.tokens_per_row / context * language.hidden_size
    scattered = network.reduce_scatter(row_bytes, Group(tensor))
    # Under sequence parallelism Transformer Engine gathers what it multiplies in FP8, rounded, and sums in bf16.
    gathered = network.all_gather(row_bytes / 2 if in_fp8 and run.sequence_parallel else row_bytes, Group(tensor))
    # Attention and MLP each gather (or copy) their input and sum their output; backward the same, and under sequence
    # parallelism the input is gathered again for the weights' gradient.
    once = 2 * (gathered + scattered)
    again = 2 * gathered if run.sequence_parallel and run.trainable else 0.0
    of_tensor = Passes(once, once + again)
    shared = Group(context, stride=tensor)
    local = 2 * run.tokens_per_row / context * language.head_size / tensor
    queries, keys_values = local * language.num_heads, 2 * local * max(language.num_kv_heads, tensor)
    if habits.context == "all_to_all":
        bytes_there, bytes_back = queries + keys_values, queries
        there = network.all_to_all(bytes_there, shared) + network.all_to_all(bytes_back, shared)
        return of_tensor, Passes(there, there)
    around = network.all_gather(keys_values * context, shared)
    return of_tensor, Passes(around, 2 * around)


def stage_time(run: LanguageRun, stage: int, kernels: Kernels, network: Network, habits: Habits = OURS) -> StageTime:
    """Seconds of one pipeline stage on one row."""
    layout = run.layout
    layers = sum(run.stage_layers[stage :: layout.pipeline_size])
    layer = layer_kernels(run, kernels)
    of_tensor, of_context = layer_messages(run, network, habits, kernels.precision == "fp8")
    exposed = of_tensor.times(1 - habits.tensor_hidden_share)
    if habits.context == "ring":
        of_context = Passes(*(max(0.0, sent - done) for sent, done in zip(of_context, layer, strict=True)))
    exposed = exposed.plus(of_context)
    if run.recompute == "full":
        layer = Passes(layer.forward, layer.backward + layer.forward)
        exposed = Passes(exposed.forward, exposed.backward + exposed.forward)
    work, messages = layer.times(layers), exposed.times(layers)
    if stage == layout.pipeline_size - 1:
        work = work.plus(_output_layer(run, kernels, habits))
    return StageTime(work, messages, _to_neighbours(run, network, habits))


def stage_times(run: LanguageRun, kernels: Kernels, network: Network, habits: Habits = OURS) -> list[StageTime]:
    """Of every pipeline stage."""
    alike: dict[tuple[int, bool], StageTime] = {}
    times, num_stages = [], run.layout.pipeline_size
    for stage in range(num_stages):
        kind = (sum(run.stage_layers[stage::num_stages]), stage == num_stages - 1)
        if kind not in alike:
            alike[kind] = stage_time(run, stage, kernels, network, habits)
        times.append(alike[kind])
    return times


def _output_layer(run: LanguageRun, kernels: Kernels, habits: Habits) -> Passes:
    language, layout = run.language, run.layout
    positions = (run.tokens_per_row if habits.all_positions else run.supervised_per_row) / layout.context_size
    columns = padded_vocab_size(language.vocab_size) / layout.tensor_size
    product = kernels.product(Product(positions, language.hidden_size, columns), run.trainable, in_fp8=False)
    logits = 4 * positions * columns  # read for the largest and the sum, read and written for the gradient
    return product.plus(kernels.elementwise(3 * logits, 2 * logits))


def neighbour_seconds(run: LanguageRun, network: Network, habits: Habits = OURS) -> tuple[float, float]:
    """Seconds of a message between stages: (until it is there, of these those that hold up its sender)."""
    layout = run.layout
    divided = layout.tensor_size if run.sequence_parallel else 1
    num_bytes = 2 * run.tokens_per_row * run.language.hidden_size / layout.context_size / divided
    once = network.message(num_bytes, stride=layout.stage_size * layout.data_size)
    return once, once * (1 - habits.neighbours_hidden_share if layout.virtual_size > 1 else 1)


def _to_neighbours(run: LanguageRun, network: Network, habits: Habits) -> Passes:
    """Exposed messages between stages, V of them for a row's pass."""
    if run.layout.pipeline_size == 1:
        return Passes(0.0, 0.0)
    exposed = run.layout.virtual_size * neighbour_seconds(run, network, habits)[1]
    return Passes(exposed, exposed)


def pipeline_seconds(run: LanguageRun, stages: list[StageTime]) -> tuple[float, float]:
    """Seconds of (the whole schedule over a replica's rows, of these the pauses of the busiest stage).

    Between equal rows stages wait for the busiest; it waits until the first row is there and the last one is gone, V times
    shorter with V chunks a rank. For V = 1 and equal stages this is (M + P - 1) (f + b), as `pipeline_time` finds too.
    """
    rows = [stage.row for stage in stages]
    busiest = max(rows)
    pause = (sum(rows) - busiest) / run.layout.virtual_size
    return run.rows_per_replica * busiest + pause, pause


def data_parallel_seconds(
    run: LanguageRun, stages: list[StageTime], kernels: Kernels, network: Network, habits: Habits
) -> tuple[float, float]:
    """Seconds of (exposed messages between the copies of the model, the optimizer), on the stage where they are longest.

    Gradients are summed during the last row's backward pass, parameters gathered during the next forward pass; what is left
    is exposed, and at least the last bucket is.
    """
    layout = run.layout
    if not run.trainable:
        return 0.0, 0.0
    num_copies = layout.data_size * layout.context_size
    group = Group(num_copies, stride=layout.tensor_size)
    exposed, updates = [], []
    for number, stage in enumerate(stages):
        parameters = run.parameters(number)
        bucket = min(parameters, max(40e6, 1e6 * num_copies))  # Megatron Core's default, elements
        times = []
        for message, size, beside in (
            (network.reduce_scatter, habits.gradient_bytes, stage.passes.backward),
            (network.all_gather, 2, stage.passes.forward),
        ):
            beside_chunk = beside / layout.virtual_size
            whole, last = (message(size * count, group) for count in (parameters, bucket))
            times.append(max(whole - beside_chunk, last))
        exposed.append(sum(times))
        updates.append(kernels.update(parameters / num_copies))
    return max(exposed), max(updates)
