"""A process that decodes images for the trainer: images in over a socket, tiles out in shared memory.

Started by `decode_pool.py` as `python -m internvl_megatron.data.decode_worker SOCKET TILE_PIXELS USE_THUMBNAIL`. It imports
NumPy and Pillow, nothing of the trainer, and ends when the other side of the socket is gone.
"""

import json
import math
import os
import signal
import socket
import sys
from mmap import MAP_POPULATE, MAP_SHARED, mmap

import numpy as np

from internvl_megatron.data.files import FileError
from internvl_megatron.data.images import ImageRef, decode_tiles
from internvl_megatron.errors import ConfigError

MAX_MESSAGE_BYTES = 65536
"""A longer message would be cut by the socket."""
MAX_ERROR_CHARACTERS = 4096


READY = b"ready"
"""The first message of a process."""


def serve(connection: socket.socket, tile_pixels: int, use_thumbnail: bool) -> None:
    """Answer requests, one at a time, until there are no more.

    Messages are JSON. A request is [fields of an `ImageRef`, number of a buffer, its bytes], with the buffer's file descriptor when
    it comes for the first time. The tiles are put into the buffer. The answer is null, or `{"error": text, "fault": ...}`, the
    fault that of a `FileError` or null where a program is missing that reads such files.
    """
    buffers: dict[int, mmap] = {}
    connection.send(READY)
    while True:
        request, descriptors, _, _ = socket.recv_fds(connection, MAX_MESSAGE_BYTES, 1)
        if not request:
            return
        fields, number, size = json.loads(request)
        image = ImageRef.from_fields(fields)
        if descriptors:
            buffers[number] = mmap(descriptors[0], size, flags=MAP_SHARED | MAP_POPULATE)
            os.close(descriptors[0])
        shape = (image.num_tiles, 3, tile_pixels, tile_pixels)
        tiles = np.frombuffer(buffers[number], dtype=np.uint8, count=math.prod(shape)).reshape(shape)
        try:
            decode_tiles(image, tile_pixels, use_thumbnail, tiles)
        except (FileError, ConfigError) as error:
            fault = error.fault if isinstance(error, FileError) else None
            connection.send(json.dumps({"error": str(error)[:MAX_ERROR_CHARACTERS], "fault": fault}).encode())
        else:
            connection.send(b"null")


def main() -> None:
    """Serve until the parent is gone; signals are for the parent to act on."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    descriptor, tile_pixels, use_thumbnail = map(int, sys.argv[1:])
    with socket.socket(fileno=descriptor) as connection:
        serve(connection, tile_pixels, bool(use_thumbnail))


if __name__ == "__main__":
    main()
