"""One replica's rows of a step, put on the device row by row as the schedule asks for them."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from internvl_megatron.config.schema import LanguageConfig
from internvl_megatron.data.rows import Row
from internvl_megatron.device import Device
from internvl_megatron.model.attention import PackedRow
from internvl_megatron.model.rotary import rotary_tables
from internvl_megatron.parallel.layout import Layout

TARGET_MULTIPLE = 16
"""Positions that the output layer computes come in so many."""


@dataclass(frozen=True)
class DeviceRow:
    """A row on the device. S tokens, n of them with a target."""

    token_ids: Tensor
    """int64 [1, S], this rank's part of the row."""
    packed: PackedRow
    """Segments of the whole row and rotary tables of this part, for attention."""
    target_positions: Tensor
    """int64 [n], places in this part whose next token is predicted; the output layer runs on these alone."""
    targets: Tensor
    """int64 [n]."""
    weights: Tensor
    """fp32 [n]."""
    target_places: np.ndarray
    """int64 [n], on the host: `target_positions` as places in the whole row."""


def device_row(row: Row, language: LanguageConfig, device: Device, layout: Layout, rank: int) -> DeviceRow:
    """Copy a rank's part of a row to the device; lengths stay on the host as well, so that nothing has to be read back.

    Args:
        row: the whole row.
        language: sizes.
        device: where to.
        layout: says which part of the row this is.
        rank: this rank.
    """
    part = layout.row_part(rank, row.segment_lengths)
    weights = row.weights[part]
    ends = np.concatenate([[0], np.cumsum(row.segment_lengths)]).astype(np.int32)
    on_device = device.put(ends)
    packed = PackedRow(
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        segment_ends=tuple(ends.tolist()),
        num_padding_tokens=len(row.token_ids) - row.num_tokens,
        rotary=rotary_tables(device.put(row.positions[part]), language.head_size, language.rope_theta),
        ring_order=device.put(layout.ring_order(row.segment_lengths)) if layout.ring_size > 1 else None,
    )
    supervised = np.flatnonzero(weights)
    # Filled up with a position of weight 0: kernels do not take empty matrices, and are slow with odd ones.
    missing = -len(supervised) % TARGET_MULTIPLE if len(supervised) else TARGET_MULTIPLE
    unsupervised = np.flatnonzero(weights == 0)[:1]
    supervised = np.append(supervised, np.repeat(unsupervised, missing))
    return DeviceRow(
        token_ids=device.put(row.token_ids[part].astype(np.int64))[None],
        packed=packed,
        target_positions=device.put(supervised),
        targets=device.put(row.targets[part][supervised].astype(np.int64)),
        weights=device.put(weights[supervised].astype(np.float32)),
        target_places=np.arange(len(row.token_ids))[part][supervised],
    )
