"""Files that records name: where they may lie, how they or parts of them are opened, and what happens when a read gets stuck.

Local paths are opened by the operating system, URLs by `object_store.py`. Names come from data files and are not trusted.
"""

import hashlib
import os
import re
import secrets
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, BytesIO, RawIOBase
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from internvl_megatron.errors import ConfigError, DataError
from internvl_megatron.object_store import file_system, in_store, is_url

if TYPE_CHECKING:
    from collections.abc import Buffer

FileFault = Literal["path", "missing", "unreadable", "timeout", "image", "pixels", "video"]
"""What is wrong with a file: its name leads outside its root; it is not there; it cannot be opened or is no file; reading it
takes too long; it is no image, or a broken one; it has too many pixels; it is no video, or a broken one."""


class FileError(DataError):
    """A file of a record cannot be used. The message names the file and the way out."""

    def __init__(self, fault: FileFault, message: str) -> None:
        """`fault` says what is wrong, for counters."""
        super().__init__(message)
        self.fault: FileFault = fault


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a file that is a file of its own, as members of a tar are."""

    offset: int
    """Byte it begins at."""
    size: int
    """Bytes."""
    name: str
    """What messages call it."""


def file_name(path: str, span: Span | None) -> str:
    """What messages call a file or a part of one."""
    return path if span is None else f"{path}:{span.name}"


def locate(root: str | Path, name: str, allow_outside_root: bool) -> str:
    """Path or URL of the file that a record calls `name`.

    Args:
        root: folder, or URL of one, that names are relative to.
        name: as the record has it: relative, absolute or a URL.
        allow_outside_root: take absolute names, URLs, `..` and symbolic links wherever they lead.

    Raises:
        FileError: 'path': the name leads outside the root, or cannot be a path at all.
    """
    base = str(root)
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise FileError("path", f"{name!r} is not text: half a surrogate pair; mend the escape") from error
    if "\0" in name:
        raise FileError("path", f"{name!r} has a zero byte, which no path has; correct the record")
    path = _join(base, name)
    if not allow_outside_root and not _is_inside(path, base):
        raise FileError(
            "path",
            f"{name!r} leads outside the data set's root {base}; correct it, set 'root' to the folder that holds both, or "
            "set data.allow_outside_root=true if whoever wrote the data may read every file you can",
        )
    return path


def _join(root: str, name: str) -> str:
    """`name` as it would be found from `root`."""
    if is_url(name):
        return name
    if is_url(root):
        return name if name.startswith("/") else f"{root.rstrip('/')}/{name}"
    return str(Path(root) / name) + ("/" if name.endswith("/") else "")  # a slash marks a folder of frames


def _is_inside(path: str, root: str) -> bool:
    """Whether a path is below a root, `..` and, if local, symbolic links followed."""
    if is_url(root) or is_url(path):
        parts = re.split(r"[/\\]|%2f|%5c", path, flags=re.IGNORECASE)
        # Servers and stores differ in what they do with dots: none are let through.
        dots = any(part.lower().replace("%2e", ".") == ".." for part in parts)
        prefix = root if root.endswith("/") else f"{root}/"
        return not dots and is_url(root) and path.startswith(prefix)
    real_root, real = os.path.realpath(root), os.path.realpath(path)
    return real == real_root or real.startswith(real_root.rstrip(os.sep) + os.sep)


@contextmanager
def open_file(path: str, span: Span | None = None) -> Iterator[BinaryIO]:
    """Open a file to read bytes from any place of it. Only opening is guarded: errors of the body pass.

    Args:
        path: path or URL.
        span: open this part of it as if it were the file. Of a URL it is fetched as a whole, in one request.

    Raises:
        FileError: 'missing' or 'unreadable': there is nothing, or something that is not a regular file, like a pipe or a
            folder, or the file ends before the span does.
        ConfigError: the program that reads such URLs is not installed.
    """
    try:
        if span is None:
            file = _open_url(path) if is_url(path) else _open_local(path)
        else:
            file = _fetch_span(path, span) if is_url(path) else _open_span(path, span)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileError(
            "missing", f"{path}: file not found; check the name in the record and the dataset's 'root'"
        ) from error
    except OSError as error:
        raise FileError("unreadable", f"{path}: cannot be opened ({error}); check its permissions") from error
    with file:
        yield file


def is_folder(path: str) -> bool:
    """Whether a path is that of a folder: what ends with a slash, and local folders."""
    return path.endswith("/") or (not is_url(path) and Path(path).is_dir())


def list_folder(path: str) -> list[str]:
    """Names of the files in a folder, sorted as people count: 2 before 10. Raises `FileError`."""
    try:
        if is_url(path):
            system, _ = file_system(path)
            names = [str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in system.ls(path, detail=False)]
        else:
            names = [entry.name for entry in Path(path).iterdir()]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileError(
            "missing", f"{path}: folder not found; check the name in the record and the dataset's 'root'"
        ) from error
    except OSError as error:
        raise FileError("unreadable", f"{path}: cannot be listed ({error}); check its permissions") from error
    return sorted(names, key=_natural_order)


def _natural_order(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Key that compares runs of digits as numbers."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part), "") if part.isdigit() and part.isascii() else (1, 0, part) for part in parts], name


def _open_local(path: str) -> BinaryIO:
    """A regular file. Opening a pipe would wait until somebody writes to it, and a device may act."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(f"is {'a folder' if stat.S_ISDIR(mode) else 'not a regular file'}")
    return os.fdopen(descriptor, "rb")


