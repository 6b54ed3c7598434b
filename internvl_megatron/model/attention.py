"""Core attention: packed causal attention for the language model, attention inside a tile for the vision encoder.

Megatron Core's own `DotProductAttention` materialises the scores of the whole row, and its rotary code restarts or
guesses positions of packed rows. Both modules here sit in its `core_attention` slot. The packed one applies the rotary
embedding itself, so Megatron Core never sees positions.

Shapes: S tokens of a row, s = S / context size tokens of this rank's part, B batch (1 for packed rows), T tiles, N tokens of
a tile in the encoder, H local heads, G local key/value heads, D head size.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import all_to_all, gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from internvl_megatron.device import AttentionKernel, TileKernel, ring_stream
from internvl_megatron.model.kv_cache import CachedTokens
from internvl_megatron.model.rotary import RotaryTables, rotate

CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@dataclass
class PackedRow(PackedSeqParams):
    """What attention must know of one packed row; travels through Megatron Core in the packed-sequence slot.

    `qkv_format` stays None: with 'thd' Megatron Core would apply its own rotary embedding per segment.
    """

    segment_ends: tuple[int, ...] = ()
    """Host copy of cu_seqlens: 0, end of the first segment, .. S. Attention never crosses a boundary."""
    num_padding_tokens: int = 0
    """Length of the last segment when it is padding; nothing needs its attention output."""
    rotary: RotaryTables | None = None
    ring_order: Tensor | None = None
    """int64 [S]: where each token of the row is in the parts of the ring's ranks laid end to end (`Layout.ring_order`)."""
    cached: CachedTokens | None = None
    """Where keys and values of the row's tokens are kept when its segments are to be continued, or continue what is kept."""

    @property
    def max_segment_tokens(self) -> int:
        """Length of the longest segment."""
        return max(end - start for start, end in pairwise(self.segment_ends))

    @property
    def num_attended_segments(self) -> int:
        """Segments whose attention is computed: all but padding, which nothing needs. A row of padding alone attends all the
        same: every parameter has a gradient in every backward pass, which overlapped reductions wait for."""
        return max(1, len(self.segment_ends) - 1 - (self.num_padding_tokens > 0))


class CoreAttention(torch.nn.Module):
    """What Megatron Core's `core_attention` slot passes to a constructor; the scale is always head_size ** -0.5."""

    mask_type: AttnMaskType

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        del config, layer_number, attention_type, cp_comm_type, pg_collection
        assert attn_mask_type == self.mask_type, f"{type(self).__name__} cannot do {attn_mask_type}"
        assert softmax_scale is None, f"{type(self).__name__} has no scale of its own, not {softmax_scale}"


