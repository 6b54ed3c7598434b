"""Saves checkpoints while training goes on: one at a time, finished by all ranks together, or given up by all.

    start     every rank copies what it writes to the host                                  training waits
    write     every rank writes its files, in a thread                                      training goes on
    close     when all have written, rank 0 writes the table of contents and the marker     training goes on
              and removes old checkpoints; if one could not write, it removes what was written
    mirror    with `checkpoint.mirror`, copies of it go to an object store (`mirror.py`)    training goes on

`poll`, once a step, finds out whether all ranks have come so far. A disk that is full, slow or gone costs checkpoints and never
the run: what is finished stays, the next save tries again.
"""

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from internvl_megatron.checkpoint import file_sums, folders
from internvl_megatron.checkpoint.intact import AllDamagedError, newest_intact
from internvl_megatron.checkpoint.mirror import Mirror
from internvl_megatron.checkpoint.shard_writer import HostCopies, Written, write_contents, write_shards
from internvl_megatron.checkpoint.shared_job import JobError, SharedJob, reason_of
from internvl_megatron.config.schema import CheckpointConfig
from internvl_megatron.parallel.groups import Groups
from internvl_megatron.parallel.host import sum_floats

log = logging.getLogger(__name__)

POLL_SECONDS = 0.005
"""Between two polls of somebody who waits."""


@dataclass(frozen=True)
class SavedState:
    """What a checkpoint is made of, on one rank."""

    info: folders.CheckpointInfo
    sharded: dict[str, Any]
    """Megatron Core's description of the rank's part; used up by saving."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Other files of this rank, by path in the checkpoint."""
    own_prefixes: tuple[str, ...] = ()
    """Tensors whose names begin so are copies that nobody else has."""


