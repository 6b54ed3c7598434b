"""Saving while training goes on: what a checkpoint holds, what a bad disk or a kill costs, and which layouts go on from it."""

import logging
import os
import random
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internvl_megatron.checkpoint import folders, save_load
from internvl_megatron.checkpoint.file_sums import SUMS_FILE
from internvl_megatron.checkpoint.intact import newest_intact
from internvl_megatron.checkpoint.metadata_guard import METADATA_FILE
from internvl_megatron.checkpoint.optimizer_layout import optimizer_layout
from internvl_megatron.checkpoint.saver import Saver
from internvl_megatron.config.overrides import CONFIG_FILE, to_json
from internvl_megatron.config.plan import plan
from internvl_megatron.config.schema import CheckpointConfig, RunConfig
from internvl_megatron.device import open_device
from internvl_megatron.errors import CheckpointError
from internvl_megatron.launcher import RankFailedError
from internvl_megatron.model.build import Model
from internvl_megatron.parallel.groups import Groups, make_groups
from internvl_megatron.ranks import RankInfo, joined
from internvl_megatron.scaling.memory import save_bytes
from internvl_megatron.train.step import Step
from tests.support.layouts import ADAMW, LAYOUTS, Ranks, Scenario
from tests.support.training import make_step, replica_rows
from tools import check_checkpoints, convert_optimizer

pytestmark = pytest.mark.parallel

SAVED_AT, STEPS = 2, 4
REPLICATED = Scenario(changes={"optimizer": ADAMW, "num_steps": STEPS})
SHARDED = replace(REPLICATED, parallel_changes={"vision_sharding": "sharded"})
RunRanks = Callable[..., list[Any]]
History = list[tuple[float, float]]
"""(loss, gradient norm) by step."""


@dataclass
class Run:
    """What a test trains, on one rank."""

    scenario: Scenario
    ranks: Ranks
    config: RunConfig
    groups: Groups
    step: Step
    model: Model
    own_layout: str

    def train(self, number: int) -> tuple[float, float]:
        # The rows of four steps, again and again: the generator of rows knows no later ones that fit.
        batch: Any = replica_rows(self.scenario, self.config, number % 4, self.ranks.layout, self.groups.rank)
        result = self.step.run(batch, number)
        return result.loss, result.grad_norm

    def start(self, saver: Saver, step: int, is_fast: bool = True) -> bool:
        layout = self.own_layout if is_fast else None
        info = folders.CheckpointInfo(
            step, 10, 20, str(self.ranks.layout), optimizer_state=True, optimizer_layout=layout
        )
        self.step.gather_parameters()
        state = {"0": [step]} if self.groups.rank == 0 else None
        return saver.start(save_load.state_to_save(info, self.model, self.step.optimizer, self.groups, state))

    def load(self, folder: Path) -> folders.CheckpointInfo:
        info, positions = save_load.load(
            folder, self.model, self.step.optimizer, self.groups, own_layout=self.own_layout
        )
        assert positions == {"0": [info.step]}
        return info


@contextmanager
def _run(info: RankInfo, ranks: Ranks, scenario: Scenario = REPLICATED) -> Iterator[Run]:
    import torch

    torch.set_num_threads(1)
    device = open_device("cpu")
    config = scenario.config(ranks)
    with joined(info, device, 60):
        groups = make_groups(ranks.layout, device, 60, ranks.vision_layout)
        step, model = make_step(config, None, groups, device)
        yield Run(scenario, ranks, config, groups, step, model, optimizer_layout(config, groups))


def _busy_until(event: threading.Event, saver: Saver) -> None:
    """Let the writing thread wait, as it does for a slow disk."""
    saver._job.worker.submit(event.wait)