class PackedAttention(CoreAttention):
    """Causal attention inside each segment of a packed row, rotary embedding included.

    Under context parallelism a rank has a part of the row for all heads. An all-to-all trades that for all of the row and a
    part of the heads, attention runs as without, and another one trades back (DeepSpeed-Ulysses, arXiv 2309.14509). Positions
    are applied before, each rank its own. Key/value heads that are fewer than ranks are repeated; autograd sums their
    gradients.

    With a ring of several ranks the all-to-all gives what one of them has of the row, two chunks of every sample
    (`Layout.context_place`). Keys and values are gathered from the ring; Transformer Engine passes them around it instead,
    while it computes.
    """

    mask_type = AttnMaskType.causal

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *args: Any,
        kernel: AttentionKernel,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, layer_number, *args, **kwargs)
        self._layer = layer_number
        assert pg_collection is not None, "the layer passes its process groups on"
        self._fuses_rotary = config.apply_rope_fusion
        self.kernel: AttentionKernel = kernel
        # Of the context-parallel ranks, those that share heads, and those over which every sample is divided.
        self.heads_group, self.ring_group = pg_collection.hcp
        self.fused: Any = (
            transformer_engine_attention(config, pg_collection) if kernel == "transformer_engine" else None
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, 1, H, D]; key and value: [s, 1, G, D] with H a multiple of G.
            packed_seq_params: the `PackedRow` these tokens are a part of.

        Returns:
            [s, 1, H * D]; rows of padding tokens hold nothing meaningful.
        """
        row = packed_seq_params
        assert isinstance(row, PackedRow), f"packed attention needs a PackedRow, got {type(row).__name__}"
        assert attention_mask is None, "packed attention takes its mask from the segment boundaries"
        assert query.shape[1] == 1, f"a packed row has batch size 1, not {query.shape[1]}"
        if row.rotary is not None:
            query, key = (rotate(tensor, row.rotary, self._fuses_rotary) for tensor in (query, key))
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if row.cached is not None:
            row.cached.store(self._layer, key, value)
            if not row.cached.are_prompts:
                return row.cached.attend(self._layer, query).reshape(len(query), 1, -1)
        if self.heads_group.size() > 1:
            query, key, value = trade_tokens_for_heads(query, key, value, self.heads_group)
        expected = row.segment_ends[-1] // self.ring_group.size()
        assert len(query) == expected, f"{len(query)} tokens of a row of {row.segment_ends[-1]}, not {expected}"
        if self.fused is not None and query.dtype != torch.float32:
            attended = _transformer_engine(self.fused, query, key, value, row)
        elif self.ring_group.size() > 1:
            attended = ring_attention(query, key, value, row, self.ring_group)
        else:
            attend = {"flash_attn": _flash_attention, "torch_varlen": _torch_varlen}.get(self.kernel, _per_segment)
            attended = attend(query, key, value, row)
        if self.heads_group.size() > 1:
            attended = trade_heads_for_tokens(attended, self.heads_group)
        return attended.reshape(len(attended), 1, -1)


def trade_tokens_for_heads(
    query: Tensor, key: Tensor, value: Tensor, group: torch.distributed.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """All heads of a part of the row to a part of the heads for all of the row, in one message.

    Args:
        query: [s, H, D]; key and value [s, G, D].
        group: c ranks in the order of their parts; H a multiple of c, G a multiple or a divisor of it.

    Returns:
        [S, H / c, D], and key and value [S, max(G, c) / c, D].
    """
    size = group.size()
    if key.shape[1] < size:
        repeats = size // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    parts = [tensor.unflatten(1, (size, -1)) for tensor in (query, key, value)]  # [s, c, heads / c, D]
    sent = torch.cat(parts, dim=2).transpose(0, 1).contiguous()
    received = all_to_all(group, sent).flatten(0, 1)
    query, key, value = received.split([part.shape[2] for part in parts], dim=1)
    return query, key, value


def trade_heads_for_tokens(attended: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """The way back: [S, H / c, D] to [s, H, D]."""
    received = all_to_all(group, attended.unflatten(0, (group.size(), -1)).contiguous())  # [c, s, H / c, D]
    return received.transpose(0, 1).flatten(1, 2)


def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, row: PackedRow, group: torch.distributed.ProcessGroup
) -> Tensor:
    """Attention of this rank's two chunks of every sample to all of the sample before them.

    The chunks are those of ring attention (arXiv 2310.01889, in the order that balances causal masks); keys and values, which
    grouped-query attention keeps small, are gathered at once (as in the Llama 3 report, arXiv 2407.21783, sec. 3.3.2).

    Args:
        query: [S / r, H, D]; key and value [S / r, G, D], chunk i and chunk 2r - 1 - i of every span on rank i.
        row: the whole row; every segment a multiple of 2r tokens.
        group: r ranks.

    Returns:
        [S / r, H, D].
    """
    size, rank = group.size(), group.rank()
    assert row.ring_order is not None, "the packed row does not say which rank of the ring has which tokens"
    # Backward sums the gradients of keys and values over the ring.
    keys, values = (
        gather_from_sequence_parallel_region(tensor, group=group)[row.ring_order] for tensor in (key, value)
    )
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        keys, values = keys.repeat_interleave(repeats, dim=1), values.repeat_interleave(repeats, dim=1)
    lengths = [end - start for start, end in pairwise(row.segment_ends)]
    of_queries = query.transpose(0, 1).split([length // size for length in lengths], dim=1)
    of_keys, of_values = (tensor.transpose(0, 1).split(lengths, dim=1) for tensor in (keys, values))
    outputs = []
    segments = zip(of_queries, of_keys, of_values, strict=True)
    for q, k, v in islice(segments, row.num_attended_segments):
        for chunk, index in zip(q.chunk(2, dim=1), (rank, 2 * size - 1 - rank), strict=True):
            seen = (index + 1) * chunk.shape[1]
            mask = causal_lower_right(chunk.shape[1], seen)
            outputs.append(F.scaled_dot_product_attention(chunk[None], k[None, :, :seen], v[None, :, :seen], mask)[0])
    if row.num_attended_segments < len(lengths):
        outputs.append(query.new_zeros(query.shape[1], row.num_padding_tokens // size, query.shape[2]))
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _per_segment(query: Tensor, key: Tensor, value: Tensor, row: PackedRow) -> Tensor:
    """One scaled-dot-product call per segment: runs anywhere, never builds an [S, S] mask."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    lengths = [end - start for start, end in pairwise(row.segment_ends)]
    # One split, not a slice per segment: the backward pass of a slice fills a whole row with zeros.
    heads_first = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    segments = zip(*(tensor.split(lengths, dim=2) for tensor in heads_first), strict=True)
    attended = islice(segments, row.num_attended_segments)
    outputs = [F.scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in attended]
    if row.num_attended_segments < len(lengths):
        outputs.append(query.new_zeros(1, query.shape[1], row.num_padding_tokens, query.shape[2]))
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)


