"""Embeddings and gradients of one chunk at a time between pairs of ranks, while the pipeline runs.

`Exchange` sends a chunk in one all-to-all, in which all ranks meet. Here ranks are at different rows, and only those meet
that have something for each other: whoever encodes sends as soon as it has encoded, whoever owns a row receives when its
pipeline asks for it. Messages of a pair go by ascending chunk at both ends, and between stages in one direction, so that no
two ranks wait for each other to receive. Ranks of the first stage do both at once, for the same chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from internvl_megatron.parallel.exchange import Exchange, Route
from internvl_megatron.parallel.groups import Peers
from internvl_megatron.parallel.tile_plan import TilePlan

Gradients = Callable[[np.ndarray], Tensor]
"""Gives the gradients [m, D] of tokens, int64 [m], this rank owns."""


@dataclass
class _OnTheWay:
    """Messages that have begun, and the memory they are sent from."""

    work: list[dist.Work]
    sent: list[Tensor]

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self.work)

    def wait(self) -> None:
        # Gloo waits for ever for what has been waited for.
        while self.work:
            self.work.pop().wait()


@dataclass
class _Arriving:
    """Tokens that come from others."""

    tokens: np.ndarray
    values: Tensor
    """[n, D]; not to be read before the messages are through."""
    messages: _OnTheWay

    def wait(self) -> tuple[np.ndarray, Tensor]:
        self.messages.wait()
        return self.tokens, self.values


class ChunkMessages:
    """The messages of one step on one rank; what it has for itself stays where it is."""

    def __init__(self, exchange: Exchange, plan: TilePlan, hidden_size: int, dtype: torch.dtype) -> None:
        """Of tokens with `hidden_size` values of this type."""
        self._exchange = exchange
        self._plan = plan
        self._hidden_size, self._dtype = hidden_size, dtype
        self._rank = exchange.groups.rank
        self._layout = exchange.groups.layout
        self._owns_tokens = self._layout.stage(self._rank) == 0
        self._leaving: dict[int, dict[int, Tensor]] = {}
        self._gradients: dict[int, _Arriving] = {}
        self._on_the_way: list[_OnTheWay] = []

    def send_embeddings(self, chunk: int, embeddings: Tensor) -> tuple[np.ndarray, Tensor]:
        """Send a chunk's embeddings [t, K, D], of the tiles this rank encoded, in table order.

        On the first stage they leave with `receive_embeddings`.

        Returns:
            Those of the tokens this rank owns itself, int64 [n], and their embeddings [n, D].
        """
        exchange, plan = self._exchange, self._plan
        route = exchange.of_encoder(plan, chunk, self._rank, for_gradients=False)
        tokens = embeddings.flatten(0, 1)

        def at(part: slice) -> Tensor:
            return tokens[exchange.device.put(exchange.local(plan, chunk, route.tokens[part]))]

        parts = _parts(route)
        mine = parts.pop(self._rank, slice(0))
        leaving = {rank: at(part) for rank, part in parts.items()}
        if self._owns_tokens:
            self._leaving[chunk] = leaving
        else:
            self._begin(chunk, exchange.groups.embeddings, leaving, expected=None)
        return route.tokens[mine], at(mine)

    def receive_embeddings(self, chunk: int) -> tuple[np.ndarray, Tensor]:
        """A chunk's tokens that this rank owns and others encoded, int64 [n], and their embeddings [n, D].

        To be called on all ranks of the first stage, whether they have such tokens or not; ascending chunks, each once.
        """
        exchange = self._exchange
        expected = exchange.of_owner(self._plan, chunk, self._rank, for_gradients=False)
        leaving = self._leaving.pop(chunk, {})
        return self._begin(chunk, exchange.groups.embeddings, leaving, expected).wait()

    def send_gradients(self, chunk: int, gradients: Gradients) -> None:
        """Begin to send the gradients of a chunk's embeddings back; on all ranks of the first stage, ascending chunks.

        Args:
            chunk: all its rows have run backward.
            gradients: of tokens this rank owns.
        """
        exchange = self._exchange
        route = exchange.of_owner(self._plan, chunk, self._rank, for_gradients=True)
        leaving = {rank: gradients(route.tokens[part]) for rank, part in _parts(route).items() if rank != self._rank}
        expected = exchange.of_encoder(self._plan, chunk, self._rank, for_gradients=True)
        self._gradients[chunk] = self._begin(chunk, exchange.groups.gradients, leaving, expected)

    def receive_gradients(self, chunk: int, gradients: Gradients) -> Tensor:
        """Gradients [t, K, D] of the tiles this rank encoded in a chunk, in table order; ascending chunks, each once.

        Args:
            chunk: after `send_gradients` of it, on the first stage.
            gradients: of tokens this rank owns.
        """
        exchange, plan = self._exchange, self._plan
        route = exchange.of_encoder(plan, chunk, self._rank, for_gradients=True)
        arriving = self._gradients.pop(chunk, None)
        if arriving is None:
            arriving = self._begin(chunk, exchange.groups.gradients, {}, route)
        tokens, values = arriving.wait()
        mine = route.tokens[_parts(route).get(self._rank, slice(0))]
        if len(mine):
            tokens, values = np.concatenate([tokens, mine]), torch.cat([values, gradients(mine)])
        # Every token of a tile comes back once: a permutation.
        order = exchange.device.put(np.argsort(exchange.local(plan, chunk, tokens)))
        return values[order].unflatten(0, (-1, exchange.tokens_per_tile))

    def finish(self) -> None:
        """Wait until all that was sent has arrived."""
        for messages in self._on_the_way:
            messages.wait()
        self._on_the_way.clear()

    def _begin(self, chunk: int, peers: Peers, leaving: dict[int, Tensor], expected: Route | None) -> _Arriving:
        """Begin to send to others, by rank, and to receive what is expected of others."""
        exchange = self._exchange
        parts = _parts(expected) if expected is not None else {}
        parts.pop(self._rank, None)
        counts = [part.stop - part.start for part in parts.values()]
        values = torch.empty(sum(counts), self._hidden_size, dtype=self._dtype, device=exchange.device.torch_device)
        places = dict(zip(parts, values.split(counts), strict=True)) if parts else {}
        together, receiving = [], _OnTheWay([], [])
        for rank in sorted({*leaving, *places}):
            meets = self._owns_tokens and self._layout.stage(rank) == 0
            if rank in leaving:
                exchange.sent_bytes += leaving[rank].nbytes
                if meets:
                    together.append(dist.P2POp(dist.isend, leaving[rank], rank, peers.group, tag=chunk))
                else:
                    # Nobody waits for it: the receiver may be many rows behind.
                    work = [_begun(dist.isend(leaving[rank], rank, peers.group, tag=chunk))]
                    self._on_the_way.append(_OnTheWay(work, [leaving[rank]]))
            if rank in places:
                if meets:
                    together.append(dist.P2POp(dist.irecv, places[rank], rank, peers.group, tag=chunk))
                else:
                    receiving.work.append(_begun(dist.irecv(places[rank], rank, peers.group, tag=chunk)))
        if together:
            receiving.work += dist.batch_isend_irecv(together)
            receiving.sent += leaving.values()
        self._on_the_way = [others for others in self._on_the_way if not others.is_completed()]
        tokens = [expected.tokens[part] for part in parts.values()] if expected is not None else []
        return _Arriving(np.concatenate([np.empty(0, dtype=np.int64), *tokens]), values, receiving)


def _begun(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this rank is one of the peers"
    return work


def _parts(route: Route) -> dict[int, slice]:
    """Where in the route's tokens those of each rank are; ranks without any are left out."""
    ends = np.cumsum(route.counts)
    return {
        rank: slice(int(ends[rank] - route.counts[rank]), int(ends[rank]))
        for rank in np.flatnonzero(route.counts).tolist()
    }
