"""Layouts that other trainers were published with, to compare planned ones with: as this trainer would run them.

Those of InternVL trainers have the encoder in the first stage. Those of Llama are for text: the encoder is spread as in the planned layout.
What they compute again is not known: the least that fits is taken.
"""

from dataclasses import dataclass
from typing import Any

from internvl_megatron.config.overrides import with_values
from internvl_megatron.config.plan import plan
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.errors import ConfigError
from internvl_megatron.scaling.gpus import GpuKind
from internvl_megatron.scaling.memory import USED_SHARE, first_stage_bytes
from internvl_megatron.scaling.planner import Choice, judge
from internvl_megatron.scaling.predicted_step import Workload

FIRST_STAGE: dict[str, Any] = {
    "parallel.vision_placement": "first_stage",
    "parallel.vision_sharding": "replicated",
    "parallel.vision_shard_ranks": None,
    "parallel.vision_window_rows": None,
    "parallel.vision_recompute": "layer",
    "parallel.sequence_parallel": True,
}


@dataclass(frozen=True)
class HandLayout:
    """A published layout."""

    name: str
    sizes: tuple[str, ...]
    """Of InternVL3, whose language model is nearest to the one it was published for."""
    settings: dict[str, Any]
    source: str


def _layout(tensor: int, pipeline: int, context: int = 1, virtual: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "parallel.tensor_size": tensor,
        "parallel.pipeline_size": pipeline,
        "parallel.context_size": context,
        "parallel.virtual_size": virtual,
        "parallel.stage_layers": None,
        "parallel.sequence_parallel": tensor > 1,
        **more,
    }


HAND_LAYOUTS = (
    HandLayout(
        "LoongForge, InternVL2.5-78B",
        ("78B",),
        _layout(8, 4) | FIRST_STAGE | {"parallel.stage_layers": (1, 26, 26, 27)},
        "sft_internvl2_5_78b.sh",
    ),
    HandLayout(
        "MindSpeed-MM, InternVL3-78B",
        ("78B",),
        _layout(8, 2) | FIRST_STAGE | {"parallel.stage_layers": (40, 40)},
        "llm_pp_layers 40,40",
    ),
    HandLayout(
        "NVLM, InternViT-6B and Qwen2-72B",
        ("78B",),
        _layout(8, 1) | FIRST_STAGE,
        "Megatron-LM examples/multimodal/nvlm",
    ),
    HandLayout(
        "NVIDIA, Llama 3.1 70B in bf16", ("78B",), _layout(4, 4, context=2, virtual=5), "dgxc-benchmarking v25.02"
    ),
    HandLayout(
        "NVIDIA, Llama 3 70B in FP8", ("78B",), _layout(4, 8, virtual=5), "Megatron-Bridge performance summary"
    ),
    HandLayout("NVIDIA, Llama 3.1 8B", ("8B", "9B"), _layout(1, 1, context=2), "dgxc-benchmarking v25.02"),
    HandLayout("LoongForge, Qwen2.5-VL-7B", ("8B", "9B"), _layout(4, 2) | FIRST_STAGE, "heterogeneous_parallel.md"),
    HandLayout(
        "Megatron-Bridge, Qwen3.5-VL 27B", ("14B", "38B"), _layout(4, 2) | FIRST_STAGE, "MIMO tutorial, baseline"
    ),
)
"""Of the survey of peers; for 1B and 2B none was found that is not data parallelism alone."""


@dataclass(frozen=True)
class ByHand:
    """How a layout made by hand does beside the planned one."""

    name: str
    outcome: str
    """In words."""
    over_best: float | None
    """Its step's time over that of the planned layout; None where it does not go or does not fit."""


def judged_by_hand(
    size: str, config: RunConfig, num_gpus: int, workload: Workload, gpu: GpuKind, best: Choice
) -> list[ByHand]:
    """The recipe's own layout, data parallelism alone, and those that were published for such a size.

    Args:
        size: of InternVL3.
        config: what is trained, with the recipe's own layout.
        num_gpus: all are used.
        workload: rows.
        gpu: kind of all GPUs.
        best: what the planner found.
    """
    own = HandLayout("the recipe's own layout", (), {}, "")
    alone = HandLayout("data parallelism alone", (), _layout(1, 1), "")
    found = []
    for layout in (own, alone, *(one for one in HAND_LAYOUTS if size in one.sizes)):
        base = config if layout is own or "parallel.vision_placement" in layout.settings else best.config
        outcome, seconds = _judged(with_values(base, layout.settings), num_gpus, workload, gpu)
        over_best = None if seconds is None else seconds / best.time.total
        if over_best is not None:
            outcome += f", {over_best:.2f} times the planned step"
        found.append(ByHand(layout.name, outcome, over_best))
    return found


def _judged(config: RunConfig, num_gpus: int, workload: Workload, gpu: GpuKind) -> tuple[str, float | None]:
    """In words; and seconds of a step, if it goes and fits."""
    smallest, limit = "", USED_SHARE * gpu.memory_bytes
    for again in ("none", "full"):
        way = with_values(config, {"parallel.language_recompute": again})
        try:
            memory, time = judge(way, num_gpus, workload, gpu)
        except ConfigError as error:
            return f"does not go: {str(error).splitlines()[0].removeprefix('config: ')}", None
        made, num_bytes = plan(way, num_gpus), memory.total
        if made.vision_layout.first_stage_only:
            num_bytes = first_stage_bytes(way, made)
        if num_bytes <= limit:
            recomputed = ", layers computed again" if again == "full" else ""
            return f"{made.layout}{recomputed}: {time.total:.2f} s", time.total
        smallest = f"{made.layout} does not fit: {num_bytes / 1e9:.0f} GB"
    return smallest, None
