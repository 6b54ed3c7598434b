"""The command that indexes the files of a meta file ahead of a run."""

import json

import pytest

from internvl_megatron.data import jsonl_index
from internvl_megatron.data.dataset import load_datasets
from tools.index_data import main


def write_meta(folder, names):
    entry = {"root": "", "data_augment": False, "repeat_time": 1}
    path = folder / "meta.json"
    path.write_text(json.dumps({name: {**entry, "annotation": f"{name}.jsonl"} for name in names}))
    return str(path)


def test_all_files_are_indexed_once(tmp_path, capsys, monkeypatch):
    for name, count in (("a", 3), ("b", 500)):
        (tmp_path / f"{name}.jsonl").write_text("{}\n" * count)
    meta = write_meta(tmp_path, "ab")
    assert main([meta, "--jobs", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [(line.split()[0], line.split()[1]) for line in lines[:2]] == [("indexed", "500"), ("indexed", "3")]
    assert lines[2].startswith("503 records")
    assert main([meta]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:2]] == ["there", "there"]
    assert main([meta, "--again"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:2]] == ["indexed", "indexed"]
    monkeypatch.setattr(jsonl_index, "build_index", None)
    assert [dataset.length for dataset in load_datasets(meta)] == [3, 500], "a run finds them"


def test_files_that_cannot_be_indexed(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("{}\n")
    assert main([write_meta(tmp_path, ["a", "none"])]) == 1
    out = capsys.readouterr().out
    assert "none.jsonl: cannot be read" in out and out.rstrip().endswith("; 1 failed")


@pytest.mark.parametrize("content", ["{", "{}"])
def test_a_wrong_meta_file(tmp_path, capsys, content):
    path = tmp_path / "meta.json"
    path.write_text(content)
    assert main([str(path)]) == 1
    assert "meta.json" in capsys.readouterr().err
