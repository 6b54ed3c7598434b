"""Saves checkpoints while training goes on: one at a time, finished by all ranks together, or given up by all.

    start     every rank copies what it writes to the host                                  training waits
    write     every rank writes its files, in a thread                                      training goes on
    close     when all have written, rank 0 writes the table of contents and the marker     training goes on
              and removes old checkpoints; if one could not write, it removes what was written

`poll`, once a step, finds out whether all ranks have come so far. A disk that is full, slow or gone costs checkpoints and never
the run: what is finished stays, the next save tries again.
"""

import logging
import pickle
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from internvl_megatron.checkpoint import file_sums, folders
from internvl_megatron.checkpoint.shard_writer import HostCopies, Written, write_contents, write_shards
from internvl_megatron.config.schema import CheckpointConfig
from internvl_megatron.parallel.groups import Groups
from internvl_megatron.parallel.host import exchange_bytes, sum_floats

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


@dataclass
class _Save:
    """A save under way."""

    info: folders.CheckpointInfo
    job: Future[Any] | None
    """What this rank has to do of the present part; None = nothing."""
    is_closing: bool = False
    started: float = field(default_factory=time.perf_counter)


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
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._save: _Save | None = None
        self._checked: set[str] = set()
        self._last_failed = False
        self._newest = "none"
        if groups.rank == 0:
            try:
                self._newest = next((path.name for path in reversed(folders.finished(root))), "none")
                folders.remove_partial(root)
            except OSError as error:
                log.warning("%s: half-written checkpoints cannot be removed (%s)", root, error)

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way."""
        return self._save is not None

    def start(self, state: SavedState) -> bool:
        """Begin to save; what `state` describes may change when this returns.

        Waits for the save before, `checkpoint.max_wait_seconds` at most.

        Returns:
            False if that one is still not written: then this save is left out.
        """
        began = time.perf_counter()
        if not self._wait(self._settings.max_wait_seconds):
            assert self._save is not None, "there is something to wait for"
            self._failed(
                f"step {state.info.step} is not saved: after {self._settings.max_wait_seconds} s more the checkpoint of step "
                f"{self._save.info.step} is still being written to {self.root}; training goes on"
            )
            return False
        kind = str(state.info.optimizer_layout)
        staged = self._copies.stage(state.sharded, state.files, state.own_prefixes, check=kind not in self._checked)
        self._checked.add(kind)
        folder = folders.writing_path(self.root, state.info.step)
        self._save = _Save(state.info, self._worker.submit(write_shards, folder, self.groups.rank, staged))
        self.blocked_seconds = time.perf_counter() - began
        return True

    def poll(self) -> None:
        """Take a save under way further, as far as all ranks have come; waits for nobody's disk."""
        save = self._save
        if save is None:
            return
        is_done, has_failed = _state_of(save.job)
        num_done, num_failed = sum_floats([is_done, has_failed], self.groups.host_world)
        if num_done < self.groups.layout.world_size:
            return
        if not save.is_closing:
            self._begin_to_close(save, num_failed > 0)
            return
        self._save = None
        if self.groups.rank != 0:
            self._last_failed, self.num_failed = num_failed > 0, self.num_failed + (num_failed > 0)
            return
        assert save.job is not None, "rank 0 closes"
        error = save.job.exception()
        if error is None:
            self._last_failed, self._newest = False, save.job.result().name
            seconds = time.perf_counter() - save.started
            log.info("saved %s in %.1f s (training waited %.2f s)", save.job.result(), seconds, self.blocked_seconds)
        else:
            self._failed(f"step {save.info.step} is not saved: {error}; the newest checkpoint is {self._newest}")

    def wait(self) -> bool:
        """Wait until nothing is under way, `checkpoint.max_wait_seconds` at most; whether the last save is a checkpoint now."""
        return self._wait(self._settings.max_wait_seconds) and not self._last_failed

    def close(self) -> None:
        """End the thread; a save that is under way is given up if nobody has waited for it."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _wait(self, max_seconds: float) -> bool:
        began = time.perf_counter()
        self.poll()
        while self._save is not None:
            is_late = time.perf_counter() - began > max_seconds
            if sum_floats([float(is_late)], self.groups.host_world)[0] > 0:
                return False
            time.sleep(POLL_SECONDS)
            self.poll()
        return True

    def _begin_to_close(self, save: _Save, has_failed: bool) -> None:
        """Rank 0 hears what all ranks have written, and goes on from there."""
        assert save.job is not None, "every rank writes"
        error = save.job.exception()
        part = save.job.result() if error is None else f"rank {self.groups.rank}: {_reason(error)}"
        payloads = [pickle.dumps(part), *[b""] * (self.groups.layout.world_size - 1)]
        received = exchange_bytes(payloads, self.groups.host_world)
        save.is_closing, save.job = True, None
        if self.groups.rank == 0:
            # From this job's own ranks, over its own connections: no file and no user has a hand in it.
            parts = [pickle.loads(payload) for payload in received]
            work: Callable[..., Any] = self._give_up if has_failed else self._finish
            save.job = self._worker.submit(work, save.info, parts)

    def _finish(self, info: folders.CheckpointInfo, written: list[Written]) -> Path:
        """On rank 0, in its thread: make a checkpoint of what has been written."""
        folder = folders.writing_path(self.root, info.step)
        try:
            files_sum = file_sums.write_sums(folder, write_contents(folder, written))
            target = folders.finish(self.root, replace(info, files_sum=files_sum))
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise SaveError(_reason(error)) from error
        self._clean()
        return target

    def _give_up(self, info: folders.CheckpointInfo, parts: list[Written | str]) -> None:
        """On rank 0, in its thread: remove what has been written."""
        shutil.rmtree(folders.writing_path(self.root, info.step), ignore_errors=True)
        errors = [part for part in parts if isinstance(part, str)]
        more = f" (and {len(errors) - 1} ranks more)" if len(errors) > 1 else ""
        raise SaveError(errors[0] + more)

    def _clean(self) -> None:
        try:
            folders.clean(self.root, self._settings.keep_last, self._settings.milestone_every_steps)
        except OSError as error:
            log.warning("%s: old checkpoints cannot be removed (%s)", self.root, error)

    def _failed(self, text: str) -> None:
        self._last_failed = True
        self.num_failed += 1
        if self.groups.rank == 0:
            self.failures.append(text)
            log.error("%s", text)


class SaveError(RuntimeError):
    """A checkpoint could not be written; the message says which rank met what."""


def _state_of(job: Future[Any] | None) -> tuple[float, float]:
    """Whether a job is done, and whether it has failed; nothing to do is done."""
    if job is None:
        return 1.0, 0.0
    return float(job.done()), float(job.done() and job.exception() is not None)


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}"
    return f"{type(error).__name__}: {error}"
