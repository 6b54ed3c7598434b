"""Public files are read row by row, their pictures when they are wanted; what is wrong with them is said with file, line and field."""

import base64
import csv
import io
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from internvl_megatron.errors import DataError
from internvl_megatron.evaluate.sources import tsv_table
from internvl_megatron.evaluate.sources.json_records import read_json_lines, read_json_list
from internvl_megatron.evaluate.sources.named_file import named_picture
from internvl_megatron.evaluate.sources.parquet_table import read_parquet
from internvl_megatron.evaluate.sources.picture import Picture
from internvl_megatron.evaluate.sources.record import Record, spelled_list
from internvl_megatron.evaluate.sources.tsv_table import read_tsv
from tests.support.miniature_benchmarks import hub_picture, picture_bytes, picture_text, write_parquet, write_tsv


def read_whole(picture: Picture) -> bytes:
    assert picture.read is not None
    return picture.read()


@pytest.mark.parametrize("chunk", [7, 100, 2**24])
def test_rows_are_those_of_the_csv_module(tmp_path, monkeypatch, chunk):
    """Random tables with quotes, tabs and line breaks in their cells, also where a cell spans pieces of the file."""
    monkeypatch.setattr(tsv_table, "_CHUNK_BYTES", chunk)
    rng = random.Random(chunk)
    for number in range(20):
        rows = [
            {
                name: "".join(rng.choices('ab"\t\n ä数', k=rng.randint(0, 6)))
                for name in ("index", "question", "answer")
            }
            for _ in range(rng.randint(1, 9))
        ]
        path = tmp_path / f"{number}.tsv"
        write_tsv(path, [{**row, "x": "end"} for row in rows])
        assert [dict(record.fields) for record in read_tsv(path, ("question",))] == [
            {name: cell or None for name, cell in row.items()} | {"x": "end"} for row in rows
        ]


def test_pictures_of_a_table_are_decoded_when_wanted(tmp_path):
    rows = [
        {"index": 1, "question": "a\nb", "image": picture_text(1)},
        {"index": 2, "question": "several", "image": str([picture_text(2), picture_text(3)])},
        {"index": 3, "question": "of row 1", "image": "1"},
        {"index": 4, "question": "none", "image": ""},
        {"index": 5, "question": "broken", "image": "%" * 200},
    ]
    path = tmp_path / "t.tsv"
    write_tsv(path, rows)
    records = read_tsv(path, ("index", "question", "image"))
    assert [[read_whole(picture) for picture in record.images("image", needed=False)] for record in records[:4]] == [
        [picture_bytes(1)],
        [picture_bytes(2), picture_bytes(3)],
        [picture_bytes(1)],
        [],
    ]
    assert [record.where.rpartition(":")[2] for record in records] == ["2", "4", "5", "6", "7"]
    assert len({picture.version for record in records for picture in record.images("image", needed=False)}) == 4
    with pytest.raises(DataError, match=r"t\.tsv:7: field 'image': is not base64"):
        read_whole(records[4].images("image")[0])


def test_a_large_table_is_not_held_in_memory(tmp_path, monkeypatch):
    """Records of a table of 16 MB take a hundredth of it."""
    import tracemalloc

    monkeypatch.setattr(tsv_table, "_CHUNK_BYTES", 2**18)
    path = tmp_path / "large.tsv"
    picture = base64.b64encode(bytes(3 * 2**17)).decode()
    write_tsv(path, [{"index": number, "question": "which?", "image": picture} for number in range(32)])
    tracemalloc.start()
    records = read_tsv(path, ("index",))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 16e6 and len(records) == 32
    assert kept < 0.01 * path.stat().st_size
    assert peak < 0.5 * path.stat().st_size, "a piece of the file at a time, and a row"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"t\.tsv: has no rows"),
        (b"index\tquestion\n", r"t\.tsv: has no rows"),
        (b"index\ttext\n1\tx\n", r"t\.tsv: has no column 'question'; columns are index, text"),
        (b"index\tquestion\n1\tx\n2\n", r"t\.tsv:3: has 1 fields, the table 2 columns"),
        (b'index\tquestion\n1\t"x\n2\ty\n', r"t\.tsv: a quotation mark is never closed"),
        (b"index\tquestion\n1\t\xff\n", r"t\.tsv:2: is no row of a table"),
        (b"index\tquestion\timage\n1\tx\t9\n", r"t\.tsv:2: field 'image': is the index '9', and no row"),
    ],
)
def test_a_wrong_table(tmp_path, content, message):
    path = tmp_path / "t.tsv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_tsv(path, ("index", "question"))


