"""Copies of a run's checkpoints in an object store (`checkpoint.mirror`), through fsspec.

    copy      every rank copies its share of a finished checkpoint's files, in a thread                training goes on
    close     when all have, rank 0 copies the list of checksums, what else is needed to go on         training goes on
              (configuration, metrics, tokenizer), and last the marker; then it removes old copies
    fetch     if the run's folder has no checkpoint, or damaged ones alone: every rank brings back     training waits
              its share

The store then looks as the run's folder does. What has no marker is no checkpoint there either. If another checkpoint is finished
before a copy is, it waits its turn, and if yet another is, that takes its place. A store that is slow, full or gone costs copies
and never the run.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from internvl_megatron.checkpoint import file_sums, folders, weights
from internvl_megatron.checkpoint.intact import damage_of
from internvl_megatron.checkpoint.shared_job import SharedJob, reason_of
from internvl_megatron.config.overrides import CONFIG_FILE
from internvl_megatron.config.schema import CheckpointConfig
from internvl_megatron.errors import CheckpointError, UserError
from internvl_megatron.object_store import file_sizes, get_file, put_file, remove
from internvl_megatron.parallel.groups import Groups
from internvl_megatron.parallel.host import broadcast_bytes, exchange_bytes, sum_floats
from internvl_megatron.watching.metrics import METRICS_FILE
from internvl_megatron.watching.run_events import EVENTS_FILE

log = logging.getLogger(__name__)

RUN_FILES = (CONFIG_FILE, METRICS_FILE, EVENTS_FILE)
"""Of the run's folder, besides `weights.COMPANIONS`, what travels with every checkpoint."""

POLL_SECONDS = 0.1


