"""Feeds one replica of the language model: rows made once, by its leader; images decoded by all its ranks, ahead of use.

Every rank of a replica has a `ReplicaLoader`. The leader makes rows in a background thread, `prefetch_steps` ahead, and
hands them to the others one step before they are used, so that decoding of the next step overlaps training on this one.
Before that, leaders may trade rows (`row_exchange.py`).
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from internvl_megatron.data.decode_pool import DecodePool
from internvl_megatron.data.leader_message import Failure, failure_of, from_message, to_message
from internvl_megatron.data.records import SampleSettings
from internvl_megatron.data.row_bytes import row_to_bytes, rows_from_bytes
from internvl_megatron.data.row_exchange import MadeRow, RowBalance, RowExchange
from internvl_megatron.data.step_rows import StepRows
from internvl_megatron.data.stream import SampleStream
from internvl_megatron.errors import DataError

Broadcast = Callable[[bytes | None], bytes]
"""Sends the leader's bytes to all ranks of the replica: the leader passes them, the others None; all get them back."""

RowsOfStep = Callable[[int], range]
"""Numbers of a step's rows in the order of all rows of the run; row g is the next of stream g modulo the streams of the run."""

_State = dict[str, Any]


@dataclass(frozen=True)
class _Made:
    """One step of the leader's streams, and where they stand after it."""

    rows: list[MadeRow]
    state: _State


@dataclass(frozen=True)
class _Led:
    """One step as the leader hands it to its replica, and what it keeps to itself."""

    content: bytes | Failure
    state: _State | None = None
    balance: RowBalance | None = None
    error: BaseException | None = None
    """What the leader met itself; None if it was another replica's leader."""


@dataclass(frozen=True)
class _Ahead:
    """One step received but not yet returned: its rows, or the error that takes their place."""

    step: StepRows | BaseException
    state: _State | None = None
    balance: RowBalance | None = None