def _train_and_save(info: RankInfo, ranks: Ranks, root: Path, scenario: Scenario, is_fast: bool) -> History:
    """All steps; what is saved in between is written when training is over."""
    with _run(info, ranks, scenario) as run:
        saver, training_is_over = Saver(root, CheckpointConfig(), run.groups), threading.Event()
        history = []
        for number in range(STEPS):
            if number == SAVED_AT:
                _busy_until(training_is_over, saver)
                assert run.start(saver, number, is_fast)
            history.append(run.train(number))
            saver.poll()
        assert not folders.finished(root)
        training_is_over.set()
        assert saver.wait()
        return history


def _go_on(info: RankInfo, ranks: Ranks, root: Path, scenario: Scenario) -> History:
    with _run(info, ranks, scenario) as run:
        newest = newest_intact(root, run.groups, contents=True, sets_aside=True)
        assert newest is not None
        first = run.load(newest).step
        return [run.train(number) for number in range(first, STEPS)]


def test_what_is_written_later_is_the_state_when_it_was_saved(run_ranks: RunRanks, tmp_path: Path) -> None:
    """Fast format: the same layout goes on bit for bit, another number of replicas too, and other layouts are told why not."""
    two = LAYOUTS["DP2"]
    whole = run_ranks(_train_and_save, 2, two, tmp_path, REPLICATED, True)[0]
    assert run_ranks(_go_on, 2, two, tmp_path, REPLICATED)[0] == whole[SAVED_AT:]
    alone = run_ranks(_go_on, 1, LAYOUTS["1"], tmp_path, REPLICATED)[0]
    np.testing.assert_allclose(alone, whole[SAVED_AT:], rtol=1e-5)
    with pytest.raises(RankFailedError, match="fits only the layout it was saved under") as failed:
        run_ranks(_go_on, 2, LAYOUTS["TP2"], tmp_path, REPLICATED)
    assert failed.value.failures[0].is_user_error


@pytest.mark.slow
def test_a_tool_turns_one_format_into_the_other(
    run_ranks: RunRanks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From fast to layout-free, for another layout to go on from; and back to fast, bit for bit."""
    split, root = LAYOUTS["TP2"], tmp_path / folders.CHECKPOINTS
    whole = run_ranks(_train_and_save, 2, split, root, REPLICATED, True)[0]
    config = REPLICATED.config(split)
    data = replace(config.data, meta="not read", tokenizer="not read")
    (tmp_path / CONFIG_FILE).write_text(to_json(replace(config, data=data)))
    assert convert_optimizer.main([str(tmp_path)]) == 0
    alone = run_ranks(_go_on, 1, LAYOUTS["1"], root, REPLICATED)[0]
    np.testing.assert_allclose(alone, whole[SAVED_AT:], rtol=1e-5)
    assert convert_optimizer.main([str(tmp_path), "--to", "same_layout"]) == 0
    own_layout = "TP2, PP1, VPP1, even stages, vision replicated all_ranks TP1, overlap_gradients, overlap_parameters"
    (folder,) = folders.finished(root)
    assert folders.read_info(folder).optimizer_layout == own_layout
    assert run_ranks(_go_on, 2, split, root, REPLICATED)[0] == whole[SAVED_AT:]
    assert check_checkpoints.main([str(tmp_path)]) == 0
    assert "intact   step-00000002: step 2, 10 tokens" in capsys.readouterr().out
    _flip_a_bit(_shard(folder))
    assert check_checkpoints.main([str(tmp_path), "--sizes"]) == 0
    assert check_checkpoints.main([str(tmp_path)]) == 1
    assert f"DAMAGED  step-00000002: {_shard(folder)}: its contents have changed" in capsys.readouterr().out
    assert convert_optimizer.main([str(tmp_path / "nowhere")]) == 2


PAIRS = [
    ("1", "TP2+SP"),
    ("DP2", "PP2"),
    ("TP2xPP2", "TP2xDP2"),
    ("PP2xVPP2", "TP2"),
    ("CP2", "DP2"),
    ("TP2+SPxCP2", "PP2xDP2"),
    ("PP2 uneven", "TP2xCP2"),
    ("PP4", "PP2xVPP2xDP2"),
]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [REPLICATED, SHARDED], ids=["replicated", "sharded"])
@pytest.mark.parametrize(("before", "after"), [*PAIRS, *(pair[::-1] for pair in PAIRS)])
def test_any_layout_goes_on_from_any(
    run_ranks: RunRanks, tmp_path: Path, before: str, after: str, scenario: Scenario
) -> None:
    """Layout-free, Adam's state included, which shows in the second step; and back to where it was, bit for bit."""
    saved, resumed = LAYOUTS[before], LAYOUTS[after]
    whole = run_ranks(_train_and_save, saved.num_ranks, saved, tmp_path, scenario, False)[0]
    crossed = run_ranks(_go_on, resumed.num_ranks, resumed, tmp_path, scenario)[0]
    np.testing.assert_allclose(crossed, whole[SAVED_AT:], rtol=1e-5)
    assert run_ranks(_go_on, saved.num_ranks, saved, tmp_path, scenario)[0] == whole[SAVED_AT:]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["TP2xPP2", "PP2xVPP2xDP2", "CP2xPP2"])