class Mirror:
    """Every method but `close` is collective over all ranks."""

    def __init__(self, url: str, root: Path, groups: Groups, settings: CheckpointConfig) -> None:
        """Nothing is asked of the store yet.

        Args:
            url: of the run's folder in the store.
            root: folder of the run's checkpoints, on storage that all ranks share.
            groups: process groups.
            settings: how many checkpoints to keep.
        """
        self.failures: list[str] = []
        """On rank 0, what has not been copied and why: for whoever keeps a record, and empties it."""
        self._url = url.rstrip("/")
        self._root = root
        self._groups = groups
        self._settings = settings
        self._job = SharedJob(groups, "mirror")
        self._name: str | None = None
        self._next: str | None = None
        self._started = 0.0

    @property
    def in_use(self) -> frozenset[str]:
        """Names of checkpoints that are being copied or will be, which must stay until then."""
        return frozenset(name for name in (self._name, self._next) if name is not None)

    def start(self, name: str) -> None:
        """Begin to copy a finished checkpoint, or do so when the one before is done."""
        if self._job.is_running:
            self._next = name
            return
        self._name, self._started = name, time.perf_counter()
        self._job.start(partial(self._copy_share, name), partial(self._close_copy, name), lambda: None)

    def catch_up(self, name: str) -> None:
        """The same, if it is not in the store."""
        try:
            is_there = name in json.loads(self._from_rank_0(self._copied))
        except CheckpointError as error:
            if self._groups.rank == 0:
                log.error("%s", error)
            return
        if not is_there:
            self.start(name)

    def poll(self) -> None:
        """Take a copy under way further, as far as all ranks have come; waits for nobody's network."""
        ending = self._job.poll()
        if ending is None:
            return
        if not ending.succeeded:
            self._failed("" if ending.error is None else reason_of(ending.error))  # known to rank 0, which says it
        elif self._groups.rank == 0:
            log.info("copied %s to %s in %.1f s", self._name, self._url, time.perf_counter() - self._started)
        self._name, following, self._next = None, self._next, None
        if following is not None:
            self.start(following)

    def wait(self, max_seconds: float) -> None:
        """Wait until nothing is being copied; after `max_seconds` it is given up."""
        began = time.perf_counter()
        while self._job.is_running:
            is_late = time.perf_counter() - began > max_seconds
            if sum_floats([float(is_late)], self._groups.host_world)[0] > 0:
                self._failed(f"it takes more than {max_seconds} s")
                return
            time.sleep(POLL_SECONDS)
            self.poll()

    def close(self) -> None:
        """End the thread."""
        self._job.shutdown()

    def fetch(self) -> Path | None:
        """Bring back the newest copy that is intact; what is in its place is set aside.

        Returns:
            The checkpoint it has become; None if there is no copy.

        Raises:
            CheckpointError: on all ranks: the store cannot be read, or all its copies are damaged. To begin anew without
                being told to would be worse.
        """
        names: list[str] = json.loads(self._from_rank_0(self._copied))
        for name in reversed(names):
            folder = self._fetch(name)
            damage = damage_of(folder, self._groups, contents=True)
            if not damage:
                self._from_rank_0(self._fetch_run_files)
                if self._groups.rank == 0:
                    log.info("fetched %s from %s", name, self._url)
                return folder
            if self._groups.rank == 0:
                log.error("%s/%s/%s is damaged: %s", self._url, folders.CHECKPOINTS, name, "; ".join(damage))
            self._from_rank_0(lambda folder=folder: shutil.rmtree(folder))
        if names:
            raise CheckpointError(
                f"checkpoint.mirror={self._url}: all {len(names)} copies are damaged; bring one back from elsewhere, or "
                "name another place"
            )
        return None

    def _failed(self, reason: str) -> None:
        if self._groups.rank == 0:
            self.failures.append(f"{self._name} is not copied to {self._url}: {reason}")
            log.error("%s", self.failures[-1])

    def _place(self, *parts: str) -> str:
        return "/".join((self._url, *parts))

    def _copy_share(self, name: str) -> None:
        """In every rank's thread."""
        folder = self._root / name
        share = _shares(_sizes(folder), self._groups.layout.world_size)[self._groups.rank]
        for path in share:
            put_file(folder / path, self._place(folders.CHECKPOINTS, name, path))

    def _close_copy(self, name: str, _: Sequence[None]) -> None:
        """In rank 0's thread."""
        run = self._root.parent
        companions = (run / weights.COMPANIONS).rglob("*")
        for path in (*(run / name for name in RUN_FILES), *companions):
            if path.is_file():
                put_file(path, self._place(path.relative_to(run).as_posix()))
        for path in (file_sums.SUMS_FILE, folders.MARKER):
            if (self._root / name / path).is_file():
                put_file(self._root / name / path, self._place(folders.CHECKPOINTS, name, path))
        names = self._copied()
        for old in folders.old_ones(names, self._settings.keep_last, self._settings.milestone_every_steps):
            # Without its marker it is no checkpoint any more: an interrupted removal leaves nothing that looks whole.
            for place in (
                self._place(folders.CHECKPOINTS, old, folders.MARKER),
                self._place(folders.CHECKPOINTS, old),
            ):
                remove(place)

    def _copied(self) -> list[str]:
        """Names of the finished checkpoints in the store, oldest first."""
        found = file_sizes(self._place(folders.CHECKPOINTS))
        return sorted({path.split("/")[0] for path in found if _is_marker(path)})

    def _fetch(self, name: str) -> Path:
        """Every rank its share of the files; then the marker, and the folder gets its name."""
        target, partial_folder = self._root / name, folders.writing_path(self._root, int(name.removeprefix("step-")))

        def prepare() -> dict[str, int]:
            shutil.rmtree(partial_folder, ignore_errors=True)
            partial_folder.mkdir(parents=True)
            return file_sizes(self._place(folders.CHECKPOINTS, name))

        sizes: dict[str, int] = json.loads(self._from_rank_0(prepare))
        share = _shares(sizes, self._groups.layout.world_size)[self._groups.rank]
        error = ""
        try:
            for path in share:
                get_file(self._place(folders.CHECKPOINTS, name, path), partial_folder / path)
        except OSError as failure:
            error = reason_of(failure)
        payloads = [error.encode()] * self._groups.layout.world_size
        errors = [found.decode() for found in exchange_bytes(payloads, self._groups.host_world) if found]
        if errors:
            raise self._unreadable(errors[0])

        def finish() -> None:
            for path in (file_sums.SUMS_FILE, folders.MARKER):
                if path in sizes:
                    get_file(self._place(folders.CHECKPOINTS, name, path), partial_folder / path)
            if target.exists():  # damaged, or without a marker
                folders.set_aside(target)
            partial_folder.rename(target)

        self._from_rank_0(finish)
        return target

    def _fetch_run_files(self) -> None:
        """What the folder does not have."""
        run = self._root.parent
        found = [
            *(name for name in RUN_FILES if name in file_sizes(self._url)),
            *(f"{weights.COMPANIONS}/{path}" for path in file_sizes(self._place(weights.COMPANIONS))),
        ]
        for path in found:
            if not (run / path).exists():
                get_file(self._place(path), run / path)

    def _from_rank_0(self, work: Callable[[], object]) -> bytes:
        """What rank 0's work comes to, as JSON, on all ranks. Raises `CheckpointError` on all."""
        payload = None
        if self._groups.rank == 0:
            try:
                payload = b"+" + json.dumps(work()).encode()
            except (OSError, UserError) as error:
                payload = b"-" + reason_of(error).encode()
        heard = broadcast_bytes(payload, 0, self._groups.host_world)
        if heard.startswith(b"-"):
            raise self._unreadable(heard[1:].decode())
        return heard[1:]

    def _unreadable(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint.mirror={self._url}: whether it has a checkpoint of this run cannot be told ({reason}); mend that, or "
            "set checkpoint.mirror=null to do without"
        )


def _is_marker(path: str) -> bool:
    name, _, rest = path.partition("/")
    return folders.is_name(name) and rest == folders.MARKER


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of a checkpoint's files by their paths in it: of all that were written, whatever is there."""
    sums = file_sums.read_sums(folder, folders.read_info(folder))
    if not sums:
        raise CheckpointError(f"{folder}: has no list of its files, as those of earlier versions")
    return {path: entry.num_bytes for path, entry in sums.items()}


def _shares(sizes: dict[str, int], num_ranks: int) -> list[list[str]]:
    """Which files each rank copies: the largest first, dealt out one by one. What makes them a checkpoint comes later."""
    rest = {path: size for path, size in sizes.items() if path not in (file_sums.SUMS_FILE, folders.MARKER)}
    ordered = sorted(rest, key=lambda path: (-rest[path], path))
    return [ordered[rank::num_ranks] for rank in range(num_ranks)]
