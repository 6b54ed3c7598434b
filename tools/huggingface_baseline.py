"""What a training step costs with transformers' InternVL on the rows ours trains on: the baseline of `benchmark gpu hf`.

Everything that transformers offers to be fast is on: bf16 weights and bf16 optimizer state (ours keeps both in fp32), fused AdamW,
flash or scaled-dot-product attention, the output layer on supervised positions only, inputs put together ahead of time.
Activations are computed again only where they do not fit. Two ways to lay out samples:

    packed    the rows as they are, without padding; samples are kept apart by flash attention for variable lengths, or by a mask
    padded    samples of about the same length side by side, padded to the longest, causal attention without a mask

Shapes: B samples side by side (1 packed row), S tokens, n supervised tokens, T tiles.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_megatron.config.schema import ModelConfig, RunConfig
from internvl_megatron.data.positions import UNITS_PER_POSITION
from internvl_megatron.data.rows import Row
from internvl_megatron.device import Device, open_device
from internvl_megatron.model.build import torch_dtype
from internvl_megatron.model.vision import normalize_pixels
from internvl_megatron.ranks import RankInfo
from tools.gpu_cases import Attention, Setting, image_token
from tools.gpu_training import device_facts, timed, use_own_cores
from tools.image_text_rows import RandomPixels

Tiles = dict[tuple[int, int], np.ndarray]
"""uint8 [t, 3, H, W] by row and image."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes, on the host until `to`."""

    token_ids: Tensor
    """int64 [B, S]."""
    positions: Tensor
    """fp32 [B, S]: V2PE's are fractions."""
    pixels: Tensor
    """uint8 [T, 3, H, W], in the order of their tokens."""
    supervised: Tensor
    """int64 [n], places in the B * S tokens laid end to end."""
    targets: Tensor
    """int64 [n]."""
    weights: Tensor
    """fp32 [n]."""
    segment_ends: Tensor | None
    """int32: 0, end of the first sample .. S of a packed row; None = one sample in each of the B."""
    longest_sample: int

    def to(self, device: Device) -> "MicroBatch":
        """On the device, without waiting for the copies."""
        moved: dict[str, Any] = {
            name: device.put(value) if isinstance(value, Tensor) else value for name, value in vars(self).items()
        }
        return MicroBatch(**moved)


def packed_batches(rows: Sequence[Row], tiles: Tiles) -> list[MicroBatch]:
    """A micro-batch for every row, its padding cut off."""
    return [_batch([_piece(row, number, tiles, 0, row.num_tokens)], row) for number, row in enumerate(rows)]


def padded_batches(rows: Sequence[Row], tiles: Tiles, tokens_per_batch: int) -> list[MicroBatch]:
    """Micro-batches of samples of about the same length, padding counted in the budget."""
    pieces = [
        _piece(row, number, tiles, *bounds)
        for number, row in enumerate(rows)
        for bounds in pairwise(row.sample_bounds.tolist())
    ]
    groups: list[list[_Piece]] = []
    for piece in sorted(pieces, key=lambda piece: len(piece.token_ids), reverse=True):
        if groups and (len(groups[-1]) + 1) * len(groups[-1][0].token_ids) <= tokens_per_batch:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return [_batch(group, None) for group in groups]


@dataclass(frozen=True)
class _Piece:
    """Some tokens of a row, s of them, and the tiles of their images."""

    token_ids: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    tiles: list[np.ndarray]


def _piece(row: Row, number: int, tiles: Tiles, start: int, end: int) -> _Piece:
    part = slice(start, end)
    images = np.flatnonzero((row.image_starts >= start) & (row.image_starts < end))
    return _Piece(
        token_ids=row.token_ids[part],
        positions=row.positions[part] / UNITS_PER_POSITION,
        targets=row.targets[part],
        weights=row.weights[part],
        tiles=[tiles[number, image] for image in images.tolist()],
    )