def transformer_engine_attention(config: TransformerConfig, groups: ProcessGroupCollection) -> torch.nn.Module:
    """Transformer Engine's attention for the heads that this rank has after they were traded."""
    import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]

    heads_group, ring_group = groups.hcp
    tensor, sharing = groups.tp.size(), heads_group.size()
    kv_heads = max(config.num_query_groups or config.num_attention_heads, tensor) // tensor
    ring: dict[str, Any] = {}
    if ring_group.size() > 1:
        ring = {
            "cp_group": ring_group,
            "cp_global_ranks": torch.distributed.get_process_group_ranks(ring_group),
            "cp_stream": ring_stream(),
            "cp_comm_type": "p2p",
        }
    return te.DotProductAttention(
        num_attention_heads=config.num_attention_heads // tensor // sharing,
        kv_channels=config.kv_channels,
        num_gqa_groups=max(kv_heads, sharing) // sharing,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal",
        attention_type="self",
        **ring,
    )


def _transformer_engine(fused: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, row: PackedRow) -> Tensor:
    """Packed attention of all segments, the padding's too; each of a ring's ranks has its two chunks of every one."""
    ends, longest = row.cu_seqlens_q, row.max_segment_tokens
    attended = fused(
        query,
        key,
        value,
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        # Where segments begin in memory, which a ring asks for: there is no memory between them.
        cu_seqlens_q_padded=ends,
        cu_seqlens_kv_padded=ends,
        pad_between_seqs=False,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        attn_mask_type="padding_causal",
    )
    return attended.view_as(query)


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, row: PackedRow) -> Tensor:
    if query.dtype == torch.float32:  # flash kernels are half precision only; fp32 is for tests
        return _per_segment(query, key, value, row)
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    ends, longest = row.cu_seqlens_q, row.max_segment_tokens
    return flash_attn_varlen_func(query, key, value, ends, ends, longest, longest, causal=True)


def _torch_varlen(query: Tensor, key: Tensor, value: Tensor, row: PackedRow) -> Tensor:
    if query.dtype == torch.float32:
        return _per_segment(query, key, value, row)
    from torch.nn.attention.varlen import varlen_attn

    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    ends, longest = row.cu_seqlens_q, row.max_segment_tokens
    assert ends is not None, "the packed row carries no device copy of its segment ends"
    attended = varlen_attn(query, key, value, ends, ends, longest, longest, window_size=(-1, 0))
    assert isinstance(attended, Tensor), "torch returns more than the output only when asked to"
    return attended


class TileAttention(CoreAttention):
    """Bidirectional attention inside each tile; tiles are the batch and never see each other."""

    mask_type = AttnMaskType.no_mask

    def __init__(self, *args: Any, kernel: TileKernel = "sdpa", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prefers_cudnn = kernel == "cudnn"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend; query, key, value are [N, T, H, D], the result is [N, T, H * D]."""
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        # torch takes another kernel where cuDNN has none.
        with sdpa_kernel(CUDNN_FIRST, set_priority=True) if self._prefers_cudnn else nullcontext():
            attended = F.scaled_dot_product_attention(q, k, v)
        return attended.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
