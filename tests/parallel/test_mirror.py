"""Copies of checkpoints in an object store: what is there after good and bad days, and that a run goes on from them."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internvl_megatron.checkpoint import file_sums, folders
from internvl_megatron.checkpoint.mirror import Mirror
from internvl_megatron.checkpoint.saver import Saver
from internvl_megatron.config.overrides import CONFIG_FILE
from internvl_megatron.config.schema import CheckpointConfig
from internvl_megatron.device import open_device
from internvl_megatron.errors import CheckpointError
from internvl_megatron.launcher import RankFailedError
from internvl_megatron.parallel.groups import Groups, make_groups
from internvl_megatron.ranks import RankInfo, joined
from internvl_megatron.watching.metrics import METRICS_FILE, read_metrics
from tests.support.layouts import LAYOUTS
from tests.support.small_runs import small_data, small_run

pytestmark = pytest.mark.parallel

RunRanks = Callable[..., list[Any]]
SETTINGS = CheckpointConfig(keep_last=2, milestone_every_steps=10)


def _url(folder: Path) -> str:
    return f"file://{folder}"


@contextmanager
def _groups(info: RankInfo) -> Iterator[Groups]:
    device = open_device("cpu")
    with joined(info, device, 60):
        yield make_groups(LAYOUTS["DP2"].layout, device, 60)


def _make_checkpoint(run: Path, step: int) -> Path:
    """Files of random bytes, one of them in a folder, as a finished checkpoint."""
    root = run / folders.CHECKPOINTS
    folder, rng = folders.writing_path(root, step), np.random.default_rng(step)
    (folder / "inner").mkdir(parents=True)
    sums = {name: file_sums.write_file(folder / name, rng.bytes(1000 + step)) for name in ("a", "b", "c", "inner/d")}
    info = folders.CheckpointInfo(
        step, 1, 1, "DP2", optimizer_state=False, files_sum=file_sums.write_sums(folder, sums)
    )
    return folders.finish(root, info)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _copy(info: RankInfo, run: Path, store: Path, steps: list[int]) -> list[str]:
    """Copy finished checkpoints one after the other; what went wrong."""
    with _groups(info) as groups:
        mirror = Mirror(_url(store), run / folders.CHECKPOINTS, groups, SETTINGS)
        for step in steps:
            mirror.start(folders.path_of(run, step).name)
            mirror.wait(60)
        mirror.close()
        return mirror.failures


def _newest(info: RankInfo, run: Path, store: Path) -> str | None:
    with _groups(info) as groups:
        saver = Saver(run / folders.CHECKPOINTS, replace(SETTINGS, mirror=_url(store)), groups)
        try:
            found = saver.newest(contents=True)
        except CheckpointError as error:
            return f"error: {error}"
        finally:
            saver.close()
        return None if found is None else found.name


def _run_folder(folder: Path, steps: list[int]) -> Path:
    for step in steps:
        _make_checkpoint(folder, step)
    (folder / CONFIG_FILE).write_text("{}")
    (folder / "huggingface").mkdir()
    (folder / "huggingface" / "tokenizer.json").write_text("tokens")
    return folder


def test_copies_are_whole_and_old_ones_go(run_ranks: RunRanks, tmp_path: Path) -> None:
    run, store = _run_folder(tmp_path / "run", [10, 11, 12, 13]), tmp_path / "store"
    abandoned = store / folders.CHECKPOINTS / "step-00000007"
    abandoned.mkdir(parents=True)
    (abandoned / "a").write_text("a copy that was interrupted: no marker")
    assert run_ranks(_copy, 2, run, store, [10, 11, 12, 13]) == [[], []]
    assert _names(store) == ["checkpoints", CONFIG_FILE, "huggingface"]
    kept = ["step-00000010", "step-00000012", "step-00000013"]
    assert [path.name for path in folders.finished(store / folders.CHECKPOINTS)] == kept
    assert _names(store / folders.CHECKPOINTS) == ["step-00000007", *kept]
    for name in kept:
        copied, own = (_contents(place / folders.CHECKPOINTS / name) for place in (store, run))
        assert copied == own

    other = tmp_path / "other"
    left = other / folders.CHECKPOINTS / "step-00000013"
    left.mkdir(parents=True)
    (left / "e").write_text("of a checkpoint that lost its marker")
    assert run_ranks(_newest, 2, other, store) == ["step-00000013"] * 2
    assert _contents(other / folders.CHECKPOINTS) == {
        path: content for path, content in _contents(run / folders.CHECKPOINTS).items() if "step-00000013" in path
    } | {"step-00000013.damaged/e": b"of a checkpoint that lost its marker"}
    assert (other / "huggingface" / "tokenizer.json").read_text() == "tokens"
    shutil.rmtree(store)
    assert run_ranks(_newest, 2, other, store) == ["step-00000013"] * 2, "it has one of its own"
    assert run_ranks(_newest, 2, tmp_path / "third", store) == [None, None]


def test_a_damaged_copy_gives_way_to_an_older_one(run_ranks: RunRanks, tmp_path: Path) -> None:
    run, store = _run_folder(tmp_path / "run", [1, 2]), tmp_path / "store"
    run_ranks(_copy, 2, run, store, [1, 2])
    copies = store / folders.CHECKPOINTS
    (copies / "step-00000002" / "inner" / "d").write_bytes(b"other")
    assert run_ranks(_newest, 2, tmp_path / "other", store) == ["step-00000001"] * 2
    assert _names(tmp_path / "other" / folders.CHECKPOINTS) == ["step-00000001"]

    (copies / "step-00000001" / folders.MARKER).unlink()
    (found, _) = run_ranks(_newest, 2, tmp_path / "third", store)
    assert found.startswith("error: ") and "all 1 copies are damaged" in found


def test_a_copy_takes_the_place_of_checkpoints_that_are_all_damaged(run_ranks: RunRanks, tmp_path: Path) -> None:
    run, store = _run_folder(tmp_path / "run", [1, 2, 3]), tmp_path / "store"
    run_ranks(_copy, 2, run, store, [1, 2])
    own, copied = run / folders.CHECKPOINTS, _contents(store / folders.CHECKPOINTS / "step-00000002")
    for step in (1, 2, 3):
        (own / f"step-0000000{step}" / "inner" / "d").write_bytes(b"other")
    assert run_ranks(_newest, 2, run, store) == ["step-00000002"] * 2
    assert _contents(own / "step-00000002") == copied
    assert _names(own) == ["step-00000001", "step-00000002", "step-00000002.damaged", "step-00000003.damaged"]

    (own / "step-00000002" / "a").unlink()
    shutil.rmtree(store)
    (found, _) = run_ranks(_newest, 2, run, store)
    assert found.startswith("error: ") and "all 2 checkpoints are damaged" in found


def test_a_store_that_fails_costs_copies_alone(run_ranks: RunRanks, tmp_path: Path) -> None:
    run, store = _run_folder(tmp_path / "run", [1, 2]), tmp_path / "store"
    store.write_text("where the folder should be, there is a file")
    (failures, _) = run_ranks(_copy, 2, run, store, [1])
    assert len(failures) == 1 and failures[0].startswith(f"step-00000001 is not copied to file://{store}: rank 0: ")
    (found, other) = run_ranks(_newest, 2, tmp_path / "other", store)
    assert found == other and "cannot be told" in found and "checkpoint.mirror=null" in found
    store.unlink()
    (run / folders.CHECKPOINTS / "step-00000002" / "c").unlink()
    (failures, _) = run_ranks(_copy, 2, run, store, [2, 1])
    assert len(failures) == 1 and "step-00000002" in failures[0]
    assert [path.name for path in folders.finished(store / folders.CHECKPOINTS)] == ["step-00000001"]


def test_a_run_goes_on_from_its_copy(run_ranks: RunRanks, tmp_path: Path) -> None:
    """Its own folder is gone. A run that finds its own checkpoint not copied copies it."""
    data, run, store = small_data(tmp_path / "data"), tmp_path / "run", tmp_path / "store"

    def config(folder: Path, steps: int, *more: str) -> Any:
        return small_run(data, folder, "data.tokens_per_row=256", f"num_steps={steps}", *more)

    mirrored = f"checkpoint.mirror={_url(store)}"
    train = "internvl_megatron.trainer:train_rank"
    run_ranks(train, 1, config(tmp_path / "whole", 4))
    run_ranks(train, 1, config(run, 1))
    run_ranks(train, 1, config(run, 2, mirrored))
    assert "step-00000002" in _names(store / folders.CHECKPOINTS)
    shutil.rmtree(run)
    run_ranks(train, 1, config(run, 4, mirrored))
    losses, wanted = (
        [row["loss"] for row in read_metrics(place / METRICS_FILE)] for place in (run, tmp_path / "whole")
    )
    assert losses == wanted
    assert _names(store / folders.CHECKPOINTS) == ["step-00000002", "step-00000004"]
    with pytest.raises(RankFailedError, match="must be a URL"):
        run_ranks(train, 1, config(run, 4, f"checkpoint.mirror={store}"))
