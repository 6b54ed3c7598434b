"""Leaders trade rows once a step, so that all replicas have about the same work.

First each tells all others what its rows cost, or that it failed; then rows travel from the replica of their stream to
the one that trains on them. Streams and their positions stay with their leaders.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from internvl_megatron.data.balance import assign_rows, imbalance
from internvl_megatron.data.leader_message import Failure, failure_of, from_message, to_message
from internvl_megatron.data.row_cost import RowCost

Exchange = Callable[[Sequence[bytes]], list[bytes]]
"""Sends the n-th bytes to the leader of replica n; returns what each sent here, by replica. All leaders call it."""


@dataclass(frozen=True)
class RowBalance:
    """Largest cost of a replica's rows over the mean; 1 = all replicas have the same work."""

    before: float
    """If every replica kept the rows of its own streams."""
    after: float
    """As trained on."""


@dataclass(frozen=True)
class MadeRow:
    """A row as its leader made it."""

    slot: int
    buffer: bytes
    """As `row_to_bytes` gives it."""
    cost: int
    """See `RowCost`."""


class RowExchange:
    """One leader's side of the trade."""

    def __init__(self, exchange: Exchange, cost: RowCost, replica: int, num_replicas: int) -> None:
        """Nothing is sent yet.

        Args:
            exchange: see `Exchange`.
            cost: of a row; the same at all leaders.
            replica: this leader's; it makes the rows of slots replica, replica + num_replicas and so on.
            num_replicas: leaders that trade.
        """
        self.cost = cost
        self._exchange = exchange
        self._replica = replica
        self._num_replicas = num_replicas

    def trade(self, made: Sequence[MadeRow] | BaseException) -> tuple[bytes, RowBalance] | Failure:
        """Give rows to the replicas that train on them and take those of this one; all leaders call it once a step.

        Args:
            made: the leader's rows of the step by ascending slot, or the error it met: the others wait for either.

        Returns:
            A buffer of rows, and how even all are; or, at every leader, the failures of those that met an error.
        """
        if isinstance(made, BaseException):
            own = failure_of(made, f"the leader of replica {self._replica}")
        else:
            own = np.array([row.cost for row in made], dtype="<i8").tobytes()
        told = [from_message(message) for message in self._exchange([to_message(own)] * self._num_replicas)]
        failures = [content for content in told if isinstance(content, Failure)]
        if failures or isinstance(made, BaseException):
            text = "; ".join(failure.text for failure in failures)
            return Failure(text, all(failure.is_user_error for failure in failures))
        costs = np.stack([np.frombuffer(content, "<i8") for content in told if isinstance(content, bytes)], axis=1)
        costs = costs.ravel()  # by slot
        slots = [row.slot for row in made]
        expected = range(self._replica, len(costs), self._num_replicas)
        assert slots == list(expected), f"replica {self._replica} made rows for slots {slots}, not {list(expected)}"

        replicas = assign_rows(costs, self._num_replicas)
        outgoing: list[list[bytes]] = [[] for _ in range(self._num_replicas)]
        for row in made:
            outgoing[replicas[row.slot]].append(row.buffer)
        received = self._exchange([b"".join(buffers) for buffers in outgoing])
        kept = np.arange(len(costs)) % self._num_replicas
        before, after = (imbalance(costs, chosen, self._num_replicas) for chosen in (kept, replicas))
        return b"".join(received), RowBalance(before, after)