def test_parquet_rows_and_pictures(tmp_path):
    rows = [{"question": f"{n}?", "image": hub_picture(n) if n % 3 else None, "answer": [n, n + 1]} for n in range(7)]
    write_parquet(tmp_path / "a.parquet", rows[:5])
    write_parquet(tmp_path / "b.parquet", rows[5:])
    records = read_parquet([tmp_path / "a.parquet", tmp_path / "b.parquet"], ("question", "answer"), ("image",))
    assert [record.text("question") for record in records] == [f"{n}?" for n in range(7)]
    assert records[1].texts("answer") == ["1", "2"]
    for number in (4, 1, 2, 5):
        assert read_whole(records[number].images("image")[0]) == picture_bytes(number)
    with pytest.raises(DataError, match=r"a\.parquet: row 4: field 'image': has no picture"):
        records[3].images("image")


def test_a_wrong_parquet_file(tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"question": "x"}])
    with pytest.raises(DataError, match=r"a\.parquet: has no column 'image'; columns are question"):
        read_parquet([tmp_path / "a.parquet"], ("question",), ("image",))
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match=r"b\.parquet: cannot be read"):
        read_parquet([tmp_path / "b.parquet"], ("question",))
    pq.write_table(pa.table({"question": ["x"], "image": ["text"]}), tmp_path / "c.parquet")
    (record,) = read_parquet([tmp_path / "c.parquet"], ("question",), ("image",))
    with pytest.raises(DataError, match=r"c\.parquet: row 1: field 'image': has no bytes"):
        read_whole(record.images("image")[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"a\.json: is not valid JSON"),
        ("[]", r"a\.json: must be a list of records"),
        ('{"data": []}', r"a\.json: must be a list of records"),
        ('[{"a": 1}, 3]', r"a\.json: record 2: is a JSON int"),
        ('[{"a": 1}, {"b": 1}]', r"a\.json: record 2: field 'a': is not there; fields are b"),
    ],
)
def test_a_wrong_json_list(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_json_list(tmp_path / "a.json", ("a",))


def test_a_wrong_json_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": null}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:3: field 'a': is not there"):
        read_json_lines(tmp_path / "a.jsonl", ("a",))
    with pytest.raises(DataError, match=r"b\.jsonl: No such file"):
        read_json_lines(tmp_path / "b.jsonl", ("a",))


def test_pictures_are_found_in_the_folder_alone(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(picture_bytes(1))
    (root / "link.png").symlink_to("../secret.png")
    record = Record({}, "a.json: record 1")
    for name in ("../secret.png", "/etc/hostname", "link.png", "a\0b", "https://example.com/a.png"):
        with pytest.raises(DataError, match=r"a\.json: record 1: field 'image'"):
            named_picture(root, name, record, "image")
    with pytest.raises(DataError, match=r"a\.json: record 1: field 'image': .*nowhere\.png: No such file"):
        named_picture(root, "nowhere.png", record, "image")


def test_fields_are_checked_when_they_are_asked_for():
    record = Record({"a": [1], "b": "\ud800", "c": "x", "d": None, "e": "['x', \"y's\"]", "f": 2.0, "g": "[]"}, "t:1")
    assert (record.texts("e"), record.integer("f"), record.texts("a")) == (["x", "y's"], 2, ["1"])
    for name, read, message in [
        ("a", record.text, "must be a text"), ("b", record.text, "surrogate"), ("c", record.number, "must be a number"),
        ("d", record.text, "is not there"), ("c", record.texts, "must be a list"), ("g", record.texts, "has 0 entries"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=f"t:1: field '{name}': .*{message}"):
            read(name)
    assert spelled_list("[" * 100_000) is None
    assert spelled_list("[print(1)]") is None
    assert spelled_list('["a", null]') == ["a", None]


def test_fields_of_csv_are_as_large_as_they_have_to_be(tmp_path):
    """A picture is longer than the csv module's own limit."""
    text = "x" * 200_000
    write_tsv(tmp_path / "t.tsv", [{"index": 1, "question": text}])
    assert read_tsv(tmp_path / "t.tsv", ("question",))[0].text("question") == text
    assert next(csv.reader(io.StringIO(text))) == [text]