@pytest.mark.parametrize("scenario", [REPLICATED, SHARDED], ids=["replicated", "sharded"])
def test_the_fast_format_under_split_models(
    run_ranks: RunRanks, tmp_path: Path, layout: str, scenario: Scenario
) -> None:
    ranks = LAYOUTS[layout]
    whole = run_ranks(_train_and_save, ranks.num_ranks, ranks, tmp_path, scenario, True)[0]
    assert run_ranks(_go_on, ranks.num_ranks, ranks, tmp_path, scenario)[0] == whole[SAVED_AT:]


def _save_twice(info: RankInfo, root: Path) -> tuple[int, float]:
    """Two checkpoints of two ranks; host memory that saving has taken, in bytes, and what it should be."""
    with _run(info, LAYOUTS["DP2"]) as run:
        saver = Saver(root, CheckpointConfig(), run.groups)
        for number in range(2):
            run.train(number)
            assert run.start(saver, number + 1)
            assert saver.wait()
        data = replace(run.config.data, meta="not read", tokenizer="not read")
        config = replace(run.config, data=data)
        expected = save_bytes(config, plan(config, info.world_size)).fast
        return sum(copy.nbytes for copy in saver._copies._tensors.values()), expected


def _shard(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "shard truncated": lambda folder: _truncate(_shard(folder)),
    "shard with a flipped bit": lambda folder: _flip_a_bit(_shard(folder)),
    "shard missing": lambda folder: _shard(folder).unlink(),
    "contents missing": lambda folder: (folder / METADATA_FILE).unlink(),
    "contents with a flipped bit": lambda folder: _flip_a_bit(folder / METADATA_FILE),
    "sums missing": lambda folder: (folder / SUMS_FILE).unlink(),
    "sums with a flipped bit": lambda folder: _flip_a_bit(folder / SUMS_FILE),
    "marker with a flipped bit": lambda folder: _flip_a_bit(folder / folders.MARKER),
    "marker with another step": lambda folder: (folder / folders.MARKER).write_text(
        (folder / folders.MARKER).read_text().replace('"num_tokens": 10', '"num_tokens": 11')
    ),
    "data position missing": lambda folder: (folder / "loader" / "replica-00000.json").unlink(),
}


