"""Checkpoint folders: which exist, which are finished, which may go.

A checkpoint is written into `step-00001000.writing` and renamed to `step-00001000` when every rank has finished and the
marker file is in it. A folder without marker, or with another name, is not a checkpoint.
"""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from internvl_megatron.errors import CheckpointError

CHECKPOINTS = "checkpoints"
"""Folder of a run that holds its checkpoints."""

MARKER = "checkpoint.json"
FORMAT_VERSION = 2
_NAME = re.compile(r"step-(\d{8})")


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


def path_of(root: Path, step: int) -> Path:
    """Folder of a finished checkpoint."""
    return root / f"step-{step:08d}"


def writing_path(root: Path, step: int) -> Path:
    """Folder of a checkpoint that is being written."""
    return root / f"step-{step:08d}.writing"


def finished(root: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    if not root.is_dir():
        return []
    folders = [path for path in root.iterdir() if _NAME.fullmatch(path.name) and (path / MARKER).is_file()]
    return sorted(folders, key=lambda path: path.name)


def finish(root: Path, info: CheckpointInfo) -> Path:
    """Turn a completely written folder into a checkpoint."""
    source, target = writing_path(root, info.step), path_of(root, info.step)
    marker = source / MARKER
    with marker.open("w") as file:
        json.dump({"format_version": FORMAT_VERSION, **asdict(info)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if target.exists():
        shutil.rmtree(target)
    source.rename(target)
    return target


def read_info(folder: Path) -> CheckpointInfo:
    """The marker of a checkpoint.

    Raises:
        CheckpointError: the folder is not a finished checkpoint of this version.
    """
    marker = folder / MARKER
    if not marker.is_file():
        raise CheckpointError(
            f"{folder}: no finished checkpoint ({MARKER} is missing). Give a folder named step-NNNNNNNN of a run."
        )
    try:
        fields = json.loads(marker.read_text())
        version = fields.pop("format_version")
        info = CheckpointInfo(**fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{marker}: not a checkpoint marker ({error}); use another checkpoint") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{marker}: format version {version}, this program reads version {FORMAT_VERSION}")
    return info


def clean(root: Path, keep_last: int) -> None:
    """Remove half-written folders and all but the newest finished checkpoints (at least one always stays)."""
    if not root.is_dir():
        return
    for path in root.glob("step-*.writing"):
        shutil.rmtree(path)
    for path in finished(root)[: -max(1, keep_last)]:
        # Without its marker it is no checkpoint any more: an interrupted removal leaves nothing that looks whole.
        (path / MARKER).unlink()
        shutil.rmtree(path)