def _batch(pieces: Sequence[_Piece], row: Row | None) -> MicroBatch:
    length = max(len(piece.token_ids) for piece in pieces)

    def side_by_side(name: str, dtype: torch.dtype) -> Tensor:
        padded = np.zeros((len(pieces), length))
        for index, piece in enumerate(pieces):
            values = getattr(piece, name)
            padded[index, : len(values)] = values
        return torch.from_numpy(padded).to(dtype)

    weights = side_by_side("weights", torch.float32).flatten()
    supervised = weights.nonzero().flatten()
    every_tile = [tile for piece in pieces for tile in piece.tiles]
    bounds = None if row is None else row.sample_bounds
    return MicroBatch(
        token_ids=side_by_side("token_ids", torch.int64),
        positions=side_by_side("positions", torch.float32),
        pixels=torch.from_numpy(np.concatenate(every_tile)) if every_tile else torch.zeros(0, dtype=torch.uint8),
        supervised=supervised,
        targets=side_by_side("targets", torch.int64).flatten()[supervised],
        weights=weights[supervised],
        segment_ends=None if bounds is None else torch.from_numpy(bounds.astype(np.int32)),
        longest_sample=length if bounds is None else int(np.diff(bounds).max()),
    )


def transformers_config(model: ModelConfig, image_token_id: int) -> Any:
    """transformers' `InternVLConfig` of these sizes."""
    from transformers import InternVLConfig, InternVLVisionConfig, LlamaConfig, Qwen2Config

    vision, language = model.vision, model.language
    llama = {"head_dim": language.head_size, "attention_bias": language.qkv_bias}
    return InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=vision.hidden_size,
            num_hidden_layers=vision.num_layers,
            num_attention_heads=vision.num_heads,
            intermediate_size=vision.ffn_hidden_size,
            attention_bias=vision.qkv_bias,
            use_qk_norm=vision.qk_norm,
            norm_type=vision.norm,
            layer_norm_eps=vision.norm_eps,
            image_size=[vision.tile_pixels] * 2,
            patch_size=[vision.patch_pixels] * 2,
            layer_scale_init_value=vision.layer_scale_init,
            use_absolute_position_embeddings=True,
        ),
        text_config=(Qwen2Config if language.family == "qwen2" else LlamaConfig)(
            vocab_size=language.vocab_size,
            hidden_size=language.hidden_size,
            num_hidden_layers=language.num_layers,
            num_attention_heads=language.num_heads,
            num_key_value_heads=language.num_kv_heads,
            intermediate_size=language.ffn_hidden_size,
            rms_norm_eps=language.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": language.rope_theta},
            tie_word_embeddings=False,
            use_cache=False,
            **(llama if language.family == "internlm" else {}),
        ),
        image_token_id=image_token_id,
        image_seq_length=vision.tokens_per_tile,
        downsample_ratio=1 / vision.shuffle_factor,
        tie_word_embeddings=False,
    )


