"""Moves tiles to the ranks that encode them, embeddings to the ranks that own their tokens, and gradients back.

Every message is one all-to-all whose sizes both ends compute from the plan. Embeddings travel as tokens, because a
tile's tokens can lie in two slices of a sequence-parallel row, and chunk by chunk, so that what is on the way is never more
than the chunks of all ranks.

Shapes: e tiles this rank encodes, t of them in a chunk, K tokens of a tile, D hidden size, n image tokens of its slice in a
chunk.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from internvl_megatron.device import Device
from internvl_megatron.parallel.groups import Groups, Peers
from internvl_megatron.parallel.tile_plan import TilePlan


@dataclass(frozen=True)
class TokenSlice:
    """Image tokens a rank owns: token i of the window is tile i // K of the plan's table, place i % K in the tile."""

    tokens: np.ndarray
    """int64 [n], ascending, which is the order of rows and of places in a row."""
    row: np.ndarray
    """int64 [n], the row each token is in."""
    position: np.ndarray
    """int64 [n], its place in this rank's slice of the row."""


@dataclass(frozen=True)
class Route:
    """Tokens between one rank and all ranks on the other side."""

    tokens: np.ndarray
    """int64 [n], by the other side's rank and ascending for each."""
    counts: np.ndarray
    """int64 [world], tokens for each of them."""

    @classmethod
    def ordered(cls, others: np.ndarray, tokens: np.ndarray, world_size: int) -> "Route":
        """From pairs of the other side's rank and a token, in any order."""
        order = np.lexsort((tokens, others))
        return cls(tokens[order], np.bincount(others, minlength=world_size))


class HeldTiles:
    """Tiles of a window on a rank that encodes them, in the order they came in."""

    def __init__(self, memory: Tensor, tiles: np.ndarray, device: Device) -> None:
        """Of `tiles`, int64 [e] indices into the plan's table, `memory`, uint8 [e, 3, H, W], has the pixels."""
        self._memory = memory
        self._order = np.argsort(tiles)
        self._tiles = tiles[self._order]
        self._device = device

    def take(self, tiles: np.ndarray) -> Tensor:
        """A copy of some of them, uint8 [t, 3, H, W], by their indices in the plan's table."""
        return self._memory[self._device.put(self._order[np.searchsorted(self._tiles, tiles)])]


@dataclass(frozen=True)
class TilesOnTheWay:
    """Tiles that are being sent; take them with `Exchange.receive_tiles`."""

    memory: Tensor
    """uint8 [e, 3, H, W]: those this rank decoded itself, then the others' by rank; not to be read before `work` is done."""
    tiles: np.ndarray
    """int64 [e], their indices in the plan's table."""
    sent: Tensor
    """Kept until the message is through."""
    sent_bytes: int
    work: dist.Work