def _choose(info: RankInfo, roots: list[Path]) -> list[tuple[str, list[str]]]:
    """Of each run: the checkpoint that is chosen, and what rank 0 has said."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("internvl_megatron").addHandler(handler)
    device, results = open_device("cpu"), []
    with joined(info, device, 60):
        groups = make_groups(LAYOUTS["DP2"].layout, device, 60)
        for root in roots:
            said.clear()
            try:
                newest = newest_intact(root, groups, contents=True, sets_aside=True)
                results.append((newest.name if newest else "none", list(said)))
            except CheckpointError as error:
                results.append((str(error), list(said)))
    return results


def test_damage_is_found_and_an_older_checkpoint_taken(run_ranks: RunRanks, tmp_path: Path) -> None:
    taken = run_ranks(_save_twice, 2, tmp_path / "good")
    assert sum(found for found, _ in taken) == pytest.approx(sum(expected for _, expected in taken), rel=0.01)
    assert all(found < 1.1 * expected for found, expected in taken), "both ranks write about the same"
    assert [path.name for path in folders.finished(tmp_path / "good")] == ["step-00000001", "step-00000002"]
    roots = []
    for number, damage in enumerate(DAMAGE.values()):
        root = tmp_path / f"damaged-{number}"
        shutil.copytree(tmp_path / "good", root)
        damage(root / "step-00000002")
        roots.append(root)
    shutil.copytree(tmp_path / "good", tmp_path / "all")
    shutil.copytree(tmp_path / "good", tmp_path / "unmarked")
    (tmp_path / "unmarked" / "step-00000002" / folders.MARKER).unlink()
    for step in (1, 2):
        _truncate(_shard(tmp_path / "all" / f"step-0000000{step}"))
    first, second = run_ranks(
        _choose, 2, [*roots, tmp_path / "all", tmp_path / "good", tmp_path / "nowhere", tmp_path / "unmarked"]
    )
    assert [name for name, _ in first] == [name for name, _ in second], "all ranks come to the same"
    unmarked = first[len(DAMAGE) + 3]
    assert unmarked[0] == "step-00000001"
    assert f"step-00000002 has no {folders.MARKER} and cannot be used" in unmarked[1][0]
    for kind, root, (name, said) in zip(DAMAGE, roots, first, strict=False):
        assert name == "step-00000001", kind
        assert "step-00000002 is damaged and cannot be used" in said[0], kind
        assert [path.name for path in folders.finished(root)] == ["step-00000001"], kind
        assert (root / "step-00000002.damaged").is_dir(), kind
    everything, good, nothing, _ = first[len(DAMAGE) :]
    assert "all 2 checkpoints are damaged" in everything[0]
    assert folders.finished(tmp_path / "all"), "a run whose checkpoints are all bad does not begin anew"
    assert good == ("step-00000002", [])
    assert nothing[0] == "none"


@contextmanager
def _read_only(root: Path, info: RankInfo, groups: Groups) -> Iterator[None]:
    """Nobody may write to a folder, nor is this process root any more, who might."""
    own = os.geteuid()
    if info.rank == 0:
        root.chmod(0o555)
    groups.host_world.barrier().wait()
    if own == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(own)
    groups.host_world.barrier().wait()
    if info.rank == 0:
        root.chmod(0o755)
    groups.host_world.barrier().wait()


def _train_on_a_bad_disk(info: RankInfo, root: Path) -> tuple[list[str], list[str], int, History]:
    """Save on a disk that is full, gone, slow and good again; what is there after each, what was said, and all losses."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("internvl_megatron").addHandler(handler)
    found, history = [], []

    def note() -> None:
        if info.rank == 0:
            found.append(" ".join(path.name for path in folders.finished(root)))

    with _run(info, LAYOUTS["DP2"]) as run:
        saver = Saver(root, CheckpointConfig(keep_last=1), run.groups)
        history.append(run.train(0))
        assert run.start(saver, 1)
        assert saver.wait()
        note()
        if info.rank == 1:  # no file of this rank can be longer than 20 kB, as on a disk that is full
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        assert run.start(saver, 2)
        history.append(run.train(1))
        assert not saver.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        note()
        if info.rank == 0:
            root.rename(root.with_name("unmounted"))
            root.write_text("where the folder was, there is none")
        run.groups.host_world.barrier().wait()
        assert run.start(saver, 3)
        history.append(run.train(2))
        assert not saver.wait()
        if info.rank == 0:
            root.unlink()
            root.with_name("unmounted").rename(root)
        note()
        run.groups.host_world.barrier().wait()
        with _read_only(root, info, run.groups):
            assert run.start(saver, 3)
            assert not saver.wait()
        note()
        disk_answers = threading.Event()
        _busy_until(disk_answers, saver)
        assert run.start(saver, 4)
        history.append(run.train(3))
        patient, saver._settings = saver._settings, replace(saver._settings, max_wait_seconds=1)
        assert not run.start(saver, 5), "one save at a time"
        saver._settings = patient
        disk_answers.set()
        assert saver.wait()
        note()
        return found, said, saver.num_failed, history


