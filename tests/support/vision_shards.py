"""Whole tensors of a vision side that is split over tensor-parallel ranks."""

import numpy as np

from internvl_megatron.config.schema import VisionConfig
from internvl_megatron.parallel.layout import VisionLayout
from tests.support.training import Tensors


def whole_vision(shards: list[Tensors], layout: VisionLayout, vision: VisionConfig) -> Tensors:
    """Tensors of the vision side from all ranks' shards; those who hold the same must have the same."""
    full: Tensors = {}
    for holders in layout.holders:
        for name in shards[0]:
            if name.startswith("vision."):
                tensor = join(name, [shards[rank][name] for rank in holders], vision)
                np.testing.assert_array_equal(full.setdefault(name, tensor), tensor, err_msg=f"{name} differs")
    return full


def join(name: str, parts: list[np.ndarray], vision: VisionConfig) -> np.ndarray:
    """A whole tensor from the shards of a unit, by its name alone; padding must be zero, copies equal to the last bit."""
    head, per_rank = vision.hidden_size // vision.num_heads, -(-vision.num_heads // len(parts))
    heads = [min(max(vision.num_heads - place * per_rank, 0), per_rank) for place in range(len(parts))]
    if name.endswith(("qkv.lora_a", "fc1.lora_a", "proj.lora_b", "fc2.lora_b")):  # the whole half of an adapter
        ends, axis = [], 0
    elif ".linear_qkv." in name:
        ends, axis = [3 * head * number for number in heads], 0
    elif name.endswith(("q_norm.weight", "k_norm.weight")):
        ends, axis = [head * number for number in heads], 0
    elif name.endswith(("linear_proj.weight", "linear_proj.lora_a")):
        ends, axis = [head * number for number in heads], 1
    elif ".linear_fc1." in name:
        ends, axis = [part.shape[0] for part in parts], 0
    elif name.endswith(("linear_fc2.weight", "linear_fc2.lora_a")):
        ends, axis = [part.shape[1] for part in parts], 1
    else:
        ends, axis = [], 0
    if not ends:
        for part in parts:
            np.testing.assert_array_equal(part, parts[0], err_msg=f"{name} differs between the ranks of a unit")
        return parts[0]
    cut = [np.split(part, [end], axis=axis) for part, end in zip(parts, ends, strict=True)]
    assert not any(padding.any() for _, padding in cut), f"{name}: padded heads are not zero"
    return np.concatenate([real for real, _ in cut], axis=axis)
