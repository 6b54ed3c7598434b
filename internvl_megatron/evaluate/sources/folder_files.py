"""Files of a data set that are found by a pattern, because their names have numbers or checksums."""

from pathlib import Path

from internvl_megatron.errors import DataError


def matching_files(folder: Path, pattern: str) -> list[Path]:
    """Files below a folder, sorted by name.

    Raises:
        DataError: there is none.
    """
    found = sorted(path for path in folder.glob(pattern) if path.is_file())
    if not found:
        raise DataError(f"{folder / pattern}: no such files; docs/evaluation.md says how to download them")
    return found
