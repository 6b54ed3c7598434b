"""Work that one rank does while the others wait, however long it takes; they all hear of its error."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from internvl_megatron.data.leader_message import Failure, failure_of, from_message, to_message

_BUSY, _DONE = b"busy", b"done"


def one_rank_first(
    work: Callable[[], None],
    is_worker: bool,
    broadcast: Callable[[bytes | None], bytes],
    seconds_between_messages: float,
) -> None:
    """Let one rank do the work; all return when it is done.

    Args:
        work: done by the worker alone, in a thread.
        is_worker: on exactly one of the ranks.
        broadcast: sends the worker's bytes to all ranks, the others pass None.
        seconds_between_messages: well below the time after which a waiting rank gives up.

    Raises:
        DataError: on all ranks, if the work raised one; a `RuntimeError` on those that wait if it was anything else.
    """
    if not is_worker:
        while (content := from_message(broadcast(None))) == _BUSY:
            pass
        if isinstance(content, Failure):
            raise content.error()
        return
    with ThreadPoolExecutor(1, thread_name_prefix="first") as thread:
        future: Future[None] = thread.submit(work)
        while not wait([future], seconds_between_messages).done:
            broadcast(to_message(_BUSY))
        error = future.exception()
    broadcast(to_message(_DONE if error is None else failure_of(error, "rank 0")))
    if error is not None:
        raise error