def test_training_goes_on_without_a_disk_and_keeps_the_last_good_checkpoint(
    run_ranks: RunRanks, tmp_path: Path
) -> None:
    found, said, num_failed, history = run_ranks(_train_on_a_bad_disk, 2, tmp_path / "disk")[0]
    assert found == [*["step-00000001"] * 4, "step-00000004"]
    assert num_failed == 4
    assert all(np.isfinite(values).all() for values in history)
    full, gone, read_only, slow = (text for text in said if "is not saved" in text)
    assert full.startswith("step 2 is not saved: rank 1: ") and "File too large" in full
    assert full.endswith("the newest checkpoint is step-00000001")
    assert gone.startswith("step 3 is not saved: rank 0: ") and "Not a directory" in gone
    assert read_only.startswith("step 3 is not saved: rank 0: ") and "Permission denied" in read_only
    assert slow.startswith("step 5 is not saved: after 1 s more the checkpoint of step 4 is still being written")
    assert not list((tmp_path / "disk").glob("*.writing"))


KILLED_STEPS = 80


def _train_until_killed(info: RankInfo, root: Path, kill_after: float | None) -> tuple[int, float]:
    """Go on from the newest checkpoint, saving after every step; be killed that long after the second save has begun."""
    scenario = replace(REPLICATED, changes={"optimizer": ADAMW, "num_steps": KILLED_STEPS})
    with _run(info, LAYOUTS["DP2"], scenario) as run:
        saver = Saver(root, CheckpointConfig(), run.groups)
        newest = newest_intact(root, run.groups, contents=True, sets_aside=True)
        first = 0 if newest is None else run.load(newest).step
        loss = float("nan")
        for number in range(first, int((root.parent / "steps").read_text())):
            loss, _ = run.train(number)
            saver.poll()
            assert run.start(saver, number + 1)
            if kill_after is not None and number == first + 1 and info.rank == 0:
                (root.parent / "killed").write_text(str(number + 1))
                threading.Thread(target=_kill_this_process, args=(kill_after,)).start()
        assert saver.wait()
        return first, loss


def _kill_this_process(after_seconds: float) -> None:
    time.sleep(after_seconds)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("num_kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_while_it_saves_a_run_loses_one_save_at_most(
    run_ranks: RunRanks, tmp_path: Path, num_kills: int
) -> None:
    draw, steps = random.Random(8), 2 * num_kills + 4
    resumed_at = []
    for kind in ("killed", "whole"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "steps").write_text(str(steps))
    root = tmp_path / "killed" / "checkpoints"
    for _ in range(num_kills):
        before = len(folders.finished(root))
        with pytest.raises(RankFailedError, match="killed by SIGKILL"):
            run_ranks(_train_until_killed, 2, root, draw.uniform(0, 0.15))
        saving = int((root.parent / "killed").read_text())
        newest = folders.read_info(folders.finished(root)[-1]).step
        assert newest >= saving - 1, f"killed in the save of step {saving}, and step {newest} is the newest"
        resumed_at.append(newest)
        assert before <= 2
    last, whole = (
        run_ranks(_train_until_killed, 2, tmp_path / kind / "checkpoints", None)[0] for kind in ("killed", "whole")
    )
    assert last[0] == resumed_at[-1]
    assert last[1] == whole[1], "the loss of the last step, to the last bit"
