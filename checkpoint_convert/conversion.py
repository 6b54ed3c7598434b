"""Write a converted checkpoint: file by file, resumable, shared by several processes, visible only when it is whole.

Everything goes into `TARGET.partial`, with a file that says which conversion it is. A file of tensors is written under another name and renamed when it is on the disk;
the folder is renamed to `TARGET` at the end. Processes that run the same conversion share it: each takes the next file
nobody has locked (the locks end with their process, however it ends), and the last one finishes the folder.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from checkpoint_convert.safetensors_writer import TensorSpec, file_bytes, header, write
from internvl_megatron.checkpoint.safetensors_folder import write_index
from internvl_megatron.errors import CheckpointError

JOB_FILE = "conversion.json"
LOCK_END = ".lock"
PARTIAL_END = ".partial"

SPARE_BYTES = 64 * 2**20
"""For everything that is not tensors."""

_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Group:
    """Tensors that are made together, of one parameter."""

    specs: tuple[TensorSpec, ...]
    make: Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Shard:
    """One file of the target."""

    name: str
    groups: tuple[Group, ...]

    @cached_property
    def specs(self) -> list[TensorSpec]:
        """Its tensors, in order."""
        return [spec for group in self.groups for spec in group.specs]

    @cached_property
    def num_bytes(self) -> int:
        """Size of the file."""
        return file_bytes(self.specs)

    def tensors(self) -> Iterator[Tensor]:
        """Values of its tensors, one group at a time."""
        for group in self.groups:
            made = group.make()
            while made:
                yield made.pop(0)


@dataclass(frozen=True)
class Conversion:
    """What is to be written."""

    target: Path
    shards: tuple[Shard, ...]
    index_name: str | None
    """Name of the index; None = one file without an index."""
    fingerprint: str
    """Of the source and of all that decides the target's content."""
    prepare: Callable[[Path], None]
    """Writes everything but tensors and index into a folder; comes first, so that it cannot fail after hours."""
    source_is_unchanged: Callable[[], bool]
    """Asked before the target gets its name."""

    @property
    def partial(self) -> Path:
        """Where it is written."""
        return self.target.with_name(f"{self.target.name}{PARTIAL_END}")

    @property
    def num_bytes(self) -> int:
        """Size of all files of tensors."""
        return sum(shard.num_bytes for shard in self.shards)

    @cached_property
    def identity(self) -> str:
        """Two conversions with the same identity write the same bytes."""
        digest = hashlib.sha256(self.fingerprint.encode())
        for shard in self.shards:
            digest.update(shard.name.encode())
            digest.update(header(shard.specs))
        return digest.hexdigest()


@dataclass(frozen=True)
class Written:
    """What one process did for a conversion."""

    num_bytes: int
    seconds: float
    num_files: int
    total_files: int


