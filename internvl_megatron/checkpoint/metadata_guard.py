"""Refuses checkpoints that would run code.

torch's distributed checkpoints keep their table of contents in a pickle, which torch reads without restrictions. Before
torch sees it, it is read here by an unpickler that knows only the plain data classes such a table consists of. Objects
that are not tensors are pickles inside the data files; while they are loaded, torch is held to its own plain-data reader.
"""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from internvl_megatron.checkpoint import folders
from internvl_megatron.errors import CheckpointError

ALLOWED_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath"},
    "collections": {"OrderedDict", "defaultdict"},
    "builtins": {"set", "frozenset", "list", "dict", "tuple", "int"},
}
METADATA_FILE = ".metadata"
_FORCE_PLAIN = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if is_plain(module, name):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


_DTYPES = ("float32", "float64", "float16", "bfloat16", "int8", "uint8", "int16", "int32", "int64", "bool", "strided")


def is_plain(module: str, name: str) -> bool:
    """Whether an object of this class is plain data of a table of contents."""
    return (module == "torch" and name in _DTYPES) or name in ALLOWED_CLASSES.get(module, ())


@contextmanager
def plain_data_only() -> Iterator[None]:
    """Inside the block `torch.load` reads plain data only, even where torch's checkpoint reader asks for more."""
    before = os.environ.get(_FORCE_PLAIN)
    os.environ[_FORCE_PLAIN] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCE_PLAIN]
        else:
            os.environ[_FORCE_PLAIN] = before


def check_metadata(folder: Path) -> None:
    """Raise unless the table of contents of a checkpoint is plain data.

    Raises:
        CheckpointError: the file is missing, damaged, or names something that is not plain data, or files outside the folder.
    """
    path = folder / METADATA_FILE
    try:
        with path.open("rb") as file:
            metadata = _PlainUnpickler(file).load()
        for place in (metadata.storage_data or {}).values():
            folders.file_in(folder, place.relative_path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; the checkpoint is incomplete, use an older one") from None
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path}: not readable as plain data ({error}); do not use this checkpoint") from error