def build(model: ModelConfig, setting: Setting, dtype: torch.dtype, device: Device) -> Any:
    """transformers' `InternVLForConditionalGeneration` of these sizes with random weights, in training mode."""
    from transformers import AttentionInterface, InternVLForConditionalGeneration

    AttentionInterface.register("torch_varlen", varlen_attention)
    config = transformers_config(model, image_token(model))
    with torch.device(device.torch_device):
        built: Any = InternVLForConditionalGeneration(config)
    # Tiles are all of one length; their encoder's flash attention is torch's.
    built.set_attn_implementation({"text_config": setting.attention, "vision_config": "sdpa"})
    if setting.recomputes:
        built.gradient_checkpointing_enable()
    return built.to(dtype).train()


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside the samples of a packed row, as transformers' attention interface has it.

    Args:
        module: the layer.
        query: [1, heads, S, size]; key and value [1, key/value heads, S, size].
        attention_mask: none.
        scaling: of the scores.
        cu_seq_lens_q: int32, ends of the samples, from 0.
        max_length_q: of the longest sample.

    Returns:
        [1, S, heads, size], and no attention weights.
    """
    del attention_mask
    assert cu_seq_lens_q is not None, "packed rows come with the ends of their samples"
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    if query.device.type == "cpu":
        lengths = cu_seq_lens_q.diff().tolist()
        samples = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
        attended = [F.scaled_dot_product_attention(*sample, is_causal=True, scale=scaling) for sample in samples]
        return torch.cat(attended, dim=2).transpose(1, 2), None
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    ends, longest = cu_seq_lens_q, max_length_q
    output = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=(-1, 0))
    assert isinstance(output, Tensor), "torch returns more than the output only when asked to"
    return output[None], None


def weighted_loss_sum(model: Any, batch: MicroBatch, attention: Attention) -> Tensor:
    """Sum of weight * cross entropy over a micro-batch's supervised tokens; logits exist for these alone."""
    dtype = next(model.parameters()).dtype
    extra: dict[str, Any] = {}
    mask = None
    if attention == "sdpa" and batch.segment_ends is not None:
        mask = _sample_mask(batch.segment_ends, batch.token_ids.shape[1])
    elif batch.segment_ends is not None:
        extra = {"cu_seq_lens_q": batch.segment_ends, "cu_seq_lens_k": batch.segment_ends}
        extra |= {"max_length_q": batch.longest_sample, "max_length_k": batch.longest_sample}
    if len(batch.pixels):
        extra["pixel_values"] = normalize_pixels(batch.pixels, dtype)
    hidden = model.model(
        input_ids=batch.token_ids,
        # Given as what the layers get: from positions or a mask of padding transformers would infer samples, and take
        # fractions of V2PE for the starts of new ones.
        attention_mask={"full_attention": mask},
        position_ids=batch.positions,
        use_cache=False,
        **extra,
    ).last_hidden_state
    logits = model.lm_head(hidden.flatten(0, 1)[batch.supervised])
    losses = F.cross_entropy(logits.float(), batch.targets, reduction="none")
    return (losses * batch.weights).sum()


def _sample_mask(segment_ends: Tensor, length: int) -> Tensor:
    """bool [1, 1, S, S]: who sees whom in a packed row."""
    place = torch.arange(length, device=segment_ends.device)
    sample = torch.searchsorted(segment_ends, place, right=True)
    return ((sample[:, None] == sample) & (place[:, None] >= place))[None, None]


class Baseline:
    """A model with its optimizer, and the micro-batches of a step."""

    def __init__(self, config: RunConfig, rows: Sequence[Row], setting: Setting, device: Device) -> None:
        self.setting = setting
        self.config = config
        self.device = device
        self.model = build(config.model, setting, torch_dtype(config.dtype), device)
        tiles: Tiles = RandomPixels(list(rows), config.model, 0, 1).tiles().tiles
        budget = config.data.tokens_per_row
        self.batches = (
            packed_batches(rows, tiles) if setting.samples == "packed" else padded_batches(rows, tiles, budget)
        )
        self.total_weight = sum(float(batch.weights.sum(dtype=torch.float64)) for batch in self.batches)
        optimizer = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=optimizer.learning_rate,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )

    def losses(self) -> Iterator[Tensor]:
        """Every micro-batch's share of the step's loss."""
        for batch in self.batches:
            yield weighted_loss_sum(self.model, batch.to(self.device), self.setting.attention) / self.total_weight

    def step(self) -> Tensor:
        """Forward and backward over all micro-batches, clip, update; the loss before it, still on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device.torch_device)
        for loss in self.losses():
            loss.backward()
            total += loss.detach()
        clip = self.config.optimizer.clip_grad_norm
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip, foreach=True)
        self.optimizer.step()
        return total


def baseline_rank(
    info: RankInfo, config: RunConfig, rows: Sequence[Row], setting: Setting, num_warmup: int, num_steps: int
) -> dict[str, Any]:
    """Body of a process: seconds of every measured step, losses, peak memory."""
    use_own_cores()
    device = open_device(config.device, info.local_rank)
    baseline, losses = Baseline(config, rows, setting, device), []
    seconds = timed(lambda _: losses.append(baseline.step()), num_warmup, num_steps, device)
    return {
        **device_facts(device),
        "seconds": seconds,
        "step_seconds": statistics.median(seconds),
        "losses": [float(loss) for loss in losses],
        "padded_tokens": sum(batch.token_ids.numel() for batch in baseline.batches),
        "micro_batches": len(baseline.batches),
    }
