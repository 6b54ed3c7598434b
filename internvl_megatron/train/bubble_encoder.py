"""The vision encoder in the pauses of the pipeline, as `parallel.bubble_plan` has planned them."""

from functools import partial

from torch import Tensor

from internvl_megatron.parallel.bubble_plan import BubblePlan
from internvl_megatron.parallel.chunk_messages import ChunkMessages
from internvl_megatron.parallel.exchange import Exchange, HeldTiles
from internvl_megatron.train.phases import PhaseClock
from internvl_megatron.train.window_encoder import ChunkPasses, TileEncoder, WindowEncoder, embedding_store


class BubbleEncoder(WindowEncoder):
    """Encodes some tiles before this rank's pipeline begins and the others while it waits; backward in the same way."""

    def __init__(
        self, encoder: TileEncoder, exchange: Exchange, plan: BubblePlan, tiles: HeldTiles, clock: PhaseClock
    ) -> None:
        """Take the tiles of a step.

        Args:
            encoder: of the step.
            exchange: says which tiles and tokens are this rank's.
            plan: of the whole step.
            tiles: those this rank encodes.
            clock: sees what is done while the pipeline waits.
        """
        layout, rank = exchange.groups.layout, exchange.groups.rank
        self._encoder = encoder
        self._plan = plan
        self._clock = clock
        self._stage, self._order = layout.stage(rank), plan.order[layout.replica(rank)].tolist()
        self._passes = ChunkPasses(encoder, exchange, plan, tiles)
        self._store = embedding_store(encoder.config, exchange, plan.places)
        hidden_size = encoder.config.model.language.hidden_size
        self._messages = ChunkMessages(exchange, plan.places, hidden_size, self._store.dtype)
        assert exchange.unit is not None, "all ranks encode"
        self._mine = [plan.runs(exchange.unit, chunk) for chunk in range(plan.num_chunks)]
        self._num_encoded = self._num_sent_back = self._num_run_back = 0

    def encode(self) -> None:
        """What has to be there before the pipeline begins, and what there is time for."""
        self._encode_until(int(self._plan.chunks_ahead[self._stage]))

    def row(self, row: int) -> tuple[Tensor, Tensor] | None:
        """Waits for those who encode the rows in the same slot of all replicas."""
        for chunk in self._plan.chunks_of(self._order.index(row)):
            self._store.put(*self._messages.receive_embeddings(chunk))
        return self._store.row(row, requires_grad=self._encoder.learns)

    def while_waiting(self, number: int) -> None:
        """Encode what is left, or run some chunks backward whose gradients have left the pipeline.

        To be called when this stage has begun to wait for a gradient of the next one, its number-th from 0.
        """
        with self._clock.phase("encode"):
            self._encode_until(self._plan.num_chunks)
        if not self._encoder.learns:
            return
        with self._clock.phase("backprop"):
            self._send_back(num_slots=number)
            self._run_back_until(int(self._plan.chunks_back[self._stage, number]))

    def backprop(self) -> None:
        """What is left."""
        if self._encoder.learns:
            self._send_back(num_slots=len(self._order))
            self._run_back_until(self._plan.num_chunks)
        self._messages.finish()

    def _encode_until(self, end: int) -> None:
        for chunk in range(self._num_encoded, end):
            if self._mine[chunk]:
                embeddings = self._passes.forward(chunk)
                self._store.put(*self._messages.send_embeddings(chunk, embeddings))
        self._num_encoded = max(self._num_encoded, end)

    def _send_back(self, num_slots: int) -> None:
        """Let the gradients of so many slots go, once; they are on the first stage."""
        if self._stage > 0:
            return
        end = self._plan.chunks_of(num_slots).start
        for chunk in range(self._num_sent_back, end):
            self._messages.send_gradients(chunk, self._store.gradients)
        self._num_sent_back = end

    def _run_back_until(self, end: int) -> None:
        for chunk in range(self._num_run_back, end):
            if self._mine[chunk]:
                gradient = partial(self._messages.receive_gradients, chunk, self._store.gradients)
                self._passes.backward(chunk, gradient, is_last=chunk == self._plan.num_chunks - 1)
        self._num_run_back = max(self._num_run_back, end)
