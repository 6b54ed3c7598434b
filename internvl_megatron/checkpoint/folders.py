"""Checkpoint folders: which exist, which are finished, which may go.

A checkpoint is written into `step-00001000.writing` and renamed to `step-00001000` when every rank has finished and the
marker file is in it. A folder without marker, or with another name, is not a checkpoint. One that was found damaged is
renamed to `step-00001000.damaged`, so that it does not count among those that are kept.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from internvl_megatron.errors import CheckpointError
from internvl_megatron.typed_object import typed_object

CHECKPOINTS = "checkpoints"
"""Folder of a run that holds its checkpoints."""

MARKER = "checkpoint.json"
FORMAT_VERSION = 3
READABLE_VERSIONS = (2, 3)
"""Version 2 has neither checksums nor optimizer state that belongs to a layout."""
_NAME = re.compile(r"step-(\d{8})")


class OtherVersionError(CheckpointError):
    """A checkpoint of a program that is newer, or much older."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What the marker file says."""

    step: int
    """Optimizer steps taken."""
    num_tokens: int
    """Tokens trained on."""
    num_samples: int
    layout: str
    """Layout it was written under, for people."""
    optimizer_state: bool
    """Whether the optimizer's state is in it."""
    reference_weights: str | None = None
    """Preference training: `weights_id` of the reference model."""
    reward_total: float = 0.0
    """Preference training: sum of all pairs' mean rewards so far."""
    num_rewarded_pairs: int = 0
    num_bad_steps: int = 0
    num_rewinds: int = 0
    num_rewound_steps: int = 0
    """Steps whose data were passed over when the run went back to a checkpoint."""
    recent_losses: list[float] = field(default_factory=list)
    """Of the last good steps, by which spikes are told."""
    optimizer_layout: str | None = None
    """Layout that the optimizer's state belongs to (`optimizer_layout.py`); None = any layout can go on from it."""
    files_sum: int | None = None
    """CRC-32 of the list of checksums (`file_sums.py`); None = it was written before there was one."""


def path_of(root: Path, step: int) -> Path:
    """Folder of a finished checkpoint."""
    return root / f"step-{step:08d}"


def writing_path(root: Path, step: int) -> Path:
    """Folder of a checkpoint that is being written."""
    return root / f"step-{step:08d}.writing"


def file_in(folder: Path, name: str) -> Path:
    """The file that a checkpoint's list, or a listing of its copy, calls `name`.

    Raises:
        CheckpointError: the name leads out of the folder.
    """
    parts = name.split("/")
    if "" in parts or ".." in parts or not name.isprintable():
        raise CheckpointError(f"{folder}: its list names {name!r}, which is no file inside it; use another checkpoint")
    return folder / name


def is_name(name: str) -> bool:
    """Whether a folder of this name may be a checkpoint."""
    return _NAME.fullmatch(name) is not None


def finished(root: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    if not root.is_dir():
        return []
    folders = [path for path in root.iterdir() if is_name(path.name) and (path / MARKER).is_file()]
    return sorted(folders, key=lambda path: path.name)


def without_marker(root: Path) -> list[Path]:
    """Folders with the name of a checkpoint that are none, since their marker is missing."""
    if not root.is_dir():
        return []
    return [path for path in root.iterdir() if is_name(path.name) and not (path / MARKER).is_file()]


def finish(root: Path, info: CheckpointInfo) -> Path:
    """Turn a completely written folder into a checkpoint."""
    source, target = writing_path(root, info.step), path_of(root, info.step)
    fields = asdict(info)
    marker = source / MARKER
    with marker.open("w") as file:
        json.dump({"format_version": FORMAT_VERSION, **fields, "marker_sum": _sum_of(fields)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(source)
    replaced = target.with_name(f"{target.name}.replaced")
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    source.rename(target)
    _sync_folder(root)
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def read_info(folder: Path) -> CheckpointInfo:
    """The marker of a checkpoint.

    Raises:
        CheckpointError: the folder is not a finished checkpoint of a version this program reads.
    """
    marker = folder / MARKER
    if not marker.is_file():
        raise CheckpointError(
            f"{folder}: no finished checkpoint ({MARKER} is missing). Give a folder named step-NNNNNNNN of a run."
        )
    try:
        fields = json.loads(marker.read_text())
        version, wanted = fields.pop("format_version"), fields.pop("marker_sum", None)
        if version not in READABLE_VERSIONS:
            raise OtherVersionError(
                f"{marker}: format version {version}, this program reads version {READABLE_VERSIONS[-1]}"
            )
        info = typed_object(CheckpointInfo, fields)
        if info.step < 0:
            raise ValueError(f"step {info.step}")
    except OtherVersionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{marker}: not a checkpoint marker ({error}); use another checkpoint") from error
    if version > READABLE_VERSIONS[0] and wanted != _sum_of(fields):
        raise CheckpointError(f"{marker}: damaged (its fields do not have its sum); use another checkpoint")
    return info


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint so that it is none any more; earlier ones of its step that were set aside go."""
    target = folder.with_name(f"{folder.name}.damaged")
    shutil.rmtree(target, ignore_errors=True)
    return folder.rename(target)


def remove_partial(root: Path) -> None:
    """Remove what was half-written, or half-removed, when a process ended."""
    for pattern in ("step-*.writing", "step-*.replaced", "step-*.removing"):
        for path in root.glob(pattern):
            shutil.rmtree(path)


def old_ones(names: Sequence[str], keep_last: int, milestone_every_steps: int | None = None) -> list[str]:
    """Of the names of checkpoints, oldest first, those that may go: all but the newest `keep_last`, at least one, and milestones."""
    return [
        name
        for name in names[: -max(1, keep_last)]
        if milestone_every_steps is None or int(name.removeprefix("step-")) % milestone_every_steps != 0
    ]


def clean(
    root: Path, keep_last: int, milestone_every_steps: int | None = None, in_use: Collection[str] = frozenset()
) -> None:
    """Remove old checkpoints, but for those `in_use`."""
    for name in old_ones([path.name for path in finished(root)], keep_last, milestone_every_steps):
        if name not in in_use:
            # Under another name it is no checkpoint any more: an interrupted removal leaves nothing that looks whole.
            shutil.rmtree((root / name).rename(root / f"{name}.removing"))


def _sum_of(fields: dict[str, object]) -> int:
    """CRC-32 of a marker's fields, in any order."""
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())


def _sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, not only the files' contents."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
