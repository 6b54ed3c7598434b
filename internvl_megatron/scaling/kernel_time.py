"""How long kernels run on a GPU, from the shapes of what they compute.

A matrix product takes its FLOPs at a share of the GPU's peak and, after that, its operands' bytes at a share of the memory's
bandwidth: this makes narrow products slow, as they are. Both shares are fitted to products measured on an H200
(benchmarks/README.md, "Products alone"); a test fits them again. Other kinds are taken to reach the same shares.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from internvl_megatron.errors import ConfigError
from internvl_megatron.scaling.gpus import GpuKind

PRODUCT_SHARE = 0.83
"""Of the bf16 peak. With `PRODUCT_TRAFFIC` within 9 % of all seven measured products."""
PRODUCT_TRAFFIC = 1.35
"""Times the bytes a product must move at the full bandwidth."""
FP8_SHARE = 0.80
"""Of the FP8 peak, without the casts, whose bytes are counted; within 11 % of the three measured products that the host does not
hold up (the others take what launching takes, about 1.3 ms)."""
ATTENTION_SHARES = (0.60, 0.50)
"""Of the bf16 peak in causal attention, forward and backward. FlashAttention-3 (arXiv 2407.08608, fig. 5 and 6): 600 to 650 and
500 to 560 TFLOP/s on an H100 at 8K to 16K, heads of 128."""
TILE_ATTENTION_SHARE = {64: 0.25, 128: 0.40}
"""Of the bf16 peak inside a tile, by head size. 64: measured on an H200 (16 tiles of InternViT-300M forward and backward: 0.97 ms a
layer); 128: assumed."""
TRAFFIC_SHARE = 0.75
"""Of the memory's bandwidth in elementwise kernels and norms: assumed, as `1 / PRODUCT_TRAFFIC`."""
UPDATE_BYTES = 65
"""Memory traffic of AdamW, gradient norm and clipping for each parameter: 98.6 ms for 7.25 billion measured on an H200."""

ATTENTION_BACKWARD = 2.5
"""FLOPs of attention's backward pass over those of its forward pass: scores are computed again."""


class Product(NamedTuple):
    """Rows of inputs times a weight matrix, on one rank."""

    tokens: float
    inputs: float
    outputs: float


class Passes(NamedTuple):
    """Seconds of a forward and a backward pass."""

    forward: float
    backward: float

    def plus(self, other: "Passes") -> "Passes":
        """One after the other."""
        return Passes(self.forward + other.forward, self.backward + other.backward)

    def times(self, factor: float) -> "Passes":
        """So many of them."""
        return Passes(self.forward * factor, self.backward * factor)


@dataclass(frozen=True)
class Kernels:
    """Kernels on one kind of GPU."""

    gpu: GpuKind
    precision: Literal["bf16", "fp8"] = "bf16"
    """Of matrix products of linear layers."""
    factor: float = 1.0
    """On all durations: what a real step takes over what its kernels take alone (clocks, launches, what is not counted). Calibrated."""

    def __post_init__(self) -> None:
        """Raise ConfigError if the GPU cannot."""
        if self.precision == "fp8" and self.gpu.fp8_flops is None:
            raise ConfigError(f"{self.gpu.name} has no FP8; leave it out, or take another kind")

    def product(self, shape: Product, trains_weights: bool = True, in_fp8: bool = True) -> Passes:
        """A linear layer.

        Args:
            shape: on this rank.
            trains_weights: also compute the weights' gradient, added to an fp32 buffer.
            in_fp8: False for layers that stay in bf16 whatever the run's precision.
        """
        tokens, inputs, outputs = shape
        x, y, weights = tokens * inputs, tokens * outputs, inputs * outputs
        fp8 = in_fp8 and self.precision == "fp8"
        flops = 2 * tokens * inputs * outputs
        size = 1 if fp8 else 2
        moved = size * (x + weights) + 2 * y
        moved_back = size * (y + weights) + 2 * x
        if trains_weights:
            moved_back += size * (x + y) + 8 * weights
        if fp8:  # read bf16, write FP8 as is and transposed; of weights that is done once a step
            moved += 4 * x
            moved_back += 4 * y
        forward = self._products(flops, fp8) + self._traffic(moved, PRODUCT_TRAFFIC)
        backward = self._products(flops * (2 if trains_weights else 1), fp8)
        return Passes(forward, backward + self._traffic(moved_back, PRODUCT_TRAFFIC))

    def causal_attention(self, pairs: float, width: float) -> Passes:
        """Of samples whose squared lengths add up to `pairs`; `width` is that of the rank's heads together."""
        flops = 2 * pairs * width  # the half of all pairs
        forward, backward = ATTENTION_SHARES
        peak = self.gpu.bf16_flops
        return Passes(flops / (forward * peak), ATTENTION_BACKWARD * flops / (backward * peak)).times(self.factor)

    def tile_attention(self, pairs: float, width: float, head_size: int) -> Passes:
        """Every token of a tile sees every other."""
        flops = 4 * pairs * width
        share = TILE_ATTENTION_SHARE[64 if head_size < 128 else 128]
        once = self.factor * flops / (share * self.gpu.bf16_flops)
        return Passes(once, ATTENTION_BACKWARD * once)

    def elementwise(self, forward_bytes: float, backward_bytes: float) -> Passes:
        """Kernels that do nothing but read and write."""
        return Passes(
            self._traffic(forward_bytes, 1 / TRAFFIC_SHARE), self._traffic(backward_bytes, 1 / TRAFFIC_SHARE)
        )

    def update(self, parameters: float) -> float:
        """Seconds of the optimizer for the parameters whose state this rank has."""
        factor = 1.0 if self.gpu.factors is None else self.gpu.factors.update
        return factor * UPDATE_BYTES * parameters / self.gpu.memory_bandwidth

    def _products(self, flops: float, fp8: bool) -> float:
        if fp8:
            assert self.gpu.fp8_flops is not None, f"{self.gpu.name} has no FP8"
            return self.factor * flops / (FP8_SHARE * self.gpu.fp8_flops)
        return self.factor * flops / (PRODUCT_SHARE * self.gpu.bf16_flops)

    def _traffic(self, num_bytes: float, times: float) -> float:
        return self.factor * times * num_bytes / self.gpu.memory_bandwidth