class _Part(RawIOBase):
    """A part of a local file. Nothing of it is read before it is asked for: of images only headers may be wanted."""

    def __init__(self, file: BinaryIO, span: Span) -> None:
        """Takes the file over, and closes it."""
        super().__init__()
        self._file = file
        self._span = span
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._span.size}[whence]
        if start + place < 0:
            raise OSError(f"there is nothing before the start of {self._span.name}")
        self._place = start + place
        return self._place

    def readinto(self, buffer: "Buffer") -> int:
        wanted = memoryview(buffer)[: max(0, self._span.size - self._place)]
        count = os.preadv(self._file.fileno(), [wanted], self._span.offset + self._place)
        self._place += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_span(path: str, span: Span) -> BinaryIO:
    """A part of a local file."""
    file = _open_local(path)
    size = os.fstat(file.fileno()).st_size
    if span.offset + span.size > size:
        file.close()
        raise _cut_off(span, size)
    return BufferedReader(_Part(file, span))


def _fetch_span(path: str, span: Span) -> BinaryIO:
    """A part of a file behind a URL, in memory."""
    content = in_store(path, lambda system, place: system.cat_file(place, span.offset, span.offset + span.size))
    if len(content) != span.size:
        raise _cut_off(span, span.offset + len(content))
    return BytesIO(content)


def _cut_off(span: Span, size: int) -> OSError:
    return OSError(
        f"it has {size} bytes, {span.name} ends at byte {span.offset + span.size}: it is cut off or another"
    )


def _open_url(path: str) -> BinaryIO:
    """A file behind a URL."""
    return in_store(path, lambda system, place: system.open(place, "rb"))


def local_copy(url: str, folder: Path) -> Path:
    """A copy of the file behind a URL in a local folder, made unless there is one of the file as it is now.

    It appears when it is whole; processes that make the same one at the same time do each other no harm.

    Raises:
        FileError: 'missing' or 'unreadable'.
        DataError: the folder cannot be written.
        ConfigError: the program that reads such URLs is not installed.
    """
    try:
        system, place = file_system(url)
        version = hashlib.blake2b(f"{url} {system.ukey(place)}".encode(), digest_size=8).hexdigest()
        target = folder / f"{version}-{place.rpartition('/')[2][:120]}"
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.writing")
        if target.is_file():
            return target
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary.touch()
        except OSError as error:
            raise DataError(
                f"{folder}: cannot hold the copy of {url} ({error.strerror}); set data.index_folder"
            ) from error
        try:
            system.get_file(place, str(temporary))
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except (DataError, ConfigError):
        raise
    except FileNotFoundError as error:
        raise FileError("missing", f"{url}: file not found; correct 'annotation' in the meta file") from error
    except Exception as error:  # every store has errors of its own
        raise FileError("unreadable", f"{url}: cannot be copied ({type(error).__name__}: {error})") from error
    return target


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is whole or not there; what no encoding has is spelled out. Raises OSError."""
    temporary = path.with_name(f".{path.name[:120]}.{secrets.token_hex(8)}.writing")
    try:
        with temporary.open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_within[T](seconds: float, path: str, read: Callable[[], T]) -> T:
    """Result of `read()`, which reads `path` in a thread of its own.

    A read that is stuck, in a file system that has gone or in a file made to take for ever, cannot be stopped from Python: its
    thread is left behind and holds up nobody. Otherwise the thread serves the next read.

    Raises:
        FileError: 'timeout': it took longer than `seconds`. What `read` raises passes.
    """
    try:
        reader = _idle_readers.pop()
    except IndexError:
        reader = _Reader()
    answer: Future[T] = Future()
    reader.tasks.put((read, answer))
    try:
        return answer.result(seconds)
    except TimeoutError as error:
        if answer.done():  # just in time, or the error is the read's own
            return answer.result()
        reader.tasks.put(None)
        reader = None
        raise FileError(
            "timeout",
            f"{path}: was not read within {seconds:g} seconds; look after the file system, raise "
            "data.read_timeout_seconds or drop the record",
        ) from error
    finally:
        if reader is not None:
            _idle_readers.append(reader)


class _Reader:
    """A thread that reads what it is told to, one at a time, until it is told nothing."""

    def __init__(self) -> None:
        self.tasks: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        threading.Thread(target=self._run, name="read", daemon=True).start()

    def _run(self) -> None:
        while (task := self.tasks.get()) is not None:
            read, answer = task
            try:
                answer.set_result(read())
            except BaseException as error:  # for the caller, whatever it is
                answer.set_exception(error)
            del read, answer, task  # which may hold an image


_idle_readers: list[_Reader] = []
"""Threads that have nothing to do; as many as there ever were reads at once."""
os.register_at_fork(after_in_child=_idle_readers.clear)  # threads stay behind
