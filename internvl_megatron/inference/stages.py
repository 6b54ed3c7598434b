"""The model as one replica of ranks runs it for inference: tiles shared by all of its ranks, tokens through its stages.

All ranks of a replica call the same methods with the same arguments. Replicas never wait for each other.

Shapes: S tokens of a row, D hidden size, V padded vocabulary, n places whose scores are wanted, K image tokens of a tile.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from internvl_megatron.config.schema import RunConfig
from internvl_megatron.data.images import ImageRef, decode_tiles
from internvl_megatron.device import Device
from internvl_megatron.model.attention import PackedRow
from internvl_megatron.model.build import Model, torch_dtype
from internvl_megatron.model.kv_cache import CachedTokens, KeyValueCache
from internvl_megatron.model.language import ImageTokens
from internvl_megatron.model.output_layer import Targets
from internvl_megatron.model.rotary import rotary_tables
from internvl_megatron.parallel.groups import Groups
from internvl_megatron.parallel.host import broadcast_bytes


@dataclass(frozen=True)
class Piece:
    """Tokens of one sequence that go through the model together, a segment of a row."""

    slot: int | None
    """Of the cache; None = nothing is kept, which holds for all pieces of a row or for none."""
    start: int
    """Tokens the slot has already."""
    token_ids: np.ndarray
    """int [t]."""
    positions: np.ndarray
    """int32 [t], in units of 1/256."""
    wanted: np.ndarray
    """int64 [w]: of which of the tokens the scores of the next one are wanted."""
    image_places: np.ndarray | None = None
    """int64 [i], places of image tokens."""
    embeddings: Tensor | None = None
    """[i, D] for them; on the first stage."""


class Stages:
    """One replica's model and cache."""

    def __init__(self, config: RunConfig, model: Model, groups: Groups, device: Device) -> None:
        """Take a model whose ranks hold one stage each."""
        assert len(model.language) == 1, "inference runs every rank's layers as one stage"
        layout = groups.layout
        assert layout.context_size == 1, "inference divides no sequence over ranks"
        assert model.vision_mesh is None, "inference needs the whole vision encoder on every rank"
        self.cache = KeyValueCache()
        self._config = config
        self._vision = model.vision.eval()
        self._language = model.language[0].eval()
        self._groups = groups
        self._device = device
        self._ranks = layout.replica_ranks(layout.replica(groups.rank))
        self._chooser = layout.rank(0, layout.replica(groups.rank), layout.pipeline_size - 1)

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for its replica."""
        return self._groups.rank == self._ranks[0]

    def encode(self, images: Sequence[ImageRef]) -> list[Tensor]:
        """Embeddings of images, [tiles * K, D] each: every rank decodes and encodes an equal share of all tiles.

        Raises:
            DataError: an image cannot be read.
        """
        size, index = len(self._ranks), self._ranks.index(self._groups.rank)
        ends = np.cumsum([0] + [image.num_tiles for image in images])
        bounds = [int(ends[-1]) * rank // size for rank in range(size + 1)]
        mine = self._encode_tiles(self._tiles(images, ends, bounds[index], bounds[index + 1]))
        if size > 1:
            largest = max(end - start for start, end in pairwise(bounds))
            padded = mine.new_zeros(largest, *mine.shape[1:])
            padded[: len(mine)] = mine
            gathered = mine.new_empty(size * largest, *mine.shape[1:])
            dist.all_gather_into_tensor(gathered, padded, group=self._groups.language.mp)
            parts = [gathered[rank * largest :][: bounds[rank + 1] - bounds[rank]] for rank in range(size)]
            mine = torch.cat(parts)
        return [part.flatten(0, 1).clone() for part in mine.split(np.diff(ends).tolist())]

    def scores(self, pieces: Sequence[Piece]) -> Tensor | None:
        """Scores of the next token [n, V] at the wanted places, in their order, on ranks of the last stage; None elsewhere.

        Keys and values of the pieces stay in their slots. Padding of the vocabulary is at -inf.
        """
        logits = self._run(pieces, None)
        return None if logits is None else self._whole_vocabulary(logits[:, 0])

    def logprobs(self, pieces: Sequence[Piece], tokens: np.ndarray) -> Tensor | None:
        """Log-probabilities of tokens int64 [n] at the wanted places, fp32 [n], on ranks of the last stage; None elsewhere.

        Keys and values as with `scores`. Of the scores only some exist at a time (`kernels.loss_chunk_tokens`).
        """
        losses = self._run(pieces, Targets(self._device.put(tokens), None))
        return None if losses is None else -losses

    def _run(self, pieces: Sequence[Piece], targets: Targets | None) -> Tensor | None:
        """Let a row of pieces pass the stages; what the last stage makes of it (`LanguageModel`), there."""
        row, ends = self._row(pieces)
        language, pipeline = self._language, self._groups.language.pp
        if not language.pre_process:
            received = torch.empty(
                row.segment_ends[-1],
                1,
                self._config.model.language.hidden_size,
                dtype=torch_dtype(self._config.dtype),
                device=self._device.torch_device,
            )
            dist.recv(received, group=pipeline, group_src=pipeline.rank() - 1)
            language.set_input_tensor(received)
        token_ids = self._device.put(np.concatenate([piece.token_ids for piece in pieces]).astype(np.int64))
        wanted = np.concatenate([piece.wanted + start for piece, start in zip(pieces, ends, strict=False)])
        output = language(token_ids[None], row, self._image_tokens(pieces, ends), self._device.put(wanted), targets)
        if not language.post_process:
            dist.send(output.contiguous(), group=pipeline, group_dst=pipeline.rank() + 1)
            return None
        return output

    def agree(self, chosen: Sequence[int] | None, count: int) -> list[int]:
        """What the last stage has chosen, on every rank of the replica."""
        if len(self._ranks) == 1:
            assert chosen is not None, "one rank is the last stage too"
            return list(chosen)
        message = torch.zeros(count, dtype=torch.int64)
        if self._groups.rank == self._chooser:
            assert chosen is not None, "the chooser is on the last stage"
            message = torch.tensor(chosen, dtype=torch.int64)
        dist.broadcast(message, src=self._chooser, group=self._groups.host_replica)
        return message.tolist()

    def share(self, payload: bytes | None) -> bytes:
        """What the leading rank says, on every rank of the replica; the others pass None."""
        if len(self._ranks) == 1:
            assert payload is not None, "the only rank leads"
            return payload
        return broadcast_bytes(payload, self._ranks[0], self._groups.host_replica)

    def agree_numbers(self, values: Tensor | None, count: int) -> Tensor:
        """fp32 [n] of the last stage, on every rank of the replica, in host memory."""
        bits = None if values is None else values.float().cpu().view(torch.int32).tolist()
        return torch.tensor(self.agree(bits, count), dtype=torch.int32).view(torch.float32)

    def _tiles(self, images: Sequence[ImageRef], ends: np.ndarray, first: int, last: int) -> np.ndarray:
        """Tiles `first` to `last` of all, uint8 [tiles, 3, pixels, pixels]; only the images they are of are decoded."""
        vision, thumbnail = self._config.model.vision, self._config.data.use_thumbnail
        parts = [np.empty((0, 3, vision.tile_pixels, vision.tile_pixels), dtype=np.uint8)]
        for image, (start, end) in zip(images, pairwise(ends), strict=True):
            if start < last and end > first:
                tiles = decode_tiles(image, vision.tile_pixels, thumbnail)
                parts.append(tiles[max(0, first - start) : last - start])
        return np.concatenate(parts)

    def _encode_tiles(self, tiles: np.ndarray) -> Tensor:
        """Embeddings [tiles, K, D], chunk by chunk."""
        model, size = self._config.model, self._config.parallel.vision_chunk_tiles
        if not len(tiles):
            shape = (0, model.vision.tokens_per_tile, model.language.hidden_size)
            return torch.empty(shape, dtype=torch_dtype(self._config.dtype), device=self._device.torch_device)
        chunks = [self._device.put(tiles[first : first + size]) for first in range(0, len(tiles), size)]
        return torch.cat([self._vision(chunk) for chunk in chunks])

    def _row(self, pieces: Sequence[Piece]) -> tuple[PackedRow, np.ndarray]:
        """The pieces as segments of a row, and where they end in it, a 0 in front."""
        lengths = [len(piece.token_ids) for piece in pieces]
        ends = np.cumsum([0, *lengths])
        on_device = self._device.put(ends.astype(np.int32))
        language = self._config.model.language
        positions = self._device.put(np.concatenate([piece.positions for piece in pieces]))
        slots = [piece.slot for piece in pieces if piece.slot is not None]
        assert len(slots) in (0, len(pieces)), f"{len(slots)} of {len(pieces)} pieces of a row have a slot"
        starts, in_order = [piece.start for piece in pieces], slots == list(range(len(slots)))
        row = PackedRow(
            cu_seqlens_q=on_device,
            cu_seqlens_kv=on_device,
            segment_ends=tuple(ends.tolist()),
            rotary=rotary_tables(positions, language.head_size, language.rope_theta),
            cached=CachedTokens(self.cache, range(len(slots)) if in_order else slots, starts, lengths)
            if slots
            else None,
        )
        return row, ends

    def _image_tokens(self, pieces: Sequence[Piece], ends: np.ndarray) -> ImageTokens | None:
        """Image embeddings of a row and their places in it; the j-th piece starts at ends[j]."""
        if not self._language.pre_process:
            return None
        embeddings = [piece.embeddings for piece in pieces if piece.embeddings is not None]
        if not embeddings:
            return None
        places = [
            piece.image_places + start
            for piece, start in zip(pieces, ends, strict=False)
            if piece.image_places is not None
        ]
        return ImageTokens(torch.cat(embeddings), self._device.put(np.concatenate(places)))

    def _whole_vocabulary(self, logits: Tensor) -> Tensor:
        """[n, V] of all tensor-parallel ranks' parts."""
        group = self._groups.language.tp
        if group.size() == 1:
            return logits
        gathered = logits.new_empty(group.size() * len(logits), logits.shape[1])
        dist.all_gather_into_tensor(gathered, logits.contiguous(), group=group)
        return gathered.unflatten(0, (group.size(), -1)).transpose(0, 1).flatten(1)
