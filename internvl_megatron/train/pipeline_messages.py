"""Megatron Core's messages between pipeline stages, with something to do until a gradient arrives."""

from collections.abc import Callable
from typing import Any

from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator


class PipelineMessages(P2PCommunicator):
    """Calls `while_waiting` whenever this rank has begun to wait for a gradient of the next stage."""

    def __init__(self, group: Any, config: Any) -> None:
        super().__init__(group, config)
        self._while_waiting: Callable[[int], None] | None = None
        self._num_gradients = 0

    def fill(self, while_waiting: Callable[[int], None] | None) -> None:
        """What to do from now on, told how many gradients have been waited for since this call; None = just wait."""
        self._while_waiting, self._num_gradients = while_waiting, 0

    def _communicate(self, **message: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        communicate: Callable[..., Any] = super()._communicate
        if self._while_waiting is None or not message["recv_next"]:
            return communicate(**message)
        # Sent and asked for at once: the next stage needs what it is sent, whatever is done meanwhile here.
        previous, following, requests = communicate(**message, wait_on_reqs=False)
        self._while_waiting(self._num_gradients)
        self._num_gradients += 1
        for request in requests.values():
            request.wait()
        return previous, following, None
