"""Moves tiles to the ranks that encode them, embeddings to the ranks that own their tokens, and gradients back.

Every message is one all-to-all whose sizes both ends compute from the plan. Embeddings travel as tokens, because a
tile's tokens can lie in two slices of a sequence-parallel row.

Shapes: t tiles this rank decodes, e tiles it encodes, K tokens of a tile, D hidden size, n image tokens of its slice.
"""

from dataclasses import dataclass

import numpy as np
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


@dataclass(frozen=True)
class TilesOnTheWay:
    """Tiles that are being sent; take them with `Exchange.receive_tiles`."""

    received: Tensor
    """uint8 [e, 3, H, W], by the rank that decoded them; not to be read before `work` is done."""
    sent: Tensor
    """Kept until the message is through."""
    order: Tensor
    """int64 [e], places in `received` of the tiles in table order."""
    sent_bytes: int
    work: dist.Work


class Exchange:
    """The three all-to-alls of the decoupled schedule, as one rank takes part in them."""

    def __init__(self, groups: Groups, device: Device, *, tokens_per_tile: int, sequence_parallel: bool) -> None:
        self.groups = groups
        self.device = device
        self.tokens_per_tile = tokens_per_tile
        self.sequence_parallel = sequence_parallel
        self.sent_bytes = 0
        """What this rank has sent to others, since somebody set it to 0."""
        self.unit = groups.vision_layout.unit_of_rank[groups.rank]
        """Unit of this rank; None if it does not encode."""
        self._units = np.array(groups.vision_layout.units)  # [units, ranks of a unit]

    def send_tiles(self, plan: TilePlan, decoded: Tensor) -> TilesOnTheWay:
        """Begin to send decoded tiles to all ranks of the units that encode them.

        Args:
            plan: the plan of this window.
            decoded: uint8 [t, 3, H, W], the tiles this rank decoded, in table order.
        """
        rank, world = self.groups.rank, self.groups.layout.world_size
        held = np.flatnonzero(plan.table.decoder == rank)
        assert len(decoded) == len(held), f"{len(decoded)} decoded tiles, the plan expects {len(held)}"
        target = self._units[plan.encoder[held]].T.ravel()  # once for every rank of the unit
        order = np.argsort(target, kind="stable") % max(1, len(held))
        source = plan.table.decoder[plan.tiles_of(self.unit)]
        sent = decoded[self._index(order)]
        counts = np.bincount(target, minlength=world)
        received, work = self._begin(sent, counts, np.bincount(source, minlength=world), self.groups.tiles)
        order = self._index(_inverse(np.argsort(source, kind="stable")))
        return TilesOnTheWay(received, sent, order, self._bytes_to_others(sent, counts), work)

    def receive_tiles(self, tiles: TilesOnTheWay) -> Tensor:
        """Wait for tiles: uint8 [e, 3, H, W], those this rank encodes, in table order."""
        tiles.work.wait()
        self.sent_bytes += tiles.sent_bytes
        return tiles.received[tiles.order]

    def owned(self, plan: TilePlan) -> TokenSlice:
        """The image tokens this rank puts into its slice of the sequence; none outside the first stage."""
        tokens = self._tokens(plan, self.groups.rank, for_gradients=False)
        tile = tokens // self.tokens_per_tile
        _, place = self._place(plan, tokens)
        first, _ = self._share(self.groups.rank, plan.table.row_tokens[tile], for_gradients=False)
        return TokenSlice(tokens, plan.table.row[tile], place - first)

    def send_embeddings(self, plan: TilePlan, embeddings: Tensor) -> Tensor:
        """Send embeddings to their owners; each from one rank of its unit.

        Args:
            plan: the plan of this window.
            embeddings: [e, K, D], of the tiles this rank encoded, in table order.

        Returns:
            [n, D], the tokens of `owned(plan)` in its order.
        """
        outgoing = self._of_encoder(plan, self.groups.rank, for_gradients=False)
        incoming = self._of_owner(plan, self.groups.rank, for_gradients=False)
        received = self._all_to_all(
            embeddings.flatten(0, 1)[self._index(self._local(plan, outgoing.tokens))],
            outgoing.counts,
            incoming.counts,
            self.groups.embeddings,
        )
        return received[self._index(np.argsort(incoming.tokens, kind="stable"))]

    def send_gradients(self, plan: TilePlan, gradients: Tensor) -> Tensor:
        """Send the gradients of embeddings back to all ranks of the units that computed them.

        Args:
            plan: the plan of this window.
            gradients: [n, D], of the tokens of `owned(plan)` in its order.

        Returns:
            [e, K, D], gradients of the tiles this rank encoded, in table order.
        """
        outgoing = self._of_owner(plan, self.groups.rank, for_gradients=True)
        incoming = self._of_encoder(plan, self.groups.rank, for_gradients=True)
        mine = self._tokens(plan, self.groups.rank, for_gradients=False)
        received = self._all_to_all(
            gradients[self._index(np.searchsorted(mine, outgoing.tokens))],
            outgoing.counts,
            incoming.counts,
            self.groups.gradients,
        )
        num_tiles = len(plan.tiles_of(self.unit))
        result = gradients.new_empty(num_tiles * self.tokens_per_tile, gradients.shape[-1])
        result[self._index(self._local(plan, incoming.tokens))] = received
        return result.unflatten(0, (num_tiles, self.tokens_per_tile))

    def _of_encoder(self, plan: TilePlan, rank: int, for_gradients: bool) -> Route:
        """What the encoder of some tiles has to do with their owners: who has which of its tokens."""
        layout, vision = self.groups.layout, self.groups.vision_layout
        unit = vision.unit_of_rank[rank]
        tiles = plan.tiles_of(unit)
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

    def _of_owner(self, plan: TilePlan, rank: int, for_gradients: bool) -> Route:
        """What the owner of some tokens has to do with their encoders: who encoded which of them."""
        tokens = self._tokens(plan, rank, for_gradients)
        tile = tokens // self.tokens_per_tile
        size = self._units.shape[1]
        if for_gradients:
            encoders, tokens = self._units[plan.encoder[tile]].T.ravel(), np.tile(tokens, size)
        else:
            encoders = self._units[plan.encoder[tile], tile % size]
        return Route.ordered(encoders, tokens, self.groups.layout.world_size)

    def _tokens(self, plan: TilePlan, owner: int, for_gradients: bool) -> np.ndarray:
        """Tokens an owner has, ascending; none outside the first stage."""
        layout = self.groups.layout
        if layout.stage(owner) != 0:
            return np.empty(0, dtype=np.int64)
        tiles = np.flatnonzero(plan.table.replica == layout.replica(owner))
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

    def _local(self, plan: TilePlan, tokens: np.ndarray) -> np.ndarray:
        """Places of tokens in this rank's flattened [e * K, D] embeddings."""
        tile, place = np.divmod(tokens, self.tokens_per_tile)
        return np.searchsorted(plan.tiles_of(self.unit), tile) * self.tokens_per_tile + place

    def _index(self, index: np.ndarray) -> Tensor:
        return self.device.put(index)

    def _all_to_all(self, send: Tensor, sent: np.ndarray, received: np.ndarray, peers: Peers) -> Tensor:
        self.sent_bytes += self._bytes_to_others(send, sent)
        output, work = self._begin(send, sent, received, peers)
        work.wait()
        return output

    def _begin(self, send: Tensor, sent: np.ndarray, received: np.ndarray, peers: Peers) -> tuple[Tensor, dist.Work]:
        """Begin to exchange with the peers; the counts are by global rank, and 0 for ranks that are no peers."""
        output = send.new_empty(int(received.sum()), *send.shape[1:])
        splits = received[peers.ranks].tolist(), sent[peers.ranks].tolist()
        work = dist.all_to_all_single(output, send.contiguous(), *splits, group=peers.group, async_op=True)
        assert work is not None, "this rank is one of the peers"
        return output, work

    def _bytes_to_others(self, send: Tensor, sent: np.ndarray) -> int:
        return int(sent.sum() - sent[self.groups.rank]) * send[:1].nbytes


def _inverse(permutation: np.ndarray) -> np.ndarray:
    inverse = np.empty_like(permutation)
    inverse[permutation] = np.arange(len(permutation))
    return inverse
