"""Configurations for tests: layouts, and what is trained under them."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from internvl_megatron.config.schema import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PartConfig,
    RunConfig,
)
from internvl_megatron.data.step_rows import ImageKey
from internvl_megatron.parallel.layout import Layout, VisionLayout
from tests.support.models import small_model
from tests.support.pair_rows import random_pair_step
from tests.support.rows import RowKind, StepData, random_step, without_targets


@dataclass(frozen=True)
class Ranks:
    """A layout on a number of ranks."""

    num_ranks: int
    tensor_size: int = 1
    pipeline_size: int = 1
    sequence_parallel: bool = False
    context_size: int = 1
    context_ring_size: int = 1
    virtual_size: int = 1
    stage_layers: tuple[int, ...] | None = None
    vision_placement: Literal["all_ranks", "first_stage", "colocated"] = "all_ranks"
    vision_tensor_size: int = 1
    vision_exchange_replicas: int | None = None
    """None = tiles travel between all replicas."""

    @property
    def layout(self) -> Layout:
        data_size = self.num_ranks // (self.tensor_size * self.pipeline_size * self.context_size)
        return Layout(
            self.tensor_size,
            self.pipeline_size,
            data_size,
            self.context_size,
            self.virtual_size,
            self.context_ring_size,
        )

    @property
    def vision_layout(self) -> VisionLayout:
        layout, placement = self.layout, self.vision_placement
        unit = self.tensor_size if placement == "colocated" else self.vision_tensor_size
        replicas = self.vision_exchange_replicas or (layout.data_size if placement == "all_ranks" else 1)
        return VisionLayout(layout, unit, replicas, first_stage_only=placement == "first_stage")

    def config(self, **changes: Any) -> ParallelConfig:
        """This layout as a configuration; two tiles at a time through the vision encoder, so that there are chunks."""
        sizes = {name: value for name, value in vars(self).items() if name != "num_ranks"}
        return ParallelConfig(**{"vision_chunk_tiles": 2, **sizes, **changes})


LAYOUTS = {
    "1": Ranks(1),
    "TP2": Ranks(2, tensor_size=2),
    "TP2+SP": Ranks(2, tensor_size=2, sequence_parallel=True),
    "PP2": Ranks(2, pipeline_size=2),
    "DP2": Ranks(2),
    "TP2xPP2": Ranks(4, tensor_size=2, pipeline_size=2),
    "TP2+SPxPP2": Ranks(4, tensor_size=2, pipeline_size=2, sequence_parallel=True),
    "TP2xDP2": Ranks(4, tensor_size=2),
    "PP2xDP2": Ranks(4, pipeline_size=2),
    "CP2": Ranks(2, context_size=2),
    "CP2 ring": Ranks(2, context_size=2, context_ring_size=2),
    "TP2+SPxCP2 ring": Ranks(4, tensor_size=2, context_size=2, sequence_parallel=True, context_ring_size=2),
    "CP4 ring 2": Ranks(4, context_size=4, context_ring_size=2),
    "CP2xPP2 ring": Ranks(4, context_size=2, pipeline_size=2, context_ring_size=2),
    "CP4": Ranks(4, context_size=4),
    "TP2xCP2": Ranks(4, tensor_size=2, context_size=2),
    "TP2+SPxCP2": Ranks(4, tensor_size=2, context_size=2, sequence_parallel=True),
    "CP2xPP2": Ranks(4, context_size=2, pipeline_size=2),
    "CP2xDP2": Ranks(4, context_size=2),
    "PP2xVPP2": Ranks(2, pipeline_size=2, virtual_size=2),
    "TP2+SPxPP2xVPP2": Ranks(4, tensor_size=2, pipeline_size=2, virtual_size=2, sequence_parallel=True),
    "PP2xVPP2xDP2": Ranks(4, pipeline_size=2, virtual_size=2),
    "PP2 uneven": Ranks(2, pipeline_size=2, stage_layers=(3, 1)),
    "PP4": Ranks(4, pipeline_size=4),
    "PP2xDP2 apart": Ranks(4, pipeline_size=2, vision_exchange_replicas=1),
    "TP2xPP2 first stage": Ranks(4, tensor_size=2, pipeline_size=2, vision_placement="first_stage"),
    "TP2+SPxDP2 first stage": Ranks(4, tensor_size=2, sequence_parallel=True, vision_placement="first_stage"),
    "PP2xVPP2xDP2 first stage": Ranks(4, pipeline_size=2, virtual_size=2, vision_placement="first_stage"),
    "CP2xPP2 first stage": Ranks(4, context_size=2, pipeline_size=2, vision_placement="first_stage"),
}

SGD = OptimizerConfig(
    name="sgd", learning_rate=0.1, weight_decay=0.0, warmup_ratio=0.0, schedule="constant", clip_grad_norm=1.0
)
# A large eps: where a gradient is rounding noise, Adam would otherwise turn it into whole steps.
ADAMW = OptimizerConfig(
    name="adamw",
    learning_rate=0.01,
    min_learning_rate=0.001,
    warmup_ratio=0.4,
    weight_decay=0.1,
    beta2=0.95,
    eps=1e-3,
    clip_grad_norm=1.0,
    vision=PartConfig(learning_rate_scale=0.5),
    projector=PartConfig(learning_rate_scale=0.5),
)


def run_config(model: ModelConfig, **changes: Any) -> RunConfig:
    """A configuration for tests: fp32 on the CPU, SGD, four rows of 64 tokens a step, five steps."""
    base = RunConfig(
        name="test",
        model=model,
        data=DataConfig(tokens_per_row=64, tiles_per_row=16),
        optimizer=SGD,
        dtype="fp32",
        device="cpu",
        num_steps=5,
        rows_per_step=4,
    )
    return replace(base, **changes)


@dataclass(frozen=True)
class Scenario:
    """Something to train, under any layout."""

    family: str = "300m"
    rows: RowKind = "mixed"
    weight_exponent: float = 0.5
    has_targets: bool = True
    broken: frozenset[ImageKey] = frozenset()
    """Images, by (row over all replicas, image), that cannot be decoded in any step."""
    overflow_in: str | None = None
    """Parameter whose gradient becomes infinite on the last rank that holds it, in step 0 only."""
    drop_path_rate: float = 0.0
    changes: dict[str, Any] = field(default_factory=dict)
    """Changes to the run configuration."""
    parallel_changes: dict[str, Any] = field(default_factory=dict)
    seed: int = 5
    keeps_gradients: bool = False
    """Gradients of every step are compared, not of the first alone; SGD only."""

    def config(self, ranks: Ranks) -> RunConfig:
        model = small_model(self.family)
        model = replace(model, vision=replace(model.vision, drop_path_rate=self.drop_path_rate))
        return run_config(model, parallel=ranks.config(**self.parallel_changes), **self.changes)

    def data(self, config: RunConfig, step: int) -> StepData:
        """Rows of a step over all replicas."""
        if config.loss.kind == "mpo":
            tokens, multiple = config.data.tokens_per_row, config.data.sample_multiple_tokens
            return random_pair_step(config.model, config.rows_per_step, self.seed + step, tokens, multiple)
        data = random_step(
            config.model,
            config.rows_per_step,
            self.seed + step,
            config.data.tokens_per_row,
            self.rows,
            self.weight_exponent,
            config.data.sample_multiple_tokens,
        )
        return data if self.has_targets else without_targets(data)
