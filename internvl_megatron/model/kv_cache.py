"""Keys and values of sequences that are being continued: one slot for each, in the layers of one pipeline stage.

Megatron Core has two such caches. Its static one advances all sequences of a batch by the same length and lets its attention
guess a mask; its dynamic one is made of kernels for GPUs. This one takes prompts of any lengths and runs everywhere; it keeps
keys after the rotary embedding, so that positions, fractions included, are a matter of the row that brings them.

Shapes: n sequences, s new tokens of all of them, t of one, H local heads, G local key/value heads, D head size, C tokens a slot
has room for, L tokens attended to.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

TOKEN_MULTIPLE = 64
"""Slots have room for a multiple of so many tokens."""


class KeyValueCache:
    """Slots 0, 1 .. of a number of tokens each, the same for all layers."""

    def __init__(self) -> None:
        """Make it without room."""
        self.num_slots = 0
        self.slot_tokens = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        """Keys and values [slots, G, C, D] by the layer's number."""

    def reserve(self, num_slots: int, num_tokens: int) -> None:
        """Make room for so many slots of so many tokens. What slots hold stays, as far as there is still room for it."""
        num_tokens = -(-num_tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
        if (num_slots, num_tokens) == (self.num_slots, self.slot_tokens):
            return
        slots, tokens = min(num_slots, self.num_slots), min(num_tokens, self.slot_tokens)
        for layer, old in self._layers.items():
            new = tuple(_zeros(tensor, num_slots, num_tokens) for tensor in old)
            for target, source in zip(new, old, strict=True):
                target[:slots, :, :tokens] = source[:slots, :, :tokens]
            self._layers[layer] = (new[0], new[1])
        self.num_slots, self.slot_tokens = num_slots, num_tokens

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Let a slot hold what another one holds of its first tokens."""
        for tensors in self._layers.values():
            for tensor in tensors:
                tensor[target, :, :num_tokens] = tensor[source, :, :num_tokens]

    def of_layer(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [slots, G, C, D] of a layer; made when they are asked for first, for heads like those of [s, G, D]."""
        if layer not in self._layers:
            template = like.new_empty(0, like.shape[1], 0, like.shape[2])
            self._layers[layer] = tuple(_zeros(template, self.num_slots, self.slot_tokens) for _ in range(2))  # pyright: ignore[reportArgumentType]
        return self._layers[layer]


def _zeros(like: Tensor, num_slots: int, num_tokens: int) -> Tensor:
    """Zeros, not just memory: what a mask hides has to be a number."""
    return like.new_zeros(num_slots, like.shape[1], num_tokens, like.shape[3])


@dataclass(frozen=True)
class CachedTokens:
    """Where the keys and values of a row's tokens go, and what they attend to: their slot up to themselves."""

    cache: KeyValueCache
    slots: Sequence[int]
    """Of each segment of the row."""
    starts: Sequence[int]
    """Tokens its slot has already."""
    lengths: Sequence[int]
    """Tokens of each segment."""

    @property
    def are_prompts(self) -> bool:
        """Whether there is nothing before any of them: attention inside the row is all."""
        return not any(self.starts)

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep what a layer has of the row's tokens: key and value [s, G, D]."""
        keys, values = self.cache.of_layer(layer, key)
        if self._are_single:
            slots, places = self._places
            keys[slots, :, places] = key
            values[slots, :, places] = value
            return
        for cached, new in ((keys, key), (values, value)):
            parts = new.transpose(0, 1).split(list(self.lengths), dim=1)
            for slot, start, length, part in zip(self.slots, self.starts, self.lengths, parts, strict=True):
                cached[slot, :, start : start + length] = part

    def attend(self, layer: int, query: Tensor) -> Tensor:
        """Attention of [s, H, D] to what the slots hold since `store`; returns [s, H, D]."""
        keys, values = self.cache.of_layer(layer, query)
        groups = keys.shape[1]
        # The query heads of a key/value head are rows of one product: nothing is repeated.
        if self._are_single and self.slots == range(len(self.slots)):
            num, longest = len(self.slots), self._longest
            rows = query.unflatten(1, (groups, -1))  # [n, G, H / G, D]
            attended = F.scaled_dot_product_attention(
                rows, keys[:num, :, :longest], values[:num, :, :longest], self._mask
            )
            return attended.flatten(1, 2)
        outputs = []
        for slot, start, part in zip(self.slots, self.starts, query.split(list(self.lengths)), strict=True):
            end = start + len(part)
            heads = part.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)  # [G, H / G, t, D]
            k, v = (tensor[slot, :, None, :end].expand(-1, heads.shape[1], -1, -1) for tensor in (keys, values))
            mask = causal_lower_right(len(part), end)
            outputs.append(F.scaled_dot_product_attention(heads, k, v, mask).permute(2, 0, 1, 3).flatten(1, 2))
        return torch.cat(outputs)

    @cached_property
    def _are_single(self) -> bool:
        return all(length == 1 for length in self.lengths)

    @cached_property
    def _longest(self) -> int:
        """L of the sequence that has most, this row's token included."""
        return max(self.starts) + 1

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """Slots and places of single tokens, int64 [n]; the same for all layers."""
        device = next(iter(self.cache._layers.values()))[0].device
        return torch.tensor(self.slots, device=device), torch.tensor(self.starts, device=device)

    @cached_property
    def _mask(self) -> Tensor | None:
        """Which of the tokens single ones attend to, bool [n, 1, 1, L]; None = all."""
        if min(self.starts) + 1 == self._longest:
            return None
        _, places = self._places
        return (torch.arange(self._longest, device=places.device) <= places[:, None])[:, None, None]
