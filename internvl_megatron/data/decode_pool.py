"""Processes that decode images beside the trainer, whose interpreter would otherwise be held up by them.

An image that kills its process or never ends costs that image and nothing else.
"""

import ctypes
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from mmap import MAP_SHARED, PROT_READ, PROT_WRITE
from pathlib import Path

import numpy as np

import internvl_megatron
from internvl_megatron.data.decode_worker import MAX_MESSAGE_BYTES, READY
from internvl_megatron.data.files import FileError, FileFault
from internvl_megatron.data.images import ImageRef
from internvl_megatron.errors import ConfigError

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",  # else NumPy sets memory aside for a thread per core
    "PILLOW_BLOCKS_MAX": "4",  # memory of an image that serves the next one need not be zeroed by the kernel again
}


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_longlong]
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


@dataclass(frozen=True, slots=True)
class _Buffer:
    """Memory that a process and this one have mapped."""

    number: int
    address: int
    size: int


class _Buffers:
    """The buffers of one process. What no array looks into any more serves another image: new memory must be zeroed first.

    Python's own `mmap` would hold a file descriptor for each, of which a process may have few.
    """

    def __init__(self, tile_bytes: int) -> None:
        self._tile_bytes = tile_bytes
        self._lock = threading.Lock()
        self._free: dict[int, list[_Buffer]] = {}
        """By size."""
        self._num_made = 0
        self._is_closed = False

    def take(self, num_tiles: int) -> tuple[_Buffer, int | None]:
        """A buffer for so many tiles; with its file descriptor, which the caller must close, if it is new."""
        step = max(1, (1 << num_tiles.bit_length()) // 8)  # few sizes, so that many images can use one
        size = -(-num_tiles // step) * step * self._tile_bytes
        with self._lock:
            free = self._free.get(size)
            if free:
                return free.pop(), None
            number = self._num_made = self._num_made + 1
        # Without a name: it goes when nobody has it mapped, whatever dies before.
        memory = os.memfd_create("tiles")
        try:
            os.truncate(memory, size)
            address = _libc.mmap(None, size, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0)
            if address == ctypes.c_void_p(-1).value:
                raise OSError(ctypes.get_errno(), "no memory for the tiles of an image")
        except OSError:
            os.close(memory)
            raise
        return _Buffer(number, address, size), memory

    def array(self, buffer: _Buffer, shape: Sequence[int]) -> np.ndarray:
        """uint8 array at the beginning of a buffer, which is given back with the last array that looks into it."""
        mapped = (ctypes.c_ubyte * math.prod(shape)).from_address(buffer.address)
        weakref.finalize(mapped, self.give_back, buffer).atexit = False
        return np.frombuffer(mapped, dtype=np.uint8).reshape(shape)

    def give_back(self, buffer: _Buffer) -> None:
        """Let a buffer serve another image."""
        with self._lock:
            if not self._is_closed:
                self._free.setdefault(buffer.size, []).append(buffer)
                return
        _libc.munmap(buffer.address, buffer.size)

    def close(self) -> None:
        """Give the memory back to the system: what is free now, the rest when it is given back."""
        with self._lock:
            self._is_closed = True
            free, self._free = [buffer for same in self._free.values() for buffer in same], {}
        for buffer in free:
            _libc.munmap(buffer.address, buffer.size)


class _Worker:
    """One process and the socket it answers on."""

    def __init__(self, tile_pixels: int, use_thumbnail: bool, timeout_seconds: float) -> None:
        """Start it and wait until it listens."""
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        paths = [str(Path(internvl_megatron.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        arguments = [str(theirs.fileno()), str(tile_pixels), str(int(use_thumbnail))]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "internvl_megatron.data.decode_worker", *arguments],
                pass_fds=[theirs.fileno()],
                env=os.environ | _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            )
        # Nothing foreign has been read yet: what goes wrong here is no image's fault.
        if self._connection.recv(MAX_MESSAGE_BYTES) != READY:
            raise RuntimeError(
                f"a process to decode images cannot run: {self._ending()}; set data.num_workers=0 without"
            )
        self._connection.settimeout(timeout_seconds)
        self._tile_shape = (3, tile_pixels, tile_pixels)
        self._buffers = _Buffers(math.prod(self._tile_shape))

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def decode(self, image: ImageRef) -> np.ndarray:
        """See `DecodePool.submit`. Raises ConnectionError if the process has died, TimeoutError if it does not answer."""
        buffer, memory = self._buffers.take(image.num_tiles)
        try:
            self._fill(buffer, memory, image)
        except BaseException:
            self._buffers.give_back(buffer)
            raise
        finally:
            if memory is not None:
                os.close(memory)
        return self._buffers.array(buffer, (image.num_tiles, *self._tile_shape))

    def _fill(self, buffer: _Buffer, memory: int | None, image: ImageRef) -> None:
        """Have the process put an image's tiles into a buffer."""
        request = json.dumps([image.fields(), buffer.number, buffer.size]).encode()
        try:
            socket.send_fds(self._connection, [request], [] if memory is None else [memory])
            answer = self._connection.recv(MAX_MESSAGE_BYTES)
        except ConnectionError:
            answer = b""
        if not answer:
            raise ConnectionError(self._ending())
        content = json.loads(answer)
        if content is not None:
            fault = content["fault"]
            raise ConfigError(content["error"]) if fault is None else FileError(fault, content["error"])

    def end(self) -> None:
        """Kill the process, which has nothing to save."""
        self._process.kill()
        self._process.wait()
        self._connection.close()
        self._buffers.close()

    def _ending(self) -> str:
        """How the process ended, which has closed its side."""
        status = self._process.wait()
        return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


class DecodePool:
    """Decodes images in processes of its own. One thread each waits for its answers."""

    def __init__(self, num_workers: int, tile_pixels: int, use_thumbnail: bool, timeout_seconds: float) -> None:
        """Processes start when they first have something to do.

        Args:
            num_workers: processes, at least 1.
            tile_pixels: height and width of a tile.
            use_thumbnail: whether images of several tiles get a thumbnail.
            timeout_seconds: an image that takes longer counts as broken.
        """
        self._timeout_seconds = timeout_seconds
        self._arguments = (tile_pixels, use_thumbnail, timeout_seconds)
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="decode")
        self._workers: dict[int, _Worker] = {}
        """By the thread that uses it."""

    def submit(self, image: ImageRef) -> Future[np.ndarray]:
        """Have an image decoded, after those that were submitted before.

        Returns:
            uint8 [image.num_tiles, 3, tile_pixels, tile_pixels]; raises `FileError` if the image is broken: if it cannot
            be decoded, takes longer than the time limit, or kills two processes that try.
        """
        return self._threads.submit(self._decode, image)

    def pids(self) -> list[int]:
        """Of the processes that run."""
        return [worker.pid for worker in self._workers.values()]

    def close(self) -> None:
        """Give up images whose decoding has not begun, wait for the others and end the processes."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        while self._workers:
            self._workers.popitem()[1].end()

    def _decode(self, image: ImageRef) -> np.ndarray:
        """In a thread of the pool."""
        try:
            return self._worker().decode(image)
        except ConnectionError:
            self._drop_worker()  # something else may have killed it
        except TimeoutError as error:
            self._drop_worker()
            raise _broken(image, "timeout", f"was not decoded in {self._timeout_seconds:g} seconds") from error
        try:
            return self._worker().decode(image)
        except (ConnectionError, TimeoutError) as error:
            self._drop_worker()
            raise _broken(image, image.kind, f"ends the process that decodes it: it {error}") from error

    def _worker(self) -> _Worker:
        """The process of this thread."""
        thread = threading.get_ident()
        if thread not in self._workers:
            self._workers[thread] = _Worker(*self._arguments)
        return self._workers[thread]

    def _drop_worker(self) -> None:
        self._workers.pop(threading.get_ident()).end()


def _broken(image: ImageRef, fault: FileFault, what: str) -> FileError:
    return FileError(fault, f"{image.at}{image.kind} {image.name}: {what}; replace the file or drop the record")
