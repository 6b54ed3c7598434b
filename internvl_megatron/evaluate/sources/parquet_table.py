"""Parquet files of the Hugging Face hub, pictures inside. Texts are read at once, pictures when they are wanted, a row group at a
time: a table may be larger than memory."""

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl_megatron.errors import ConfigError, DataError
from internvl_megatron.evaluate.sources.picture import Picture, file_version
from internvl_megatron.evaluate.sources.record import Record

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

_BATCH_ROWS = 32


def read_parquet(paths: Sequence[Path], needed: Sequence[str], pictures: Sequence[str] = ()) -> list[Record]:
    """Records of files, one after the other.

    Args:
        paths: of them.
        needed: columns that must be there.
        pictures: columns of pictures ({"bytes", "path"}, as the hub's `Image` feature has them), which must be there too.

    Raises:
        DataError: a file is not there, cannot be read, or lacks a column.
        ConfigError: pyarrow is not installed.
    """
    return [record for path in paths for record in _records(path, needed, pictures)]


def _records(path: Path, needed: Sequence[str], pictures: Sequence[str]) -> Iterator[Record]:
    version = file_version(path)
    file = _open(path, version)
    columns = file.schema_arrow.names
    lacking = [name for name in (*needed, *pictures) if name not in columns]
    if lacking:
        raise DataError(
            f"{path}: has no column {lacking[0]!r}; columns are {', '.join(columns)}; is it another benchmark's file?"
        )
    texts = [name for name in columns if name not in pictures and not _is_image(file, name)]
    row = 0
    for group in range(file.num_row_groups):
        place = 0
        for batch in _batches(path, file, group, [*texts, *pictures]):
            has_picture = {name: batch.column(name).is_valid().to_pylist() for name in pictures}
            for number, fields in enumerate(batch.select(texts).to_pylist()):
                where = f"{path}: row {row + 1}"
                found = {
                    name: (Picture(where, f"{version} {name} {row}", read=partial(_cell, path, version, group, name, place, where)),)
                    for name in pictures
                    if has_picture[name][number]
                }  # fmt: skip
                yield Record(fields, where, found)
                row, place = row + 1, place + 1


def _is_image(file: "ParquetFile", name: str) -> bool:
    """Whether a column looks like the hub's pictures."""
    kind = file.schema_arrow.field(name).type
    return {"bytes", "path"} <= {kind.field(number).name for number in range(kind.num_fields)}


def _batches(path: Path, file: "ParquetFile", group: int, columns: Sequence[str]) -> Iterator[Any]:
    import pyarrow as pa

    try:
        yield from file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error}); download it again") from error


def _cell(path: Path, version: str, group: int, name: str, place: int, where: str) -> bytes:
    """The bytes of a picture."""
    value = _column(path, version, group, name)[place].as_py()
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise DataError(f"{where}: field {name!r}: has no bytes of a picture; download the file again")
    return content


@lru_cache(maxsize=2)
def _column(path: Path, version: str, group: int, name: str) -> Any:
    """A column of a row group; questions are asked in their order, so that the newest are the ones that are wanted again."""
    import pyarrow as pa

    try:
        return _open(path, version).read_row_group(group, columns=[name]).column(name)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error}); download it again") from error


@lru_cache(maxsize=8)
def _open(path: Path, version: str) -> "ParquetFile":
    """An opened file; `version` opens it again where it has changed."""
    del version
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConfigError(f"{path}: needs pyarrow to be read; `pip install 'internvl_megatron[eval]'`") from error
    try:
        return ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error}); download it again") from error
