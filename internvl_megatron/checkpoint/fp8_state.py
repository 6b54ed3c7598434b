"""Histories of delayed scaling in a checkpoint: one small tensor for every linear layer, whole, under a layout-free name.

All ranks of a pipeline stage hold the same, so any layout can go on from them. A file may have none, or fewer layers (it was
written without FP8, or with other layers left out), and more or fewer steps: what is missing begins empty.
"""

from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint.filesystem import FileSystemReader

from internvl_megatron.checkpoint.metadata_guard import check_metadata
from internvl_megatron.model.fp8_history import AmaxHistories
from internvl_megatron.parallel.groups import Groups

PREFIX = "fp8.amax_history."


def histories_state(histories: AmaxHistories | None, groups: Groups) -> dict[str, Any]:
    """What this rank saves of its layers' histories, by layer."""
    if histories is None:
        return {}
    copy = groups.language.tp_dp_cp.rank()
    return {
        name: ShardedTensor.from_rank_offsets(PREFIX + name, past, replica_id=copy, allow_shape_mismatch=True)
        for name, past in zip(histories.names, histories.past, strict=True)
    }


def histories_to_load(folder: Path, histories: AmaxHistories | None, groups: Groups) -> dict[str, Any]:
    """The same, of those layers alone that a checkpoint has a history of.

    Raises:
        CheckpointError: the table of contents is missing or damaged.
    """
    if histories is None:
        return {}
    check_metadata(folder)
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: value for name, value in histories_state(histories, groups).items() if PREFIX + name in saved}


@torch.no_grad()
def apply_histories(histories: AmaxHistories | None, loaded: dict[str, Any]) -> None:
    """Take over loaded histories, and the scales that follow from them."""
    if histories is None:
        return
    for name, past in zip(histories.names, histories.past, strict=True):
        if name in loaded:
            past.copy_(loaded[name])
    histories.choose_scales()
