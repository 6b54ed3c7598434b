"""Read a run's checkpoint parameter by parameter, without ranks: torch's own reader, one whole tensor at a time.

Megatron Core stacks the same parameter of all layers: our `decoder.layers.3.x` is slice 3 of `decoder.layers.x`.
"""

import re
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from internvl_megatron.checkpoint.metadata_guard import check_metadata, plain_data_only
from internvl_megatron.errors import CheckpointError

_LAYER = re.compile(r"\.layers\.(\d+)\.")


class DistributedCheckpoint:
    """Names, shapes and values of the model's parameters in a checkpoint."""

    def __init__(self, folder: Path) -> None:
        """Read the table of contents.

        Raises:
            CheckpointError: it is missing or damaged, or would run code.
        """
        check_metadata(folder)
        self.folder = folder
        self._reader = FileSystemReader(folder)
        try:
            self._metadata: Metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
            self._entries = {
                key: entry
                for key, entry in self._metadata.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata) and key.startswith(("vision.", "language."))
            }
        except (OSError, AttributeError, AssertionError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder}: its table of contents cannot be used ({error!r}); use an older checkpoint"
            ) from error

    @property
    def names(self) -> list[str]:
        """Our names of all parameters."""
        return [name for key, entry in self._entries.items() for name in _unstacked(key, entry.size)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape over all ranks."""
        entry, layer = self._find(name)
        return tuple(entry.size if layer is None else entry.size[1:])

    def dtype(self, name: str) -> torch.dtype:
        """Number format."""
        return self._find(name)[0].properties.dtype

    def read(self, name: str) -> Tensor:
        """A whole parameter, assembled from the parts the ranks wrote.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        entry, layer = self._find(name)
        shape = self.shape(name)
        box = ChunkStorageMetadata(
            offsets=torch.Size([0] * len(shape) if layer is None else [layer, *[0] * len(shape)]),
            sizes=torch.Size(shape if layer is None else [1, *shape]),
        )
        target = torch.empty(box.sizes, dtype=entry.properties.dtype)
        items = create_read_items_for_chunk_list(_stacked_key(name)[0], entry, [box])
        planner = _OneTensor(target)
        try:
            with plain_data_only():
                self._reader.read_data(LoadPlan(items), planner).wait()
        except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
            raise CheckpointError(
                f"{self.folder}: {name} cannot be read ({error}); the checkpoint is damaged, use an older one"
            ) from error
        if planner.num_values != target.numel():
            raise CheckpointError(
                f"{self.folder}: {planner.num_values} of {target.numel()} values of {name} are there; the checkpoint is "
                "incomplete, use an older one"
            )
        return target if layer is None else target[0]

    def _find(self, name: str) -> tuple[TensorStorageMetadata, int | None]:
        key, layer = _stacked_key(name)
        return self._entries[key], layer


class _OneTensor(DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target
        self.num_values = 0

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of the target that a stored part fills."""
        part = self.target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Count what has been filled."""
        del read_item
        self.num_values += tensor.numel()


def _stacked_key(name: str) -> tuple[str, int | None]:
    """Key in the checkpoint, and the layer's place in it."""
    found = _LAYER.search(name)
    return (name, None) if found is None else (_LAYER.sub(".layers.", name), int(found[1]))


def _unstacked(key: str, size: torch.Size) -> list[str]:
    if ".layers." not in key:
        return [key]
    return [key.replace(".layers.", f".layers.{layer}.") for layer in range(size[0])]
