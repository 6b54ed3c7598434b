"""Pictures that records name, found below the data set's folder and nowhere else."""

from pathlib import Path

from internvl_megatron.data.files import FileError, locate
from internvl_megatron.evaluate.sources.picture import Picture, file_picture
from internvl_megatron.evaluate.sources.record import Record


def named_picture(root: Path, name: str, record: Record, field: str) -> Picture:
    """The picture that a record calls `name`.

    Raises:
        DataError: there is none, or the name leads out of the folder.
    """
    return file_picture(named_file(root, name, record, field), f"{record.where}: field {field!r}")


def named_file(root: Path, name: str, record: Record, field: str) -> Path:
    """Path of what a record calls `name`. Raises `DataError` if it leads out of the folder."""
    try:
        return Path(locate(root, name, allow_outside_root=False))
    except FileError as error:
        raise record.error(field, str(error)) from error
