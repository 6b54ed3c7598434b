"""The index of a jsonl file: the same records as reading line by line, never trusted when it does not fit."""

import os
import pickle
import random
import threading
import time

import pytest

from internvl_megatron.data import jsonl_index
from internvl_megatron.data.jsonl_file import JsonlFile
from internvl_megatron.data.jsonl_index import (
    HEADER_BYTES,
    build_index,
    find_index,
    index_all,
    index_in_memory,
    index_places,
    open_index,
)
from internvl_megatron.errors import DataError


def by_lines(content):
    """(line number, start, bytes) of every record, read the plain way."""
    found, start = [], 0
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            found.append((number, start, line))
        start += len(line) + 1
    return found


def records(source, index):
    """The same from an index."""
    content = source.read_bytes()
    spans = [index.span(record) for record in range(len(index))]
    return [
        (index.line(record), start, content[start:end].split(b"\n")[0]) for record, (start, end) in enumerate(spans)
    ]


def write(folder, content):
    path = folder / "a.jsonl"
    path.write_bytes(content)
    return path


CONTENTS = {
    "plain": b'{"a": 1}\n{"b": 2}\n',
    "no final newline": b'{"a": 1}\n{"b": 2}',
    "windows": b'{"a": 1}\r\n\r\n{"b": 2}\r\n',
    "empty": b"",
    "blank": b"\n \t\r\n\v\f\n",
    "blank at both ends": b"\n\n{}\n\n\n",
    "blank last line without newline": b"{}\n  ",
    "spaces before": b'  {"a": 1}\n\t{}\n   \n {}',
    "one": b"1",
    "binary": bytes(range(256)) * 40,
    "nulls": bytes(5000),
    "gaps": b"{}\n" + b"\n" * 50 + b"{}\n" + b" \n{}\n" * 30,
}


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 7, 64, 4 * 2**20])
@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_records_are_those_of_the_lines(tmp_path, monkeypatch, content, block_bytes):
    monkeypatch.setattr(jsonl_index, "BLOCK_BYTES", block_bytes)
    source = write(tmp_path, content)
    for index in (build_index(source), index_in_memory(source), pickle.loads(pickle.dumps(build_index(source)))):
        assert len(index) == len(by_lines(content))
        assert records(source, index) == by_lines(content)