class Saver:
    """Saves the checkpoints of a run. Every method but `close` is collective over all ranks."""

    def __init__(self, root: Path, settings: CheckpointConfig, groups: Groups) -> None:
        """Remove what an earlier process left half-written.

        Args:
            root: folder of the run's checkpoints, on storage that all ranks share.
            settings: how many to keep, and how long to wait.
            groups: process groups.
        """
        self.root = root
        self.groups = groups
        self.num_failed = 0
        """Saves that came to nothing, since this process began."""
        self.failures: list[str] = []
        """On rank 0, why: for whoever keeps a record, and empties it."""
        self.blocked_seconds = 0.0
        """Training has waited for the last save."""
        self._settings = settings
        self._copies = HostCopies()
        self._job = SharedJob(groups, "checkpoint")
        self._step = 0
        """Of the save under way, or of the last one."""
        self._started = 0.0
        self._checked: set[str] = set()
        self._last_failed = False
        self._newest = "none"
        self._mirror = None if settings.mirror is None else Mirror(settings.mirror, root, groups, settings)
        if groups.rank == 0:
            try:
                self._newest = next((path.name for path in reversed(folders.finished(root))), "none")
                folders.remove_partial(root)
            except OSError as error:
                log.warning("%s: half-written checkpoints cannot be removed (%s)", root, error)

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way."""
        return self._job.is_running

    def start(self, state: SavedState) -> bool:
        """Begin to save; what `state` describes may change when this returns.

        Waits for the save before, `checkpoint.max_wait_seconds` at most.

        Returns:
            False if that one is still not written: then this save is left out.
        """
        began = time.perf_counter()
        if not self._wait(self._settings.max_wait_seconds):
            self._failed(
                f"step {state.info.step} is not saved: after {self._settings.max_wait_seconds} s more the checkpoint of step "
                f"{self._step} is still being written to {self.root}; training goes on"
            )
            return False
        kind = str(state.info.optimizer_layout)
        staged = self._copies.stage(state.sharded, state.files, state.own_prefixes, check=kind not in self._checked)
        self._checked.add(kind)
        folder = folders.writing_path(self.root, state.info.step)
        self._step, self._started = state.info.step, time.perf_counter()
        self._job.start(
            partial(write_shards, folder, self.groups.rank, staged),
            partial(self._finish, state.info),
            partial(shutil.rmtree, folder, ignore_errors=True),
        )
        self.blocked_seconds = time.perf_counter() - began
        return True

    def poll(self) -> None:
        """Take a save under way further, as far as all ranks have come; waits for nobody's disk."""
        if self._mirror is not None:
            self._mirror.poll()
            self.failures += self._mirror.failures
            self._mirror.failures.clear()
        ending = self._job.poll()
        if ending is None:
            return
        if not ending.succeeded:
            error = "" if ending.error is None else reason_of(ending.error)  # known to rank 0, which says it
            self._failed(f"step {self._step} is not saved: {error}; the newest checkpoint is {self._newest}")
            return
        self._last_failed, self._newest = False, folders.path_of(self.root, self._step).name
        if self.groups.rank == 0:
            seconds = time.perf_counter() - self._started
            place = self.root / self._newest
            log.info("saved %s in %.1f s (training waited %.2f s)", place, seconds, self.blocked_seconds)
        if self._mirror is not None:
            self._mirror.start(self._newest)

    def wait(self) -> bool:
        """Wait until nothing is under way, `checkpoint.max_wait_seconds` at most; whether the last save is a checkpoint now."""
        return self._wait(self._settings.max_wait_seconds) and not self._last_failed

    def wait_for_mirror(self) -> None:
        """Wait until copies are made, as long at most."""
        if self._mirror is not None:
            self._mirror.wait(self._settings.max_wait_seconds)
            self.poll()

    def newest(self, contents: bool) -> Path | None:
        """The checkpoint to go on from: the run's newest intact one, else its newest intact copy in the object store.

        Args:
            contents: compare what is in the files, and not only how long they are.

        Returns:
            None if there is none at all.

        Raises:
            CheckpointError: on all ranks: there are some, and every one is damaged; or the store cannot be read when it is needed.
        """
        find = partial(newest_intact, self.root, self.groups, contents, sets_aside=True)
        if self._mirror is None:
            return find()
        try:
            return find() or self._mirror.fetch()
        except AllDamagedError:
            if self._mirror.fetch() is None:
                raise
            return find()  # which sets the damaged ones aside

    def copy(self, checkpoint: Path) -> None:
        """Begin to copy a checkpoint to the object store, if it is not there."""
        if self._mirror is not None:
            self._mirror.catch_up(checkpoint.name)

    def close(self) -> None:
        """End the threads; what is under way is given up if nobody has waited for it."""
        self._job.shutdown()
        if self._mirror is not None:
            self._mirror.close()

    def _wait(self, max_seconds: float) -> bool:
        began = time.perf_counter()
        self.poll()
        while self.is_saving:
            is_late = time.perf_counter() - began > max_seconds
            if sum_floats([float(is_late)], self.groups.host_world)[0] > 0:
                return False
            time.sleep(POLL_SECONDS)
            self.poll()
        return True

    def _finish(self, info: folders.CheckpointInfo, written: Sequence[Written]) -> None:
        """On rank 0, in its thread: make a checkpoint of what has been written."""
        folder = folders.writing_path(self.root, info.step)
        try:
            files_sum = file_sums.write_sums(folder, write_contents(folder, written))
            folders.finish(self.root, replace(info, files_sum=files_sum))
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise JobError(reason_of(error)) from error
        self._clean()

    def _clean(self) -> None:
        try:
            in_use = frozenset() if self._mirror is None else self._mirror.in_use
            folders.clean(self.root, self._settings.keep_last, self._settings.milestone_every_steps, in_use)
        except OSError as error:
            log.warning("%s: old checkpoints cannot be removed (%s)", self.root, error)

    def _failed(self, text: str) -> None:
        self._last_failed = True
        self.num_failed += 1
        if self.groups.rank == 0:
            self.failures.append(text)
            log.error("%s", text)
