"""Which layouts can go on from optimizer state that was saved in the fast format.

In it every rank writes its part of Megatron Core's flat buffers. What is in which buffer, and where, follows from the settings
below; over how many ranks a buffer is divided does not matter, so data and context parallelism may change. (Beyond 40 data-parallel
ranks Megatron Core's buckets grow with their number where communication overlaps; it compares them when it loads.)
"""

from internvl_megatron.config.schema import RunConfig
from internvl_megatron.parallel.groups import Groups


def optimizer_layout(config: RunConfig, groups: Groups) -> str:
    """Everything that must be the same, for people to read and for programs to compare."""
    layout, parallel = groups.layout, config.parallel
    facts = [
        f"TP{layout.tensor_size}",
        f"PP{layout.pipeline_size}",
        f"VPP{layout.virtual_size}",
        "even stages" if parallel.stage_layers is None else f"stages of {'+'.join(map(str, parallel.stage_layers))}",
        f"vision {parallel.vision_sharding} {parallel.vision_placement} TP{groups.vision_layout.tensor_size}",
    ]
    overlap = [name for name in ("overlap_gradients", "overlap_parameters") if getattr(parallel, name)]
    return ", ".join(facts + overlap)
