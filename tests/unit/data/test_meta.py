"""Meta files and jsonl files: what is read, and what is said when they are wrong."""

import json

import pytest

from internvl_megatron.data.dataset import Dataset, load_datasets
from internvl_megatron.data.meta import read_meta
from internvl_megatron.errors import DataError

GOOD = {"root": "images", "annotation": "a.jsonl", "data_augment": True, "repeat_time": 1}


def write(folder, content):
    path = folder / "meta.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_paths_are_relative_to_the_meta_file_unless_absolute(tmp_path):
    entries = {
        "a": {**GOOD, "max_dynamic_patch": 6, "length": 9, "group": "text"},
        "b": {**GOOD, "root": "/x", "annotation": "/y.jsonl"},
    }
    a, b = read_meta(write(tmp_path, entries))
    assert (a.name, a.root, a.annotation) == ("a", tmp_path / "images", tmp_path / "a.jsonl")
    assert (a.data_augment, a.repeat_time, a.max_tiles) == (True, 1.0, 6)
    assert (a.group, b.group) == ("text", None)
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
        ({"group": ""}, "'group' must be the name of a group"),
        ({"group": 3}, "'group' must be the name of a group"),
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
    for epoch in (0, 1):
        samples = [dataset.sample(0, epoch, place) for place in range(dataset.length)]
        assert sorted(record for record, _ in samples) == (records or sorted([*range(10)] * 3))
        repeats = max(1, int(repeat_time))
        passes = {number: sorted(r for r, n in samples if n == number) for number in {n for _, n in samples}}
        assert sorted(passes) == list(range(epoch * repeats, (epoch + 1) * repeats))
        assert all(used == sorted(set(used)) and len(used) == dataset.num_records for used in passes.values())


def test_orders_differ_by_seed_epoch_and_name(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 0}\n' * 1000)
    one, other = load_datasets(write(tmp_path, {"one": GOOD, "other": GOOD}))
    places = range(0, 1000, 100)

    def order(dataset, seed, epoch):
        return [dataset.sample(seed, epoch, place)[0] for place in places]

    orders = [order(dataset, seed, epoch) for dataset in (one, other) for seed in range(3) for epoch in range(7)]
    assert len({tuple(records) for records in orders}) == len(orders)
    assert orders[0] == order(one, 0, 0), "orders that were given up are made again"


def test_a_fraction_that_leaves_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 0}\n')
    (entry,) = read_meta(write(tmp_path, {"faces": {**GOOD, "repeat_time": 0.5}}))
    with pytest.raises(DataError, match=r"repeat_time 0\.5 leaves none of its 1 records"):
        Dataset(entry)
