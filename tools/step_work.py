"""The work of a training step in FLOPs and its speed, by every convention in use, so that figures can be compared.

Four figures differ in what they count as needed. Attention: `causal` counts the half of the pairs that a causal mask leaves,
`full` all of them, as Megatron-LM and many papers do. Output layer: `supervised` counts the positions that carry loss, the
only ones it is computed for, `all` every position. The vision encoder and the projector are counted in all of them; what is
computed a second time to save memory, and padding, in none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from internvl_megatron.config.schema import ModelConfig
from internvl_megatron.data.rows import Row
from internvl_megatron.scaling.counts import (
    BACKWARD_AND_FORWARD,
    output_layer_flops,
    parameter_counts,
    step_flops,
)

Attention = Literal["causal", "full"]
Head = Literal["supervised", "all"]


@dataclass(frozen=True)
class StepWork:
    """What the rows of a step hold; padding is not counted."""

    num_samples: int
    num_images: int
    num_tiles: int
    num_tokens: int
    num_supervised_tokens: int
    attention_pairs: int
    """Sum over all samples of their length squared."""

    @classmethod
    def of_rows(cls, rows: Sequence[Row]) -> "StepWork":
        """Of packed rows."""
        lengths = np.concatenate([np.diff(row.sample_bounds) for row in rows])
        return cls(
            num_samples=sum(row.num_samples for row in rows),
            num_images=sum(len(row.images) for row in rows),
            num_tiles=sum(row.num_tiles for row in rows),
            num_tokens=int(lengths.sum()),
            num_supervised_tokens=sum(int((row.weights > 0).sum()) for row in rows),
            attention_pairs=int((lengths**2).sum()),
        )

    def flops(self, model: ModelConfig, attention: Attention = "causal", head: Head = "supervised") -> int:
        """FLOPs of forward and backward of a model that is trained as a whole; by default what the trainer's metrics count."""
        pairs = 2 * self.attention_pairs if attention == "full" else self.attention_pairs  # counted are half of them
        predictions = self.num_supervised_tokens if head == "supervised" else self.num_tokens
        return step_flops(model, self.num_tokens, self.num_tiles, pairs, predictions).total


def speed(work: StepWork, model: ModelConfig, seconds: float, peak_flops: float) -> dict[str, Any]:
    """Figures of a step that took so long on one device.

    Args:
        work: of the step.
        model: as it was run: a model cut to k layers counts k layers.
        seconds: of the step.
        peak_flops: FLOP/s that count as 1 in the MFU: the device's dense bf16 peak, in FP8 too.
    """
    conventions = {
        f"{attention}_attention_{head}_head": work.flops(model, attention, head) / seconds
        for attention in ("causal", "full")
        for head in ("supervised", "all")
    }
    return {
        "step_seconds": seconds,
        "samples_per_second": work.num_samples / seconds,
        "images_per_second": work.num_images / seconds,
        "tiles_per_second": work.num_tiles / seconds,
        "tokens_per_second": work.num_tokens / seconds,
        "model_tflops_per_second": {name: value / 1e12 for name, value in conventions.items()},
        "mfu": {name: value / peak_flops for name, value in conventions.items()},
    }


def shares(work: StepWork, model: ModelConfig) -> Mapping[str, Any]:
    """What a step consists of: sizes, and parts of its FLOPs (causal attention, head on supervised positions) and parameters."""
    flops, parameters = work.flops(model), parameter_counts(model)
    by_part = step_flops(model, work.num_tokens, work.num_tiles, work.attention_pairs, work.num_supervised_tokens)
    head = BACKWARD_AND_FORWARD * output_layer_flops(model.language, work.num_supervised_tokens)
    tables = 2 * model.language.vocab_size * model.language.hidden_size
    return {
        **asdict(work),
        "image_token_share": work.num_tiles * model.vision.tokens_per_tile / work.num_tokens,
        "vision_flops_share": (by_part.vision + by_part.projector) / flops,
        "head_flops_share": head / flops,
        "parameters": parameters.total,
        "head_and_embedding_parameter_share": tables / parameters.total,
    }