@pytest.mark.parametrize("seed", range(40))
def test_records_of_random_bytes(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    monkeypatch.setattr(jsonl_index, "BLOCK_BYTES", rng.choice([5, 16, 100]))
    content = b"".join(rng.choices([b"\n", b" ", b"\r\n", b"x", b"{}", b"\0", b"\xff", b"a" * 30], k=300))
    source = write(tmp_path, content)
    build_index(source)
    index = find_index(source)
    assert index is not None and records(source, index) == by_lines(content)


def test_it_is_made_once(tmp_path):
    source = write(tmp_path, b"{}\n" * 1000)
    assert find_index(source) is None
    open_index(source)
    (kept,) = index_places(source, None)
    before = kept.stat()
    assert kept.name == "a.jsonl.index" and before.st_size == HEADER_BYTES + 8 * 1000
    assert len(open_index(source)) == 1000
    after = kept.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.index"], "nothing else is left"


def rewrite(source, content, same_time):
    before = source.stat()
    source.write_bytes(content)
    changed = before.st_mtime_ns if same_time else before.st_mtime_ns + 1
    os.utime(source, ns=(before.st_atime_ns, changed))


@pytest.mark.parametrize("same_time", [False, True])
@pytest.mark.parametrize(
    "content",
    [b"{}\n" * 90 + b"{ }\n" * 10, b"{}\n" * 101, b"{}\n" * 99, b'1\n"' * 100, b"{}\n" * 99 + b"\n{}"],
    ids=["longer", "one more", "one less", "same size", "same size, at the end"],
)
def test_a_changed_source_is_indexed_anew(tmp_path, content, same_time):
    source = write(tmp_path, b"{}\n" * 100)
    build_index(source)
    rewrite(source, content, same_time)
    assert find_index(source) is None
    assert records(source, open_index(source)) == by_lines(content)


def test_a_touched_source_is_indexed_anew(tmp_path):
    source = write(tmp_path, b"{}\n" * 100_000)
    build_index(source)
    rewrite(source, source.read_bytes(), same_time=False)
    assert find_index(source) is None


def damages():
    def cut(content):
        return content[:-1]

    def longer(content):
        return content + bytes(8)

    def flip(at):
        def damage(content):
            return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

        return damage

    yield from ((cut, "cut"), (longer, "longer"), (lambda content: content[:100], "half a header"))
    yield from ((lambda _: b"", "empty"), (lambda content: b"x" * len(content), "garbage"))
    yield from ((flip(at), f"byte {at}") for at in (0, 8, 12, 30, 60))


@pytest.mark.parametrize(("damage", "name"), list(damages()))
def test_a_damaged_index_is_made_anew(tmp_path, damage, name):
    source = write(tmp_path, b"{}\n" * 100)
    build_index(source)
    (kept,) = index_places(source, None)
    good = kept.read_bytes()
    kept.write_bytes(damage(good))
    assert find_index(source) is None, name
    open_index(source)
    assert kept.read_bytes() == good


def test_an_index_of_another_version_is_made_anew(tmp_path, monkeypatch):
    source = write(tmp_path, b"{}\n" * 100)
    monkeypatch.setattr(jsonl_index, "_VERSION", 2)
    build_index(source)
    monkeypatch.undo()
    assert find_index(source) is None


def test_lost_pages_are_noticed(tmp_path):
    source = write(tmp_path, b"{}\n" * 100)
    index = build_index(source)
    assert index.path is not None
    content = index.path.read_bytes()
    index.path.write_bytes(content[: HEADER_BYTES + 80] + bytes(160) + content[HEADER_BYTES + 240 :])
    file = JsonlFile(source, find_index(source))
    assert file.read(5) == {} and file.read(50) == {}
    for record in range(9, 30):
        with pytest.raises(DataError, match=r"a\.jsonl\.index: is damaged .*; delete it, and it is made again"):
            file.read(record)


def test_an_index_that_is_replaced_or_deleted_while_in_use(tmp_path):
    source = write(tmp_path, b"{}\n" * 100)
    file = JsonlFile(source, build_index(source))
    build_index(source)  # another process made the same
    assert file.read(3) == {}
    rewrite(source, b"[]\n" * 100, same_time=False)
    build_index(source)
    with pytest.raises(DataError, match=r"a\.jsonl: has changed while it was in use"):
        file.read(3)
    index_places(source, None)[0].unlink()
    with pytest.raises(DataError, match=r"a\.jsonl\.index: cannot be read any more .*start again"):
        file.read(3)


@pytest.mark.parametrize(
    "content",
    [b"{}\n" * 49, b"", b'{"a": 1}\n' * 30, b"{}\n" * 50 + b"   " * 50, b"{}\n" * 69 + b"[ ]{}\n" + b"{}\n" * 29],
    ids=["cut", "empty", "other lines", "not ended", "not begun"],
)
def test_a_source_that_changes_after_it_was_opened(tmp_path, content):
    source = write(tmp_path, b"{}\n" * 100)
    file = JsonlFile(source, open_index(source))
    rewrite(source, content, same_time=True)
    with pytest.raises(DataError, match=r"a\.jsonl:71: is not where it was .*put the file back .* or start again"):
        file.read(70)


def test_it_goes_into_the_folder_if_not_beside(tmp_path, monkeypatch):
    data, folder = tmp_path / "data", tmp_path / "run" / "index"
    data.mkdir()
    source, twin = write(data, b"{}\n"), tmp_path / "a.jsonl"
    twin.write_bytes(b"[]\n[]\n")
    (data / "a.jsonl.index").mkdir()  # cannot be replaced, whoever asks
    with pytest.raises(DataError, match=r"cannot be written: .*a\.jsonl\.index .*set data\.index_folder"):
        open_index(source)
    (tmp_path / "a.jsonl.index").mkdir()
    assert len(open_index(source, folder)) == 1 and len(open_index(twin, folder)) == 2
    assert len(list(folder.iterdir())) == 2, "files of the same name do not share one"
    monkeypatch.setattr(jsonl_index, "build_index", None)
    assert len(open_index(source, folder)) == 1 and len(open_index(twin, folder)) == 2


def test_a_full_disk(tmp_path, monkeypatch):
    source = write(tmp_path, b"{}\n" * 10)

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"a\.jsonl\.index \(No space left on device\)"):
        build_index(source)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read \(No such file .*check 'annotation'"):
        open_index(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is not a file"):
        open_index(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is not a file"):
        open_index(tmp_path / "pipe")


def test_a_source_that_is_being_written(tmp_path, monkeypatch):
    source = write(tmp_path, b"{}\n" * 10)
    probe = jsonl_index._probe

    def appended(file):
        with source.open("ab") as more:
            more.write(b"{}\n")
        return probe(file)

    monkeypatch.setattr(jsonl_index, "_probe", appended)
    with pytest.raises(DataError, match=r"a\.jsonl: changes while it is indexed"):
        build_index(source)


def test_builders_at_the_same_time(tmp_path):
    source = write(tmp_path, b'{"id": 1}\n' * 20_000)
    results = []

    def build():
        index = build_index(source)
        results.append([index.span(record) for record in (0, 7, 19_999)])

    threads = [threading.Thread(target=build) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [[(0, 10), (70, 80), (199_990, 200_000)]] * 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.index"]


def test_all_problems_of_several_files_at_once(tmp_path):
    good = write(tmp_path, b"{}\n")
    with pytest.raises(DataError) as caught:
        index_all([tmp_path / "x", good, tmp_path / "y", good], None, 2)
    assert [line.split(": ")[0].rpartition("/")[2] for line in str(caught.value).splitlines()] == ["x", "y"]
    assert find_index(good) is not None


def test_a_million_lines(tmp_path):
    """The whole of the benchmark in small: quick to make, open and read, in whatever order."""
    lines = b"".join(b'{"id": %d, "text": "%s"}\n' % (number, b"x" * (number % 50)) for number in range(1000))
    source = tmp_path / "a.jsonl"
    with source.open("wb") as file:
        for _ in range(1000):
            file.write(lines)
    start = time.perf_counter()
    open_index(source)
    assert time.perf_counter() - start < 10
    start = time.perf_counter()
    file = JsonlFile(source, open_index(source))
    assert time.perf_counter() - start < 1
    assert len(file) == 1_000_000
    for record in (0, 999_999, *random.Random(0).sample(range(1_000_000), 200)):
        assert file.read(record)["id"] == record % 1000
        assert file.where(record) == f"{source}:{record + 1}"
