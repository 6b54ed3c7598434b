"""Files behind URLs (`s3://`, `gs://`, `https://`, ...), through fsspec, which is imported only then.

Every store has errors of its own: here they are all `OSError`. Credentials and the like are fsspec's own settings (the environment,
`~/.config/fsspec`).
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from internvl_megatron.errors import ConfigError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(path: str) -> bool:
    """Whether a path is for fsspec: `scheme://...`."""
    return _URL.match(path) is not None


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the URL as it takes it.

    Raises:
        ConfigError: the program that reads such URLs is not installed.
        OSError: there is no such scheme.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise ConfigError(f"{url}: URLs need fsspec; `pip install fsspec`") from error
    try:
        return url_to_fs(url)
    except ImportError as error:
        raise ConfigError(f"{url}: {error}") from error
    except ValueError as error:
        raise OSError(str(error)) from error


def in_store[T](url: str, action: Callable[[Any, str], T]) -> T:
    """What `action(file_system, place)` comes to. Raises `OSError` whatever goes wrong in it."""
    system, place = file_system(url)
    try:
        return action(system, place)
    except OSError:
        raise
    except Exception as error:  # every store has errors of its own
        raise OSError(f"{type(error).__name__}: {error}") from error


def put_file(path: Path, url: str) -> None:
    """Copy a local file there."""

    def put(system: Any, place: str) -> None:
        system.makedirs(place.rpartition("/")[0], exist_ok=True)
        system.put_file(str(path), place)

    in_store(url, put)


def get_file(url: str, path: Path) -> None:
    """Copy a file from there, into a folder that is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    in_store(url, lambda system, place: system.get_file(place, str(path)))


def file_sizes(url: str) -> dict[str, int]:
    """Bytes of all files below a folder by their paths in it, as they are now; nothing if there is no such folder.

    Raises:
        OSError: it cannot be listed, or has a file whose path leads out of it.
    """

    def find(system: Any, place: str) -> dict[str, int]:
        system.invalidate_cache()
        return dict(_walk(system, place.rstrip("/")))

    try:
        found = in_store(url, find)
    except FileNotFoundError:
        return {}
    root = file_system(url)[1].rstrip("/")
    sizes = {path.removeprefix(f"{root}/"): size for path, size in found.items()}
    strange = [path for path in sizes if path.startswith("/") or ".." in path.split("/")]
    if strange:
        raise OSError(f"{url}: holds {strange[0]!r}, whose path leads out of it")
    return sizes


def _walk(system: Any, place: str) -> Iterator[tuple[str, int]]:
    """All files below a folder. fsspec's `find` would take a folder that cannot be listed for an empty one."""
    for entry in system.ls(place, detail=True):
        name = str(entry["name"]).rstrip("/")
        if name == place:  # some stores have an entry for the folder itself
            continue
        if entry["type"] == "directory":
            yield from _walk(system, name)
        else:
            yield name, int(entry["size"])


def remove(url: str) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        in_store(url, lambda system, place: system.rm(place, recursive=True))
