"""Write a safetensors file tensor by tensor, without ever holding more than one.

The safetensors library writes a file from all of its tensors at once. The format lets a file be written front to back:
8 bytes with the header's length, the header (JSON: names, formats, shapes, places), then the values.
"""

import json
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from internvl_megatron.checkpoint.safetensors_folder import DTYPES

TORCH_DTYPES = {getattr(torch, name): short for short, name in DTYPES.items()}
PIECE_BYTES = 16 * 2**20
FLUSH_BYTES = 256 * 2**20
"""How much may wait in the page cache before the disk is asked to start: so writing and flushing overlap."""


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor before it is there."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def header(specs: Iterable[TensorSpec]) -> bytes:
    """Everything before the values; the values start at a multiple of 8 bytes."""
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        start, end = end, end + spec.num_bytes
        described[spec.name] = {
            "dtype": TORCH_DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_bytes(specs: list[TensorSpec]) -> int:
    """Size of a file of these tensors."""
    return len(header(specs)) + sum(spec.num_bytes for spec in specs)


def write(
    path: Path,
    specs: list[TensorSpec],
    tensors: Iterable[Tensor],
    written: Callable[[int], object],
) -> None:
    """Write a file and wait until it is on the disk.

    Args:
        path: of the file.
        specs: its tensors, in order.
        tensors: their values, made when they are asked for.
        written: called with the number of bytes after every piece.
    """
    with path.open("wb", buffering=0) as file, _Flusher(file.fileno()) as flusher:
        _write_all(file.fileno(), memoryview(header(specs)))
        for spec, tensor in zip(specs, tensors, strict=True):
            found = (tensor.dtype, tuple(tensor.shape))
            assert found == (spec.dtype, spec.shape), f"{spec.name} is {found}, announced as {spec}"
            values = memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
            del tensor
            for start in range(0, len(values), PIECE_BYTES):
                piece = values[start : start + PIECE_BYTES]
                _write_all(file.fileno(), piece)
                written(len(piece))
                flusher.add(len(piece))
            del values
        flusher.finish()


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


class _Flusher:
    """Sends what has been written to the disk while more is being made."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._waiting_bytes = 0
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    def add(self, num_bytes: int) -> None:
        """Note that so much has been written."""
        self._waiting_bytes += num_bytes
        busy = self._thread is not None and self._thread.is_alive()
        if self._waiting_bytes >= FLUSH_BYTES and not busy:
            self._waiting_bytes = 0
            self._thread = threading.Thread(target=self._flush, daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Wait until everything is on the disk.

        Raises:
            OSError: something could not be written, now or earlier; the system reports it only once.
        """
        self._wait()
        os.fsync(self._descriptor)
        if self._error is not None:
            raise self._error

    def _flush(self) -> None:
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            self._error = error

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> "_Flusher":
        return self

    def __exit__(self, *_: object) -> None:
        self._wait()
