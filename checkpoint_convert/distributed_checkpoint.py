"""Read a run's checkpoint parameter by parameter, without ranks: torch's own reader, one whole tensor at a time.

Megatron Core stacks the same parameter of all layers of the language model: our `decoder.layers.3.x` is slice 3 of
`decoder.layers.x`. The vision side's layers have names of their own, as ours.
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
            self._places = {
                name: (key, layer)
                for key, entry in self._entries.items()
                for name, layer in _parameters_of(key, entry.size)
            }
        except Exception as error:  # see `read`
            raise CheckpointError(
                f"{folder}: its table of contents cannot be used ({error!r}); use an older checkpoint"
            ) from error

    @property
    def names(self) -> list[str]:
        """Our names of all parameters."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape over all ranks."""
        key, layer = self._places[name]
        size = self._entries[key].size
        return tuple(size if layer is None else size[1:])

    def dtype(self, name: str) -> torch.dtype:
        """Number format."""
        return self._entries[self._places[name][0]].properties.dtype

    def read(self, name: str) -> Tensor:
        """A whole parameter, assembled from the parts the ranks wrote.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        key, layer = self._places[name]
        try:
            entry, shape = self._entries[key], self.shape(name)
            box = ChunkStorageMetadata(
                offsets=torch.Size([0] * len(shape) if layer is None else [layer, *[0] * len(shape)]),
                sizes=torch.Size(shape if layer is None else [1, *shape]),
            )
            target = torch.empty(box.sizes, dtype=entry.properties.dtype)
            planner = _OneTensor(target)
            with plain_data_only():
                items = create_read_items_for_chunk_list(key, entry, [box])
                self._reader.read_data(LoadPlan(items), planner).wait()
        except Exception as error:  # where a table of contents is damaged torch raises anything
            raise CheckpointError(
                f"{self.folder}: {name} cannot be read ({error}); the checkpoint is damaged, use an older one"
            ) from error
        if planner.num_values != target.numel():
            raise CheckpointError(
                f"{self.folder}: {planner.num_values} of {target.numel()} values of {name} are there; the checkpoint is "
                "incomplete, use an older one"
            )
        return target if layer is None else target[0]


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


def _parameters_of(key: str, size: torch.Size) -> list[tuple[str, int | None]]:
    """Names of the parameters stored under a key, and the layer each is in it, where layers are stacked."""
    if ".layers." not in key or _LAYER.search(key):
        return [(key, None)]
    return [(key.replace(".layers.", f".layers.{layer}."), layer) for layer in range(size[0])]
