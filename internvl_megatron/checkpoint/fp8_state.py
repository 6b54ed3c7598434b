"""Histories of delayed scaling in a checkpoint: one small tensor for every linear layer, whole, under a layout-free name.

All ranks of a pipeline stage hold the same, so any layout can go on from them. A file may have none, or fewer layers (it was
written without FP8, or with other layers left out), and more or fewer steps: what is missing begins empty.
"""

from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader

from internvl_megatron.checkpoint.metadata_guard import check_metadata
from internvl_megatron.model.fp8_history import AmaxHistories
from internvl_megatron.parallel.groups import Groups

PREFIX = "fp8.amax_history."


def histories_state(histories: AmaxHistories | None, groups: Groups) -> dict[str, Any]:
    """What this rank saves of its layers' histories, by layer."""
    if histories is None:
        return {}
    return {name: _sharded(name, past, groups) for name, past in zip(histories.names, histories.past, strict=True)}


def histories_to_load(folder: Path, histories: AmaxHistories | None, groups: Groups) -> dict[str, Any]:
    """Room for the histories that a checkpoint has of this rank's layers, in the file's number of steps.

    Raises:
        CheckpointError: the table of contents is missing or damaged.
    """
    if histories is None:
        return {}
    check_metadata(folder)
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    sizes = {name: getattr(saved.get(PREFIX + name), "size", None) for name in histories.names}
    return {
        name: _sharded(name, histories.past.new_zeros(size), groups)
        for name, size in sizes.items()
        if size is not None
    }


@torch.no_grad()
def apply_histories(histories: AmaxHistories | None, loaded: dict[str, Any]) -> None:
    """Take over loaded histories, their newest steps as far as there is room, and the scales that follow from them."""
    if histories is None:
        return
    for name, past in zip(histories.names, histories.past, strict=True):
        if name in loaded:
            num_steps = min(len(past), len(loaded[name]))
            past[:num_steps] = loaded[name][:num_steps]
    histories.choose_scales()


def _sharded(name: str, past: Tensor, groups: Groups) -> ShardedTensor:
    """A history [steps, kinds], of which every rank of the stage has a copy."""
    return ShardedTensor.from_rank_offsets(PREFIX + name, past, replica_id=groups.language.tp_dp_cp.rank())
