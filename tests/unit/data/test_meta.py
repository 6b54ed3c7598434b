"""Meta files and jsonl files: what is read, and what is said when they are wrong."""

import json

import numpy as np
import pytest

from internvl_megatron.data.meta import Dataset, load_datasets, read_meta
from internvl_megatron.errors import DataError

GOOD = {"root": "images", "annotation": "a.jsonl", "data_augment": True, "repeat_time": 1}


def write(folder, content):
    path = folder / "meta.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_paths_are_relative_to_the_meta_file_unless_absolute(tmp_path):
    entries = {
        "a": {**GOOD, "max_dynamic_patch": 6, "length": 9},
        "b": {**GOOD, "root": "/x", "annotation": "/y.jsonl"},
    }
    a, b = read_meta(write(tmp_path, entries))
    assert (a.name, a.root, a.annotation) == ("a", tmp_path / "images", tmp_path / "a.jsonl")
    assert (a.data_augment, a.repeat_time, a.max_tiles) == (True, 1.0, 6)
    assert (str(b.root), str(b.annotation), b.max_tiles) == ("/x", "/y.jsonl", None)


@pytest.mark.parametrize("key", ["root", "annotation", "data_augment", "repeat_time"])
def test_missing_keys(tmp_path, key):
    entry = {name: value for name, value in GOOD.items() if name != key}
    with pytest.raises(DataError, match=rf"meta\.json: faces: '{key}' is missing"):
        read_meta(write(tmp_path, {"faces": entry}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repeat_tme": 1}, "'repeat_tme' is not a known key; did you mean 'repeat_time'"),
        ({"data_augment": "yes"}, "'data_augment' must be true or false, not \"yes\""),
        ({"repeat_time": 1.5}, "'repeat_time' must be a fraction between 0 and 1 or a whole number"),
        ({"repeat_time": 0}, "'repeat_time' must be"),
        ({"repeat_time": float("nan")}, "'repeat_time' must be"),
        ({"repeat_time": True}, "'repeat_time' must be"),
        ({"max_dynamic_patch": 0}, "'max_dynamic_patch' must be a whole number from 1"),
        ({"length": "many"}, "'length' must be a whole number"),
        ({"root": None}, "'root' must be a string"),
        ({"annotation": ""}, "'annotation' must be the path"),
    ],
)
def test_wrong_values(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        read_meta(write(tmp_path, {"faces": {**GOOD, **change}}))


def test_all_problems_at_once(tmp_path):
    with pytest.raises(DataError) as caught:
        read_meta(write(tmp_path, {"a": {**GOOD, "root": 1}, "b": [], "c": {**GOOD, "repeat_time": -1}}))
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not a valid meta file"), ("{}", "one entry per data set"), ("[1]", "one entry per data set"),
     ('{"a": 1, "a": 2}', "a given more than once"), ("[" * 100000, "not a valid meta file")],
)  # fmt: skip
def test_not_a_meta_file(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read_meta(write(tmp_path, content))


def test_missing_files(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.json: cannot be read .*set data\.meta"):
        read_meta(tmp_path / "nothing.json")
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read .*check 'annotation'"):
        load_datasets(write(tmp_path, {"faces": GOOD}))


def test_records_are_found_by_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"id": 0, "t": "東京"}\n\n  \n{"id": 1}\r\n{"id": 2}'.encode())
    (dataset,) = load_datasets(write(tmp_path, {"faces": GOOD}))
    assert [dataset.file.read(i)["id"] for i in (2, 0, 1)] == [2, 0, 1]
    assert [dataset.file.where(i).rpartition(":")[2] for i in range(3)] == ["1", "4", "5"]


@pytest.mark.parametrize(
    ("line", "message"),
    [("{oops", "is not valid JSON"), ("[1]", "is a JSON list"), ('{"a": "\udcff"}', "is not valid JSON"),
     ("[" * 100000, "is not valid JSON")],
)  # fmt: skip
def test_bad_lines_are_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"id": 0}\n' + line.encode(errors="surrogateescape") + b"\n")
    (dataset,) = load_datasets(write(tmp_path, {"faces": GOOD}))
    with pytest.raises(DataError, match=rf"a\.jsonl:2: {message}"):
        dataset.file.read(1)


def test_empty_annotation(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match=r"a\.jsonl: has no records"):
        load_datasets(write(tmp_path, {"faces": GOOD}))


@pytest.mark.parametrize(
    ("repeat_time", "records"),
    [(1, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]), (0.35, [0, 1, 2]), (2, sorted([*range(10), *range(10)])), (3.0, None)],
)
def test_repeat_time(tmp_path, repeat_time, records):
    (tmp_path / "a.jsonl").write_text('{"id": 0}\n' * 10)
    (dataset,) = load_datasets(write(tmp_path, {"faces": {**GOOD, "repeat_time": repeat_time}}))
    order = dataset.shuffled_records(np.random.default_rng(0))
    assert sorted(order.tolist()) == (records or sorted([*range(10)] * 3))
    assert len(order) == dataset.length


def test_a_fraction_that_leaves_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 0}\n')
    (entry,) = read_meta(write(tmp_path, {"faces": {**GOOD, "repeat_time": 0.5}}))
    with pytest.raises(DataError, match=r"repeat_time 0\.5 leaves none of its 1 records"):
        Dataset(entry)
