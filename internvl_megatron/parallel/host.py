"""Small messages between host memories: plain arrays of numbers, never pickled objects."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist


def gather_integers(values: np.ndarray, group: dist.ProcessGroup) -> list[np.ndarray]:
    """All ranks' int64 vectors, in the order of their ranks; lengths may differ."""
    size = group.size()
    lengths = torch.empty(size, dtype=torch.int64)
    dist.all_gather_into_tensor(lengths, torch.tensor([len(values)]), group=group)
    longest = int(lengths.max())
    padded = torch.zeros(longest, dtype=torch.int64)
    padded[: len(values)] = torch.from_numpy(values.astype(np.int64, copy=False))
    gathered = torch.empty(size * longest, dtype=torch.int64)
    dist.all_gather_into_tensor(gathered, padded, group=group)
    return [row[:length] for row, length in zip(gathered.numpy().reshape(size, -1), lengths.tolist(), strict=True)]


def gather_texts(text: str, group: dist.ProcessGroup) -> list[str]:
    """All ranks' texts, in the order of their ranks."""
    gathered = gather_integers(np.frombuffer(text.encode(), dtype=np.uint8), group)
    return [values.astype(np.uint8).tobytes().decode() for values in gathered]


def broadcast_bytes(payload: bytes | None, source: int, group: dist.ProcessGroup) -> bytes:
    """The source rank's bytes on every rank of the group; the others pass None."""
    size = torch.tensor([0 if payload is None else len(payload)])
    dist.broadcast(size, src=source, group=group)
    buffer = torch.empty(int(size), dtype=torch.uint8)
    if payload is not None:
        buffer = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    dist.broadcast(buffer, src=source, group=group)
    return buffer.numpy().tobytes()


def exchange_bytes(payloads: Sequence[bytes], group: dist.ProcessGroup) -> list[bytes]:
    """Send the n-th payload to the n-th rank of the group; returns what each rank sent here, in their order."""
    sizes = torch.tensor([len(payload) for payload in payloads])
    received = torch.empty_like(sizes)
    dist.all_to_all_single(received, sizes, group=group)
    sent = torch.from_numpy(np.frombuffer(bytearray().join(payloads), dtype=np.uint8))
    buffer = torch.empty(int(received.sum()), dtype=torch.uint8)
    dist.all_to_all_single(buffer, sent, received.tolist(), sizes.tolist(), group=group)
    return [part.numpy().tobytes() for part in buffer.split(received.tolist())]


def sum_floats(values: list[float], group: dist.ProcessGroup) -> list[float]:
    """Element-wise sum over the group, in fp64."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=group)
    return total.tolist()