class Exchange:
    """The three all-to-alls of the decoupled schedule, as one rank takes part in them."""

    def __init__(
        self, groups: Groups, device: Device, *, tile_pixels: int, tokens_per_tile: int, sequence_parallel: bool
    ) -> None:
        self.groups = groups
        self.device = device
        self.tile_pixels = tile_pixels
        self.tokens_per_tile = tokens_per_tile
        self.sequence_parallel = sequence_parallel
        self.sent_bytes = 0
        """What this rank has sent to others, since somebody set it to 0."""
        self.unit = groups.vision_layout.unit_of_rank[groups.rank]
        """Unit of this rank; None if it does not encode."""
        self._units = np.array(groups.vision_layout.units)  # [units, ranks of a unit]

    def send_tiles(self, plan: TilePlan, decoded: Sequence[np.ndarray]) -> TilesOnTheWay:
        """Begin to send decoded tiles to all ranks of the units that encode them; those of this rank stay here.

        Args:
            plan: the plan of this window.
            decoded: uint8 [3, H, W] of each tile this rank decoded, in table order.
        """
        rank, world = self.groups.rank, self.groups.layout.world_size
        held = np.flatnonzero(plan.table.decoder == rank)
        assert len(decoded) == len(held), f"{len(decoded)} decoded tiles, the plan expects {len(held)}"
        target = self._units[plan.encoder[held]]  # [tiles, ranks of a unit]
        place, member = np.nonzero(target != rank)
        target = target[place, member]
        sent = self._tile_memory([decoded[index] for index in place[np.argsort(target, kind="stable")]])
        mine = plan.tiles_of(self.unit)
        source = plan.table.decoder[mine]
        own, others = mine[source == rank], mine[source != rank]
        source = source[source != rank]
        memory = self._tile_memory([decoded[index] for index in np.searchsorted(held, own)], num_more=len(others))
        counts = np.bincount(target, minlength=world), np.bincount(source, minlength=world)
        work = self._begin(sent, counts[0], memory[len(own) :], counts[1], self.groups.tiles)
        tiles = np.concatenate([own, others[np.argsort(source, kind="stable")]])
        return TilesOnTheWay(memory, tiles, sent, self._bytes_to_others(sent, counts[0]), work)

    def receive_tiles(self, tiles: TilesOnTheWay) -> HeldTiles:
        """Wait for tiles, those this rank encodes."""
        tiles.work.wait()
        self.sent_bytes += tiles.sent_bytes
        for tensor in (tiles.memory, tiles.sent):
            self.device.use_here(tensor)
        return HeldTiles(tiles.memory, tiles.tiles, self.device)

    def owned(self, plan: TilePlan, chunk: int | None = None) -> TokenSlice:
        """The image tokens this rank puts into its slice of the sequence, of one chunk or of all; none outside the first
        stage."""
        tokens = self._tokens(plan, chunk, self.groups.rank, for_gradients=False)
        tile = tokens // self.tokens_per_tile
        _, place = self._place(plan, tokens)
        first, _ = self._share(self.groups.rank, plan.table.row_tokens[tile], for_gradients=False)
        return TokenSlice(tokens, plan.table.row[tile], place - first)

    def send_embeddings(self, plan: TilePlan, chunk: int, embeddings: Tensor) -> tuple[np.ndarray, Tensor]:
        """Send a chunk's embeddings to their owners; each from one rank of its unit.

        Args:
            plan: the plan of this window.
            chunk: which of its chunks.
            embeddings: [t, K, D], of the tiles this rank encoded, in table order.

        Returns:
            The tokens of `owned(plan, chunk)` by the rank that had them, int64 [n], and their embeddings [n, D].
        """
        outgoing = self.of_encoder(plan, chunk, self.groups.rank, for_gradients=False)
        incoming = self.of_owner(plan, chunk, self.groups.rank, for_gradients=False)
        leaving = embeddings.flatten(0, 1)[self._index(self.local(plan, chunk, outgoing.tokens))]
        received = self._all_to_all(leaving, outgoing.counts, incoming.counts, self.groups.embeddings)
        return incoming.tokens, received

    def send_gradients(self, plan: TilePlan, chunk: int, gradients: Callable[[np.ndarray], Tensor]) -> Tensor:
        """Send the gradients of a chunk's embeddings back to all ranks of the units that computed them.

        Args:
            plan: the plan of this window.
            chunk: which of its chunks.
            gradients: gives the gradients [m, D] of tokens, int64 [m]; is asked for some of `owned(plan, chunk)`.

        Returns:
            [t, K, D], gradients of the tiles this rank encoded, in table order.
        """
        outgoing = self.of_owner(plan, chunk, self.groups.rank, for_gradients=True)
        incoming = self.of_encoder(plan, chunk, self.groups.rank, for_gradients=True)
        leaving = gradients(outgoing.tokens)
        received = self._all_to_all(leaving, outgoing.counts, incoming.counts, self.groups.gradients)
        # Every token of a tile comes back once: a permutation.
        order = self._index(np.argsort(self.local(plan, chunk, incoming.tokens)))
        return received[order].unflatten(0, (-1, self.tokens_per_tile))

    def of_encoder(self, plan: TilePlan, chunk: int, rank: int, for_gradients: bool) -> Route:
        """What the encoder of a chunk's tiles has to do with their owners: who has which of its tokens."""
        layout, vision = self.groups.layout, self.groups.vision_layout
        unit = vision.unit_of_rank[rank]
        tiles = plan.tiles_of(unit, chunk)
        if unit is not None and not for_gradients:
            # All ranks of a unit have the same embeddings; they take turns in sending them.
            tiles = tiles[tiles % vision.tensor_size == vision.units[unit].index(rank)]
        tokens = (tiles[:, None] * self.tokens_per_tile + np.arange(self.tokens_per_tile)).ravel()
        tile = tokens // self.tokens_per_tile
        context, place = self._place(plan, tokens)
        row_tokens = plan.table.row_tokens[tile]
        ranks = np.array([layout.rank(tensor, 0, 0, context) for context in range(layout.context_size)
                          for tensor in range(layout.tensor_size)])  # fmt: skip
        # Of the first replica; the others' ranks are farther by the same step.
        inside = np.array([self._inside(owner, context, place, row_tokens, for_gradients) for owner in ranks.tolist()])
        which, token = np.nonzero(inside)
        owners = ranks[which] + plan.table.replica[tile[token]] * layout.stage_size
        return Route.ordered(owners, tokens[token], layout.world_size)

    def of_owner(self, plan: TilePlan, chunk: int, rank: int, for_gradients: bool) -> Route:
        """What the owner of a chunk's tokens has to do with their encoders: who encoded which of them."""
        tokens = self._tokens(plan, chunk, rank, for_gradients)
        tile = tokens // self.tokens_per_tile
        size = self._units.shape[1]
        if for_gradients:
            encoders, tokens = self._units[plan.encoder[tile]].T.ravel(), np.tile(tokens, size)
        else:
            encoders = self._units[plan.encoder[tile], tile % size]
        return Route.ordered(encoders, tokens, self.groups.layout.world_size)

    def _tokens(self, plan: TilePlan, chunk: int | None, owner: int, for_gradients: bool) -> np.ndarray:
        """Tokens an owner has, of one chunk or of all, ascending; none outside the first stage."""
        layout = self.groups.layout
        if layout.stage(owner) != 0:
            return np.empty(0, dtype=np.int64)
        mine = plan.table.replica == layout.replica(owner)
        tiles = np.flatnonzero(mine if chunk is None else mine & (plan.chunk == chunk))
        tokens = (tiles[:, None] * self.tokens_per_tile + np.arange(self.tokens_per_tile)).ravel()
        context, place = self._place(plan, tokens)
        row_tokens = plan.table.row_tokens[tokens // self.tokens_per_tile]
        return tokens[self._inside(owner, context, place, row_tokens, for_gradients)]

    def _place(self, plan: TilePlan, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Context-parallel rank that has each token, and the place in its part of the row."""
        table = plan.table
        tile, place = np.divmod(tokens, self.tokens_per_tile)
        return self.groups.layout.context_place(
            table.start[tile] + place, table.span_start[tile], table.span_tokens[tile], table.row_tokens[tile]
        )

    def _inside(
        self, owner: int, context: np.ndarray, place: np.ndarray, row_tokens: np.ndarray, for_gradients: bool
    ) -> np.ndarray:
        """Which tokens an owner receives, or returns gradients for."""
        first, end = self._share(owner, row_tokens, for_gradients)
        return (context == self.groups.layout.context_index(owner)) & (place >= first) & (place < end)

    def _share(self, owner: int, row_tokens: np.ndarray, for_gradients: bool) -> tuple[np.ndarray, np.ndarray]:
        """First and end place, in its context-parallel part of rows of such lengths, of what an owner has to do with.

        Without sequence parallelism every tensor-parallel rank needs all image tokens, and Megatron Core gives each of
        them the whole gradient; each returns its share of it, so that none arrives twice.
        """
        layout = self.groups.layout
        length = row_tokens // layout.context_size
        if layout.tensor_size == 1 or not (self.sequence_parallel or for_gradients):
            return np.zeros_like(length), length
        index, size = layout.tensor_index(owner), layout.tensor_size
        # Shares may differ by a token: only sequence parallelism needs a part that divides evenly.
        return length * index // size, length * (index + 1) // size

    def local(self, plan: TilePlan, chunk: int, tokens: np.ndarray) -> np.ndarray:
        """Places of tokens in this rank's flattened [t * K, D] embeddings of a chunk."""
        tile, place = np.divmod(tokens, self.tokens_per_tile)
        return np.searchsorted(plan.tiles_of(self.unit, chunk), tile) * self.tokens_per_tile + place

    def _tile_memory(self, tiles: list[np.ndarray], num_more: int = 0) -> Tensor:
        """Tiles on the device, uint8 [n, 3, H, W], and room for more behind them."""
        shape = len(tiles) + num_more, 3, self.tile_pixels, self.tile_pixels
        memory = torch.empty(shape, dtype=torch.uint8, device=self.device.torch_device)
        self.device.fill(memory[: len(tiles)], tiles)
        return memory

    def _index(self, index: np.ndarray) -> Tensor:
        return self.device.put(index)

    def _all_to_all(self, send: Tensor, sent: np.ndarray, received: np.ndarray, peers: Peers) -> Tensor:
        self.sent_bytes += self._bytes_to_others(send, sent)
        output = send.new_empty(int(received.sum()), *send.shape[1:])
        self._begin(send, sent, output, received, peers).wait()
        return output

    @staticmethod
    def _begin(send: Tensor, sent: np.ndarray, receive: Tensor, received: np.ndarray, peers: Peers) -> dist.Work:
        """Begin to exchange with the peers; the counts are by global rank, and 0 for ranks that are no peers."""
        splits = received[peers.ranks].tolist(), sent[peers.ranks].tolist()
        work = dist.all_to_all_single(receive, send, *splits, group=peers.group, async_op=True)
        assert work is not None, "this rank is one of the peers"
        return work

    def _bytes_to_others(self, send: Tensor, sent: np.ndarray) -> int:
        return int(sent.sum() - sent[self.groups.rank]) * send[:1].nbytes