def make_shards(groups: list[Group], stem: str, file_bytes_limit: int, always_numbered: bool) -> tuple[Shard, ...]:
    """Distribute groups over files, in order, none larger than the limit unless one group is.

    One file alone is called `STEM.safetensors` unless files are always numbered.
    """
    parts: list[list[Group]] = []
    used = 0
    for group in groups:
        size = sum(spec.num_bytes for spec in group.specs)
        if not parts or used + size > file_bytes_limit:
            parts.append([])
            used = 0
        parts[-1].append(group)
        used += size
    if len(parts) == 1 and not always_numbered:
        return (Shard(f"{stem}.safetensors", tuple(parts[0])),)
    names = [f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    return tuple(Shard(name, tuple(part)) for name, part in zip(names, parts, strict=True))


def convert(conversion: Conversion) -> Written:
    """Write the target, or what other processes leave of it; returns when it is whole, at once if it is already.

    Raises:
        CheckpointError: the target is something else, a started conversion was another one, or the disk is full.
    """
    target, partial = conversion.target, conversion.partial
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        if not _is_made(conversion):
            raise CheckpointError(f"{target}: exists already; choose another name, or remove it first")
        if not _is_complete(conversion):
            raise CheckpointError(f"{target}: was made by this command, and files are missing now; remove it first")
        return Written(0, 0.0, 0, len(conversion.shards))
    try:
        return _convert(conversion)
    except OSError as error:
        if error.errno in _OUT_OF_SPACE:
            raise CheckpointError(
                f"{partial}: no space left ({error.strerror}). Finished files are kept: make room and run the same command "
                "again to continue, or remove the folder"
            ) from error
        raise CheckpointError(f"{partial}: cannot be written ({error})") from error


def _is_made(conversion: Conversion) -> bool:
    """Whether the target is what this conversion writes."""
    return _identity(conversion.target) == conversion.identity


def _is_complete(conversion: Conversion) -> bool:
    target = conversion.target
    indexed = conversion.index_name is None or (target / conversion.index_name).is_file()
    return indexed and all(_is_finished(target, shard) for shard in conversion.shards)


def _identity(folder: Path) -> str | None:
    """Identity of the conversion a folder is of."""
    try:
        return json.loads((folder / JOB_FILE).read_text())["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _convert(conversion: Conversion) -> Written:
    start, own, partial = time.perf_counter(), list[Shard](), conversion.partial
    partial.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(conversion, JOB_FILE):
            if _is_made(conversion):  # between looking for it and making the folder for it
                shutil.rmtree(partial, ignore_errors=True)
                return Written(0, 0.0, 0, len(conversion.shards))
            _begin(conversion)
        done = sum(shard.num_bytes for shard in conversion.shards if _is_finished(partial, shard))
        with tqdm(
            total=conversion.num_bytes,
            initial=done,
            unit="B",
            unit_scale=True,
            desc=conversion.target.name,
            disable=None,
        ) as progress:
            while waiting := [shard for shard in conversion.shards if not _is_finished(partial, shard)]:
                with _first_free(conversion, waiting) as shard:
                    if not _is_finished(partial, shard):
                        _write_shard(partial, shard, progress)
                        own.append(shard)
        with _locked(conversion, JOB_FILE):
            _finish(conversion)
    except OSError:
        if not _is_made(conversion):  # by another process, while this one was looking into its folder
            raise
    seconds = time.perf_counter() - start
    return Written(sum(shard.num_bytes for shard in own), seconds, len(own), len(conversion.shards))


def _begin(conversion: Conversion) -> None:
    """Start, or continue what was started: only the very same conversion, as its files are taken over unread."""
    partial, job = conversion.partial, conversion.partial / JOB_FILE
    if not job.is_file():
        if strangers := [path.name for path in partial.iterdir() if not path.name.startswith(JOB_FILE)]:
            raise CheckpointError(
                f"{partial}: holds files that no conversion has left there ({', '.join(strangers[:5])}); move them away"
            )
        _write_job(conversion, prepared=False)
    elif _identity(partial) != conversion.identity:
        raise CheckpointError(
            f"{partial}: is another conversion that was not finished (other weights, tokenizer, layout, number format or file "
            "size, or the source has changed since); remove the folder to start again"
        )
    _check_space(conversion)
    if not json.loads(job.read_text()).get("prepared"):
        _prepare(conversion)


def _prepare(conversion: Conversion) -> None:
    """Write what is not tensors; if that fails, or was interrupted, nothing of it stays."""
    partial = conversion.partial

    def clear() -> None:
        for path in partial.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif not path.name.startswith(JOB_FILE):
                path.unlink()

    clear()
    try:
        conversion.prepare(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _write_job(conversion, prepared=True)


def _write_job(conversion: Conversion, prepared: bool) -> None:
    _write_durably(
        conversion.partial / JOB_FILE, json.dumps({"identity": conversion.identity, "prepared": prepared}) + "\n"
    )


def _check_space(conversion: Conversion) -> None:
    partial = conversion.partial
    waiting = [shard for shard in conversion.shards if not _is_finished(partial, shard)]
    needed = sum(shard.num_bytes - _written_bytes(partial, shard) for shard in waiting) + SPARE_BYTES
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise CheckpointError(
            f"{conversion.target}: needs {needed / 1e9:.1f} GB and {partial.parent} has {free / 1e9:.1f} GB left; make "
            "room, or choose a target on another disk"
        )


def _written_bytes(partial: Path, shard: Shard) -> int:
    """How far another process, or an interrupted one, has come with a file."""
    try:
        return (partial / f"{shard.name}.writing").stat().st_size
    except FileNotFoundError:
        return 0


def _is_finished(partial: Path, shard: Shard) -> bool:
    """Only whole files get their name; the size says whether it is a file of this conversion's making."""
    try:
        return (partial / shard.name).stat().st_size == shard.num_bytes
    except FileNotFoundError:
        return False


def _write_shard(partial: Path, shard: Shard, progress: tqdm) -> None:
    writing = partial / f"{shard.name}.writing"
    write(writing, shard.specs, shard.tensors(), progress.update)
    writing.rename(partial / shard.name)
    _sync_folder(partial)


def _finish(conversion: Conversion) -> None:
    partial = conversion.partial
    if not conversion.source_is_unchanged():
        raise CheckpointError(
            f"{partial}: the source has changed while it was converted, so this is a mixture; remove the folder and start again"
        )
    if conversion.index_name is not None:
        files = {spec.name: shard.name for shard in conversion.shards for spec in shard.specs}
        num_bytes = sum(spec.num_bytes for shard in conversion.shards for spec in shard.specs)
        write_index(partial / conversion.index_name, files, num_bytes)
    for path in partial.rglob("*"):
        if path.is_file() and path.suffix not in (".safetensors", LOCK_END):
            _sync_file(path)
    _sync_folder(partial)
    if conversion.target.exists():
        conversion.target.rmdir()  # empty, or `convert` would have refused it
    partial.rename(conversion.target)
    # Only now: whoever waits for a lock that is gone looks for the target.
    for path in conversion.target.glob(f"*{LOCK_END}"):
        path.unlink()
    _sync_folder(conversion.target.parent)


@contextmanager
def _locked(conversion: Conversion, name: str, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a name in the partial folder; gives False if it is held elsewhere and is not to be waited for."""
    path = conversion.partial / f"{name}{LOCK_END}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        if not _is_same_file(path, descriptor):
            raise FileNotFoundError(errno.ENOENT, "the folder is gone", str(path))
        yield True
    finally:
        os.close(descriptor)


@contextmanager
def _first_free(conversion: Conversion, shards: list[Shard]) -> Iterator[Shard]:
    """Lock a shard nobody works on; if there is none, wait for the first (its process may die and leave it)."""
    for shard in shards:
        with _locked(conversion, shard.name, wait=False) as held:
            if held:
                yield shard
                return
    with _locked(conversion, shards[0].name):
        yield shards[0]


def _is_same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _write_durably(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.writing")
    temporary.write_text(text)
    _sync_file(temporary)
    temporary.rename(path)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