class ReplicaLoader:
    """Steps of one replica, one after the other, on each of its ranks.

    All ranks of all replicas must call `next_step` equally often: it broadcasts, and leaders trade rows. On the leader
    `state_dict` is the position after the last step that `next_step` returned, whatever has been made ahead.

    Attributes:
        balance: on a leader that trades rows, how even those of the last step returned are; None elsewhere.
    """

    def __init__(
        self,
        streams: Sequence[SampleStream] | None,
        broadcast: Broadcast,
        settings: SampleSettings,
        rank_in_replica: int,
        replica_size: int,
        row_exchange: RowExchange | None = None,
        rows_of_step: RowsOfStep | None = None,
    ) -> None:
        """Nothing is read before the first `next_step`.

        Args:
            streams: on the leader, the streams of this replica's rows; None elsewhere.
            broadcast: see `Broadcast`; only called in the thread that calls `next_step`.
            settings: the same on all ranks.
            rank_in_replica: this rank, from 0.
            replica_size: ranks that share the decoding.
            row_exchange: on the leader, its trade with the leaders of other replicas, in the same thread as `broadcast`;
                None elsewhere, and if all replicas keep their rows.
            rows_of_step: which rows a step takes, by its number from 0; None = one of each stream. No more than one.
        """
        self._streams = None if streams is None else list(streams)
        self._broadcast = broadcast
        self._settings = settings
        self._rank = rank_in_replica
        self._size = replica_size
        self._row_exchange = row_exchange
        self._rows_of_step = rows_of_step
        self._next_made = 0
        """The step that is made next."""
        self.balance: RowBalance | None = None
        self._ahead: deque[_Ahead] = deque()
        self._made: deque[Future[_Made]] = deque()
        self._state = self._streams_state()
        self._maker: ThreadPoolExecutor | None = None
        self._workers: DecodePool | None = None
        self._started = False
        self._closed = False

    def next_step(self) -> StepRows:
        """The rows of the next step.

        Raises:
            DataError: the data are bad and the policy says stop. On the leader with the traceback of the background
                thread; on the other ranks, those of all replicas if rows are traded, with the leader's message.
        """
        assert not self._closed, "the loader is closed"
        if not self._started:
            self._start()
        while len(self._ahead) < 2 and not self._failed():
            self._ahead.append(self._receive())
        ahead = self._ahead[0]
        if isinstance(ahead.step, BaseException):
            raise ahead.step
        self._ahead.popleft()
        self._state = ahead.state
        self.balance = ahead.balance
        return ahead.step

    def peek(self) -> StepRows | None:
        """What the next `next_step` will return, which does not move the position; None if it will raise."""
        step = self._ahead[0].step if self._ahead else None
        return step if isinstance(step, StepRows) else None

    def state_dict(self) -> _State:
        """Position after the last step returned, as JSON: {stream number: its state}. Only on the leader."""
        assert self._state is not None, "only the leader of a replica knows the position"
        return self._state

    def load_state_dict(self, state: _State, step: int = 0) -> None:
        """Go to a saved position, before the first `next_step`; on ranks that are not the leader nothing happens.

        `step` is the number of the step that comes next, for `rows_of_step`. `state` may hold more streams than this replica has (those of the whole run).

        Raises:
            DataError: a stream is missing, or was saved with other data.
        """
        assert not self._started, "the position can only be set before the first step"
        for stream in self._streams or ():
            if str(stream.index) not in state:
                raise DataError(f"the saved data position has no stream {stream.index}; rows_per_step must not change")
            stream.load_state_dict(state[str(stream.index)])
        self._state = self._streams_state()
        self._next_made = step

    def skipped(self) -> dict[str, int]:
        """On the leader: samples left out up to the last step returned, by kind of error."""
        total: dict[str, int] = {}
        for stream in self.state_dict().values():
            for kind, count in stream["skipped"].items():
                total[kind] = total.get(kind, 0) + count
        return total

    def decoder_pids(self) -> list[int]:
        """The processes that decode images for this rank and have begun."""
        return [] if self._workers is None else self._workers.pids()

    def close(self) -> None:
        """End threads and processes. Work that has not begun is given up."""
        self._closed = True
        for ahead in self._ahead:
            if isinstance(ahead.step, StepRows):
                ahead.step.cancel()
        if self._maker is not None:
            self._maker.shutdown(wait=True, cancel_futures=True)
        if self._workers is not None:
            self._workers.close()

    def _start(self) -> None:
        """Start the processes, and the leader's first steps in a thread."""
        self._started = True
        data = self._settings.data
        if data.num_workers > 0:
            self._workers = DecodePool(
                data.num_workers, self._settings.tile_pixels, data.use_thumbnail, data.read_timeout_seconds
            )
        if self._streams is not None:
            self._maker = ThreadPoolExecutor(1, thread_name_prefix="rows")
            self._made.extend(self._maker.submit(self._make) for _ in range(max(1, data.prefetch_steps)))

    def _failed(self) -> bool:
        """Whether the last step received is an error: nothing comes after it."""
        return bool(self._ahead) and isinstance(self._ahead[-1].step, BaseException)

    def _streams_state(self) -> _State | None:
        """Where the streams stand; None if this rank is not the leader."""
        return None if self._streams is None else {str(stream.index): stream.state_dict() for stream in self._streams}

    def _make(self) -> _Made:
        """Make one step's rows (background thread, one at a time)."""
        assert self._streams is not None, "only the leader of a replica makes rows"
        rows = [self._make_row(slot, stream) for slot, stream in self._taken(self._next_made)]
        self._next_made += 1
        state = self._streams_state()
        assert state is not None, "the leader knows where its streams stand"
        return _Made(rows, state)

    def _taken(self, step: int) -> list[tuple[int, SampleStream]]:
        """The streams whose next row is in a step, with its slot there, by ascending slot."""
        assert self._streams is not None, "only the leader of a replica makes rows"
        if self._rows_of_step is None:
            return [(stream.index, stream) for stream in self._streams]
        rows = self._rows_of_step(step)
        slots = [((stream.index - rows.start) % stream.num_streams, stream) for stream in self._streams]
        return sorted((pair for pair in slots if pair[0] < len(rows)), key=lambda pair: pair[0])

    def _make_row(self, slot: int, stream: SampleStream) -> MadeRow:
        row = stream.next_row()
        cost = 0 if self._row_exchange is None else self._row_exchange.cost.of(row)
        return MadeRow(slot, row_to_bytes(slot, row), cost)

    def _receive(self) -> _Ahead:
        """Get one step on all ranks and start to decode this rank's share of its images."""
        led = self._lead() if self._maker is not None else None
        received = from_message(self._broadcast(None if led is None else to_message(led.content)))
        if isinstance(received, Failure):
            return _Ahead(received.error() if led is None or led.error is None else led.error)
        rows = rows_from_bytes(received)
        step = StepRows(list(rows.values()), list(rows), self._settings, self._rank, self._size, self._workers)
        return _Ahead(step) if led is None else _Ahead(step, led.state, led.balance)

    def _lead(self) -> _Led:
        """On the leader: the next step of this replica, traded with the other leaders."""
        assert self._maker is not None, "only the leader of a replica has a maker"
        next_made = self._made.popleft()
        # An error must reach the other ranks too: they wait for a message.
        error = next_made.exception()
        if self._row_exchange is not None:
            traded = self._row_exchange.trade(next_made.result().rows if error is None else error)
            if isinstance(traded, Failure):
                return _Led(traded, error=error)
            content, balance = traded
        elif error is not None:
            return _Led(failure_of(error, "the leader of this replica"), error=error)
        else:
            content, balance = b"".join(row.buffer for row in next_made.result().rows), None
        self._made.append(self._maker.submit(self._make))
        return _Led(content, next_made.result().state, balance)
