"""Which folders are checkpoints, and which metadata is refused."""

import io
import json
import os
import pickle
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from internvl_megatron.checkpoint import file_sums, folders
from internvl_megatron.checkpoint.metadata_guard import METADATA_FILE, check_metadata, plain_data_only
from internvl_megatron.errors import CheckpointError


def _info(step: int) -> folders.CheckpointInfo:
    return folders.CheckpointInfo(step, num_tokens=1, num_samples=2, layout="TP1", optimizer_state=True)


def _write(root: Path, step: int) -> Path:
    folders.writing_path(root, step).mkdir(parents=True)
    return folders.finish(root, _info(step))


def test_unfinished_folders_are_no_checkpoints(tmp_path: Path) -> None:
    _write(tmp_path, 5)
    folders.writing_path(tmp_path, 6).mkdir()
    folders.path_of(tmp_path, 7).mkdir()  # renamed by somebody, but without the marker
    (tmp_path / "notes").mkdir()
    assert folders.finished(tmp_path) == [folders.path_of(tmp_path, 5)]
    assert folders.read_info(folders.path_of(tmp_path, 5)) == _info(5)


def test_clean_keeps_the_newest_and_never_the_last_one_less(tmp_path: Path) -> None:
    for step in (1, 2, 30, 4):
        _write(tmp_path, step)
    folders.clean(tmp_path, keep_last=2)
    assert [path.name for path in folders.finished(tmp_path)] == ["step-00000004", "step-00000030"]
    folders.clean(tmp_path, keep_last=0)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000030"]


def test_milestones_stay(tmp_path: Path) -> None:
    for step in range(1, 8):
        _write(tmp_path, step)
        folders.clean(tmp_path, keep_last=1, milestone_every_steps=3)
    assert [path.name[-1] for path in folders.finished(tmp_path)] == ["3", "6", "7"]


def test_what_was_half_written_or_half_removed_goes_and_nothing_else(tmp_path: Path) -> None:
    folders.set_aside(_write(tmp_path, 1))
    _write(tmp_path, 2)
    folders.path_of(tmp_path, 3).mkdir()  # its marker is lost: somebody may want the rest
    for end in ("writing", "replaced", "removing"):
        (tmp_path / f"step-00000004.{end}").mkdir()
    folders.remove_partial(tmp_path)
    left = ["step-00000001.damaged", "step-00000002", "step-00000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert folders.without_marker(tmp_path) == [folders.path_of(tmp_path, 3)]


def test_writing_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    (_write(tmp_path, 5) / "old").touch()
    assert not (_write(tmp_path, 5) / "old").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format_version": 1}', '{"step": 5}'])
def test_a_broken_marker_is_named(tmp_path: Path, text: str) -> None:
    path = _write(tmp_path, 5)
    (path / folders.MARKER).write_text(text)
    with pytest.raises(CheckpointError, match=folders.MARKER):
        folders.read_info(path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, 5)
    marker = json.loads((path / folders.MARKER).read_text()) | {"format_version": 99}
    (path / folders.MARKER).write_text(json.dumps(marker))
    with pytest.raises(CheckpointError, match="version 99"):
        folders.read_info(path)


class _RunsCode:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("it-ran",))


def test_metadata_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / METADATA_FILE).write_bytes(pickle.dumps(OrderedDict(state=_RunsCode())))
    with pytest.raises(CheckpointError, match=r"names posix\.mkdir"):
        check_metadata(tmp_path)
    assert not (tmp_path / "it-ran").exists()


def test_objects_in_data_files_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save({"state": _RunsCode()}, buffer)
    buffer.seek(0)
    with plain_data_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(buffer, weights_only=False)  # as torch's checkpoint reader asks for it
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps({"a": 1})[:-3]])
def test_damaged_metadata_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / METADATA_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match="not readable as plain data"):
        check_metadata(tmp_path)


def test_metadata_that_names_files_outside_is_refused(tmp_path: Path) -> None:
    storage = {MetadataIndex("a"): _StorageInfo("../../secret.distcp", 0, 10)}
    (tmp_path / METADATA_FILE).write_bytes(pickle.dumps(Metadata({}, storage_data=storage)))
    with pytest.raises(CheckpointError, match="no file inside it"):
        check_metadata(tmp_path)


@pytest.mark.parametrize("name", ["../stolen", "/etc/hostname", "a/../../b", "", "a\0b", "\ud800"])
def test_lists_of_files_outside_are_refused(tmp_path: Path, name: str) -> None:
    """With all sums right: whoever wrote the checkpoint has written them too."""
    writing = folders.writing_path(tmp_path, 3)
    writing.mkdir()
    files_sum = file_sums.write_sums(writing, {name: file_sums.FileSum(1, 2)})
    folder = folders.finish(tmp_path, replace(_info(3), files_sum=files_sum))
    (damage,) = file_sums.find_damage(folder)
    assert "no file inside it" in damage


@pytest.mark.parametrize(
    ("field", "value"), [("step", "3"), ("step", -3), ("recent_losses", ["x"]), ("num_tokens", None)]
)
def test_markers_with_other_types_are_refused(tmp_path: Path, field: str, value: object) -> None:
    folders.writing_path(tmp_path, 3).mkdir(parents=True)
    marker = folders.finish(tmp_path, _info(3)) / folders.MARKER
    fields = json.loads(marker.read_text()) | {field: value, "format_version": 2}  # which has no sum of them
    marker.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="not a checkpoint marker"):
        folders.read_info(marker.parent)


def test_missing_metadata_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        check_metadata(tmp_path)
