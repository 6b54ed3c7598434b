"""How long the vision side's part of a training step takes on a rank: tiles through encoder and projector, and their messages.

All ranks encode, or the first stage's do. Tiles all cost the same: 1025 tokens through the encoder and 256 through the projector.
"""

from dataclasses import dataclass
from typing import Literal

from internvl_megatron.config.schema import ModelConfig
from internvl_megatron.scaling.collective_time import Group, Network
from internvl_megatron.scaling.counts import parameter_counts
from internvl_megatron.scaling.kernel_time import Kernels, Passes, Product


@dataclass(frozen=True)
class VisionRun:
    """How tiles are encoded."""

    model: ModelConfig
    chunk_tiles: int
    recompute: Literal["none", "layer", "full"]
    trainable: bool = True
    shard_ranks: int = 1
    """Ranks over which the parameters are divided; 1 = every rank has all."""


def tile_passes(run: VisionRun, kernels: Kernels) -> Passes:
    """Seconds of one tile on a rank that encodes `chunk_tiles` side by side; what is computed again is in the backward pass."""
    vision, width = run.model.vision, run.model.vision.hidden_size
    num_tokens = vision.patches_per_side**2 + 1
    tokens = run.chunk_tiles * num_tokens
    layer = kernels.tile_attention(run.chunk_tiles * num_tokens**2, width, width // vision.num_heads)
    for inputs, outputs in (
        (width, 3 * width),
        (width, width),
        (width, vision.ffn_hidden_size),
        (vision.ffn_hidden_size, width),
    ):
        layer = layer.plus(kernels.product(Product(tokens, inputs, outputs), run.trainable, in_fp8=False))
    # Values a token reads and writes: two norms, two residual sums with layer scale and drop path, GELU with bias.
    forward, backward = 14 * width + 3 * vision.ffn_hidden_size, 20 * width + 4 * vision.ffn_hidden_size
    layer = layer.plus(kernels.elementwise(2 * tokens * forward, 2 * tokens * backward))
    total = layer.times(vision.num_layers)
    image_tokens, shuffled = run.chunk_tiles * vision.tokens_per_tile, width * vision.shuffle_factor**2
    out = run.model.language.hidden_size
    for inputs in (shuffled, out):
        total = total.plus(kernels.product(Product(image_tokens, inputs, out), run.trainable, in_fp8=False))
    if run.recompute != "none":
        total = Passes(total.forward, total.backward + total.forward)
    return total.times(1 / run.chunk_tiles)


def chunk_gathers(run: VisionRun, kernels: Kernels, network: Network) -> Passes:
    """Exposed seconds of gathering a sharded encoder's layers for one chunk: what computing the chunk does not hide."""
    if run.shard_ranks == 1:
        return Passes(0.0, 0.0)
    once = tile_passes(run, kernels).times(run.chunk_tiles)
    num_layers = run.model.vision.num_layers
    one_layer = 2 * parameter_counts(run.model).vision / num_layers
    gather = network.all_gather(one_layer, Group(run.shard_ranks))
    # The first layer's is never hidden.
    return Passes(
        gather + max(0.0, num_layers * gather - once.forward), gather + max(0.0, num_layers * gather - once.backward)
    )


def reduce_seconds(run: VisionRun, world_size: int, network: Network, beside: float) -> float:
    """Exposed seconds of summing the vision side's gradients, and of gathering its parameters where every rank has all.

    Args:
        run: the vision side.
        world_size: ranks that encode.
        network: links.
        beside: seconds of the backward pass that messages may hide in.
    """
    if not run.trainable:
        return 0.0
    counts = parameter_counts(run.model)
    parameters = counts.vision + counts.projector
    if run.shard_ranks == 1:
        group = Group(world_size)
        sums, gathers = network.reduce_scatter(4 * parameters, group), network.all_gather(2 * parameters, group)
        last = network.reduce_scatter(4 * min(parameters, 40e6), group)
        return max(sums - beside, last) + max(gathers - beside / 2, last / 2)
    scattered = network.reduce_scatter(4 * parameters, Group(run.shard_ranks))
    copies = Group(world_size // run.shard_ranks, stride=run.shard_ranks)
    return max(0.0, scattered - beside) + 2 * network.all_gather(4 * parameters / run.shard_ranks, copies)
