"""Writes a rank's part of a checkpoint in two halves: a copy on the host, which training waits for, and its files, which it does not.

Plan and format are those of Megatron Core and torch's distributed checkpoints. What torch's own writer does between all
ranks is left to `saver.py`, which lets no rank wait for another one's disk.
"""

import io
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from internvl_megatron.checkpoint.file_sums import FileSum, FileSums, sum_of_file, write_file
from internvl_megatron.device import copy_to_host

CONTENTS_FILES = (".metadata", "metadata.json")
"""torch's table of contents, and Megatron Core's note on the format."""

Place = tuple[str, tuple[int, ...]]
"""Name of a tensor and where a shard of it begins."""


@dataclass(frozen=True)
class Staged:
    """What a rank has to write: nothing of it changes while training goes on."""

    plan: SavePlan
    data: Mapping[MetadataIndex, Tensor | io.BytesIO]
    files: Mapping[str, bytes]
    """Other files, by path in the checkpoint."""
    num_bytes: int
    """Of all tensors."""


@dataclass(frozen=True)
class Written:
    """What a rank has written."""

    plan: SavePlan
    results: list[WriteResult]
    sums: FileSums


class HostCopies:
    """Copies of a rank's shards in host memory, at the same place in every save.

    They take as many bytes as the rank writes, and stay: memory that is got anew is slower than the copy itself.
    """

    def __init__(self) -> None:
        self._tensors: dict[Place, Tensor] = {}

    def stage(
        self, state: ShardedStateDict, files: Mapping[str, bytes], own_prefixes: tuple[str, ...], check: bool
    ) -> Staged:
        """Copy what this rank writes; when this returns the state may change. Collective if `check` is set.

        Args:
            state: description of this rank's part of the state, as Megatron Core makes it; it is used up.
            files: other files to write, by path in the checkpoint.
            own_prefixes: names of tensors that begin so are copies already, which nobody changes.
            check: compare what all ranks describe: every value must be written once.
        """
        planner = MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(_torch_state(state, check))
        plan = planner.create_local_plan()
        data = {item.index: planner.resolve_data(item) for item in plan.items}
        tensors = {index: value.detach() for index, value in data.items() if isinstance(value, Tensor)}
        changing = {
            (index.fqn, tuple(index.offset or ())): index
            for index in tensors
            if not any(index.fqn.startswith(prefix) for prefix in own_prefixes)
        }
        sources = [tensors[index] for index in changing.values()]
        copies = copy_to_host(sources, [self._tensors.get(place) for place in changing])
        self._tensors = dict(zip(changing, copies, strict=True))
        data |= dict(zip(changing.values(), copies, strict=True))
        return Staged(plan, data, files, sum(tensor.nbytes for tensor in tensors.values()))


def write_shards(folder: Path, rank: int, staged: Staged) -> Written:
    """Write a rank's files of a checkpoint, on the disk when this returns; talks to no other rank.

    Raises:
        OSError: the disk is full, read-only or gone.
    """
    files = _SummedFiles(folder)
    for name, content in staged.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        files.sums[name] = write_file(path, content)
    writer = _writer(folder, files)
    # "Without collectives" names files after the rank instead of asking all ranks; the table of contents is made as always.
    writer.set_up_storage_writer(is_coordinator=False, rank=rank, use_collectives=False)
    plan = writer.prepare_local_plan(staged.plan)
    try:
        results = writer.write_data(plan, cast(SavePlanner, _StagedPlanner(staged))).wait()
    except Exception as error:
        # torch's zip writer, which is not Python, replaces what the disk said.
        raise files.error or error from error
    return Written(staged.plan, results, files.sums)


def write_contents(folder: Path, written: Sequence[Written]) -> FileSums:
    """Write the table of contents of what all ranks have written, by rank; returns the sums of all files."""
    planner = MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    _, metadata = planner.create_global_plan([part.plan for part in written])
    writer = _writer(folder, _SummedFiles(folder))
    writer.set_up_storage_writer(is_coordinator=True)
    writer.finish(metadata, [part.results for part in written])
    strategy = TorchDistSaveShardedStrategy()
    save_config(CheckpointingConfig(strategy.backend, strategy.version), str(folder))
    sums = {name: entry for part in written for name, entry in part.sums.items()}
    return sums | {name: sum_of_file(folder / name) for name in CONTENTS_FILES}


@dataclass(frozen=True)
class _StagedPlanner:
    """The half of a planner that torch's writer asks while it writes."""

    staged: Staged

    def resolve_data(self, item: WriteItem) -> Tensor | io.BytesIO:
        return self.staged.data[item.index]


class _SummedFiles(FileSystem):
    """torch's file system, which sums up what goes through it."""

    def __init__(self, folder: Path) -> None:
        self.sums: FileSums = {}
        self.error: OSError | None = None
        self._folder = folder

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as file:
            if mode != "wb":
                yield file
                return
            stream = _SummedStream(cast(io.BufferedWriter, file))
            try:
                yield stream
            finally:
                self.error = self.error or stream.error
            self.sums[Path(path).relative_to(self._folder).as_posix()] = FileSum(stream.tell(), stream.crc)


class _SummedStream(io.RawIOBase):
    """A file that is written from its beginning to its end, and the CRC-32 of it so far."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self.crc = 0
        self.error: OSError | None = None
        self._file = file

    def write(self, data: Any) -> int:
        try:
            num_bytes = self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.crc = zlib.crc32(data, self.crc)
        return num_bytes

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self._file.tell()

    def fileno(self) -> int:
        return self._file.fileno()


def _writer(folder: Path, files: _SummedFiles) -> FileSystemWriter:
    # Nothing is copied ahead: it is on the host already.
    writer = FileSystemWriter(folder, sync_files=True, per_thread_copy_ahead=0)
    writer.fs = files
    return writer


def _torch_state(state: ShardedStateDict, check: bool) -> dict[str, Any]:
    """This rank's shards as torch's planner takes them, each value on one rank."""
    preprocessed, common = save_preprocess(state, check)
    sharded = cast(dict[str, Any], preprocessed)
    sharded["common_state"] = ShardedObject(
        key="common_state", data=common, global_shape=(1,), global_offset=(0,), replica_id=dist.get_rank()
    )
    renamed, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    return mcore_to_pyt_state_dict(renamed, is_loading=False)
