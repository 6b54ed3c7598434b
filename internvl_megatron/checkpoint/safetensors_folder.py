"""A folder of safetensors files as one set of named tensors: checked as a whole, read one tensor at a time.

Files are mapped, not read into memory: what a tensor costs is the pages that are looked at, which the system may drop
again. Only safetensors are read; a pickled checkpoint can run code and is refused.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from internvl_megatron.errors import CheckpointError

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Number formats weights may have: their names in safetensors and in torch."""

INDEX_END = ".safetensors.index.json"
_LISTED = 8


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of one tensor."""

    path: Path
    dtype: str
    """In safetensors' spelling, like "BF16"."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SafetensorsFolder(Mapping[str, TensorInfo]):
    """Names to headers of all tensors; `read` gives their values."""

    folder: Path
    paths: tuple[Path, ...]
    _opened: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path) -> "SafetensorsFolder":
        """Find the files, by their index or as the only one, and check that they are whole.

        Raises:
            CheckpointError: there are none, some are missing or damaged, or index and files disagree.
        """
        indexes, files = sorted(folder.glob(f"*{INDEX_END}")), sorted(folder.glob("*.safetensors"))
        if len(indexes) > 1:
            raise CheckpointError(f"{folder}: has {len(indexes)} indexes ({_some(p.name for p in indexes)}); keep one")
        if not indexes:
            if len(files) != 1:
                raise CheckpointError(f"{folder}: {_what_is_there(folder, files)}")
            opened = cls(folder, tuple(files))
            opened.headers  # noqa: B018 - reads and checks the header
            return opened
        placed = _weight_map(indexes[0])
        paths = tuple(folder / name for name in sorted(set(placed.values())))
        missing = [path.name for path in paths if not os.path.isfile(path)]  # noqa: PTH113 - takes names no file can have
        if missing:
            raise CheckpointError(
                f"{indexes[0]}: names {len(missing)} files that are not there ({_some(missing)}); fetch them again"
            )
        opened = cls(folder, paths)
        opened._check_index(indexes[0], placed)
        return opened

    @cached_property
    def headers(self) -> dict[str, TensorInfo]:
        """All tensors by name."""
        found: dict[str, TensorInfo] = {}
        for path in self.paths:
            opened = self._open(path)
            for name in opened.keys():  # noqa: SIM118 - it is no dictionary
                if name in found:
                    raise CheckpointError(f"{path}: holds {name}, which {found[name].path.name} holds too")
                header = opened.get_slice(name)
                found[name] = TensorInfo(path, str(header.get_dtype()), tuple(header.get_shape()))
        return found

    def read(self, name: str) -> Any:
        """Values of one tensor: a torch tensor over the mapped file, not to be changed."""
        info = self.headers[name]
        return self._open(info.path).get_tensor(name)

    def close(self) -> None:
        """Unmap the files."""
        self._opened.clear()

    def _open(self, path: Path) -> Any:
        if path not in self._opened:
            from safetensors import SafetensorError, safe_open

            try:
                self._opened[path] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise CheckpointError(
                    f"{path}: not a whole safetensors file ({error}); fetch or convert it again"
                ) from error
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
        return self._opened[path]

    def _check_index(self, index: Path, placed: dict[str, str]) -> None:
        here = {name: info.path.name for name, info in self.headers.items()}
        wrong = sorted(name for name in placed.keys() | here.keys() if placed.get(name) != here.get(name))
        if wrong:
            raise CheckpointError(
                f"{index}: does not agree with the files about {len(wrong)} tensors ({_some(wrong)}): they are missing "
                "in the file it names, or in the index. Shards of different checkpoints have been mixed; fetch them again."
            )

    def __getitem__(self, name: str) -> TensorInfo:
        """Header of one tensor."""
        return self.headers[name]

    def __iter__(self) -> Iterator[str]:
        """All names."""
        return iter(self.headers)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self.headers)


def write_index(path: Path, files: Mapping[str, str], total_bytes: int) -> None:
    """Write the index of a sharded checkpoint: tensor names to file names."""
    content = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(files.items()))}
    path.write_text(json.dumps(content, indent=2) + "\n")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        placed = json.loads(index.read_text())["weight_map"]
        names = {str(name): str(file) for name, file in placed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not an index with a weight_map ({error!r}); fetch it again") from error
    outside = sorted({file for file in names.values() if Path(file).name != file or not file.endswith(".safetensors")})
    if outside or not names:
        raise CheckpointError(
            f"{index}: weight_map must name safetensors files beside it, not {_some(outside) or 'none'}"
        )
    return names


def _what_is_there(folder: Path, files: list[Path]) -> str:
    """Why a folder without index cannot be read."""
    if len(files) > 1:
        return f"has {len(files)} safetensors files and no {INDEX_END.lstrip('.')}; fetch the index too"
    if not folder.is_dir():
        return "no such folder"
    pickles = sorted(path.name for end in ("bin", "pt", "pth") for path in folder.glob(f"*.{end}"))
    if pickles:
        return (
            f"has no safetensors, only pickled weights ({_some(pickles)}), which can run code and are not read; use the "
            "model's safetensors, or save it as such with transformers first"
        )
    return "has no safetensors file"


def _some(names: Iterable[str]) -> str:
    """The first few of many names."""
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
