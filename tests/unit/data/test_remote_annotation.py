"""Annotations behind URLs: copied once, anew when they change, and named by their URL."""

import json

import fsspec
import pytest

from internvl_megatron.data.dataset import COPIES_FOLDER, load_datasets, prepare_records
from internvl_megatron.data.files import FileError
from internvl_megatron.data.meta import read_meta
from internvl_megatron.errors import ConfigError, DataError
from tools.index_data import main

URL = "memory://remote/annotations/birds.jsonl"


@pytest.fixture
def meta(tmp_path, talk):
    """A meta file whose annotation is in a store in memory."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    put([talk("a", "b"), "{broken", talk("c", "d")])
    path = tmp_path / "meta.json"
    path.write_text(json.dumps({"birds": {"root": "", "annotation": URL, "data_augment": False, "repeat_time": 1}}))
    yield path
    system.store.clear()


def put(records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    fsspec.filesystem("memory").pipe_file(
        "/remote/annotations/birds.jsonl", "".join(f"{line}\n" for line in lines).encode()
    )


def copies(folder):
    return sorted(path.name for path in (folder / COPIES_FOLDER).glob("*.jsonl"))


def test_it_is_copied_and_indexed_once_and_named_by_its_url(meta, tmp_path, talk):
    folder = tmp_path / "index"
    prepare_records(read_meta(meta), folder, 1)
    (copy,) = copies(folder)
    written = (folder / COPIES_FOLDER / copy).stat().st_mtime_ns
    (dataset,) = load_datasets(meta, folder)
    assert copies(folder) == [copy] and (folder / COPIES_FOLDER / copy).stat().st_mtime_ns == written
    assert dataset.length == 3 and dataset.file.read(2) == talk("c", "d")
    assert dataset.where(2) == f"{URL}:3"
    with pytest.raises(DataError, match=rf"{URL}:2: is not valid JSON"):
        dataset.file.read(1)
    assert not list((folder / COPIES_FOLDER).glob(".*"))


def test_a_changed_file_is_copied_anew(meta, tmp_path, talk):
    folder = tmp_path / "index"
    assert load_datasets(meta, folder)[0].length == 3
    put([talk("a", "b")])
    assert load_datasets(meta, folder)[0].length == 1
    assert len(copies(folder)) == 2


def test_the_command_that_indexes_copies_too(meta, tmp_path, capsys):
    assert main([str(meta), "--index-folder", str(tmp_path / "index")]) == 0
    assert "3 records" in capsys.readouterr().out and len(copies(tmp_path / "index")) == 1
    assert main([str(meta)]) == 1
    assert "set data.index_folder" in capsys.readouterr().err


def test_what_cannot_be_copied(meta, tmp_path):
    with pytest.raises(DataError, match=r"birds\.jsonl: is a URL; set data\.index_folder"):
        load_datasets(meta)
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError, match=r"file/index/annotations: cannot hold the copy of memory.*; set data\.index_folder"
    ):
        load_datasets(meta, tmp_path / "file" / "index")
    fsspec.filesystem("memory").store.clear()
    with pytest.raises(FileError, match=rf"{URL}: file not found; correct 'annotation'"):
        load_datasets(meta, tmp_path / "index")
    assert not copies(tmp_path / "index")
    meta.write_text(meta.read_text().replace("memory://", "adl://"))
    with pytest.raises(ConfigError, match="adl://remote"):
        load_datasets(meta, tmp_path / "index")
    meta.write_text(meta.read_text().replace("birds.jsonl", "birds/"))
    with pytest.raises(DataError, match="stores must be local folders"):
        load_datasets(meta, tmp_path / "index")
