"""Chooses the checkpoint a run continues from: the newest that is as it was written, whatever has happened to later ones."""

import json
import logging
from pathlib import Path

from internvl_megatron.checkpoint import folders
from internvl_megatron.checkpoint.file_sums import find_damage
from internvl_megatron.errors import CheckpointError
from internvl_megatron.parallel.groups import Groups
from internvl_megatron.parallel.host import broadcast_bytes, exchange_bytes

log = logging.getLogger(__name__)


class AllDamagedError(CheckpointError):
    """A run has checkpoints, and none is as it was written."""


def newest_intact(root: Path, groups: Groups, contents: bool, sets_aside: bool) -> Path | None:
    """Look at a run's checkpoints from the newest on; collective: every rank reads some of the files.

    Args:
        root: folder of the run's checkpoints.
        groups: process groups.
        contents: compare what is in the files, and not only how long they are.
        sets_aside: rename damaged ones: in a run that goes on they must not count among those that are kept.

    Returns:
        The checkpoint; None if there is none at all.

    Raises:
        AllDamagedError: there are some, and every one is damaged.
        OtherVersionError: one is of a version this program does not read.
    """
    # One rank lists them: others may not see yet what was renamed a moment ago.
    listed = json.dumps([path.name for path in folders.finished(root)]).encode() if groups.rank == 0 else None
    names = json.loads(broadcast_bytes(listed, 0, groups.host_world))
    if groups.rank == 0:
        for path in folders.without_marker(root):
            log.error("%s has no %s and cannot be used", path, folders.MARKER)
    damaged: list[str] = []
    for name in reversed(names):
        damage = damage_of(root / name, groups, contents)
        if not damage:
            return root / name
        damaged.append(damage[0])
        if groups.rank == 0:
            log.error("%s is damaged and cannot be used: %s", root / name, "; ".join(damage))
            # The last one stays, so that the run does not begin anew without being told to.
            if sets_aside and len(damaged) < len(names):
                _set_aside(root / name)
    if damaged:
        raise AllDamagedError(
            f"{root}: all {len(damaged)} checkpoints are damaged: {'; '.join(damaged)}. Bring one back from a copy, or "
            "choose another folder (folder=...)"
        )
    return None


def damage_of(folder: Path, groups: Groups, contents: bool) -> list[str]:
    """What is wrong with a checkpoint, the same on every rank; collective.

    Raises:
        OtherVersionError: it is of a version this program does not read.
    """
    error = ""
    try:
        found = find_damage(folder, contents, groups.rank, groups.layout.world_size)
    except folders.OtherVersionError as other:
        found, error = [], str(other)
    payload = json.dumps([found, error]).encode()
    heard = [json.loads(part) for part in exchange_bytes([payload] * groups.layout.world_size, groups.host_world)]
    for _, text in heard:
        if text:
            raise folders.OtherVersionError(text)
    return list(dict.fromkeys(text for part, _ in heard for text in part))


def _set_aside(folder: Path) -> None:
    try:
        log.warning("%s: set aside", folders.set_aside(folder))
    except OSError as error:
        log.warning("%s: cannot be renamed (%s)", folder, error.strerror)
