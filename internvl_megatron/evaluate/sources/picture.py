"""A picture of a record: a file of its own, or bytes inside a table that are read when the question is asked."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from internvl_megatron.data.images import open_image
from internvl_megatron.errors import DataError

_PARTS_OF_A_PATH = 3
"""That tell files apart whose names are numbers, and stay the same where the data set lies in another place."""


@dataclass(frozen=True, slots=True)
class Picture:
    """Where it is. Nothing of it is read before `as_file`."""

    where: str
    """`file:line` of its record."""
    version: str
    """Changes when the picture may have changed."""
    path: str | None = None
    """The file it is; None = `read` gives its bytes."""
    read: Callable[[], bytes] | None = None
    enlargement: int = 1
    """How often its width and height are taken, bilinear, before it is cut into tiles."""

    def as_file(self, folder: Path, name: str) -> str:
        """Path of a file with the picture, which is made in `folder` unless there is one.

        Raises:
            DataError: it cannot be read.
        """
        path = self.path
        if path is None:
            assert self.read is not None, "a picture is a file or can be read"
            path = str(folder / name)
            Path(path).write_bytes(self.read())
        if self.enlargement == 1:
            return path
        enlarged = folder / f"{name}.ppm"
        try:
            with open_image(path) as image:
                size = image.width * self.enlargement, image.height * self.enlargement
                image.convert("RGB").resize(size, Image.Resampling.BILINEAR).save(enlarged)
        except DataError as error:
            raise DataError(f"{self.where}: {error}") from error
        return str(enlarged)


def file_picture(path: Path, where: str) -> Picture:
    """A picture that is a file.

    Raises:
        DataError: there is no such file.
    """
    return Picture(where, file_version(path, where), path=str(path))


def file_version(path: Path, where: str = "") -> str:
    """Changes when a file may have changed: the end of its path, its size and time.

    Raises:
        DataError: there is no such file.
    """
    try:
        state = path.stat()
    except OSError as error:
        prefix = f"{where}: " if where else ""
        raise DataError(f"{prefix}{path}: {error.strerror}; download the data set's files again") from error
    return f"{'/'.join(path.parts[-_PARTS_OF_A_PATH:])} {state.st_size} {state.st_mtime_ns}"
