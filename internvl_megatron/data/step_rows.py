"""The rows of one step together with their images, decoded by the ranks of a replica, each image by one of them."""

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from internvl_megatron.data.decode_pool import DecodePool
from internvl_megatron.data.files import read_within
from internvl_megatron.data.images import ImageRef, decode_tiles
from internvl_megatron.data.records import SampleSettings
from internvl_megatron.data.rows import Row
from internvl_megatron.errors import DataError

log = logging.getLogger(__name__)

ImageKey = tuple[int, int]
"""(index of the row in the step, index of the image in the row)."""


@dataclass(frozen=True)
class DecodedTiles:
    """What one rank has decoded for a step."""

    tiles: dict[ImageKey, np.ndarray]
    """uint8 [tiles of the image, 3, tile_pixels, tile_pixels] of each image this rank owns and could decode."""
    failed: dict[ImageKey, str] = field(default_factory=dict)
    """Message of each image this rank owns and could not decode."""


def assign_images(rows: Sequence[Row], replica_size: int) -> list[list[int]]:
    """Which rank of the replica decodes each image: [row][image] -> rank.

    The image with most tiles goes first, each to the rank with fewest tiles so far (on a tie the lower rank). A pure
    function, so all ranks come to the same answer without asking each other.
    """
    keys = [(row, image) for row in range(len(rows)) for image in range(len(rows[row].images))]
    keys.sort(key=lambda key: (-rows[key[0]].images[key[1]].num_tiles, key))
    owners = [[0] * len(row.images) for row in rows]
    tiles_of_rank = [0] * replica_size
    for row, image in keys:
        rank = tiles_of_rank.index(min(tiles_of_rank))
        owners[row][image] = rank
        tiles_of_rank[rank] += rows[row].images[image].num_tiles
    return owners


class StepRows:
    """Rows of one step of one replica, the same on all its ranks, and the tiles this rank decodes.

    Attributes:
        rows: by ascending slot.
        slots: place of each row in the global batch, from 0, whatever replica trains on it: row k comes from stream k.
        image_owner: rank of the replica that decodes an image: [row][image] -> rank.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        slots: Sequence[int],
        settings: SampleSettings,
        rank_in_replica: int,
        replica_size: int,
        workers: DecodePool | None = None,
    ) -> None:
        """Start decoding this rank's images in `workers`; None = when `tiles` is called."""
        self.rows = list(rows)
        self.slots = list(slots)
        self.image_owner = assign_images(rows, replica_size)
        self._settings = settings
        self._mine = [
            (row, image)
            for row, owners in enumerate(self.image_owner)
            for image, owner in enumerate(owners)
            if owner == rank_in_replica
        ]
        self._futures: dict[ImageKey, Future[np.ndarray]] = {}
        if workers is not None:
            self._futures = {key: workers.submit(self._image(key)) for key in self._mine}
        self._decoded: DecodedTiles | None = None

    def tiles(self) -> DecodedTiles:
        """This rank's tiles; waits until they are decoded. Later calls give the same object.

        Raises:
            DataError: an image cannot be decoded and the policy for bad samples is to stop.
        """
        if self._decoded is None:
            decoded = DecodedTiles({})
            for key in self._mine:
                try:
                    decoded.tiles[key] = self._result(key)
                except DataError as error:
                    if self._settings.data.on_bad_sample == "stop":
                        raise
                    decoded.failed[key] = str(error)
                    log.warning("left out: %s", error)
            self._futures.clear()
            self._decoded = decoded
        return self._decoded

    def cancel(self) -> None:
        """Give up images whose decoding has not begun."""
        for future in self._futures.values():
            future.cancel()

    def _image(self, key: ImageKey) -> ImageRef:
        return self.rows[key[0]].images[key[1]]

    def _decode(self, image: ImageRef) -> np.ndarray:
        data, tile_pixels = self._settings.data, self._settings.tile_pixels
        name = f"{image.where}: {image.path}" if image.where else image.path
        return read_within(
            data.read_timeout_seconds, name, lambda: decode_tiles(image, tile_pixels, data.use_thumbnail)
        )

    def _result(self, key: ImageKey) -> np.ndarray:
        return self._futures[key].result() if key in self._futures else self._decode(self._image(key))
