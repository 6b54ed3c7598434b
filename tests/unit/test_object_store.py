"""Files behind URLs, in fsspec's stores of this machine."""

import uuid
from pathlib import Path

import pytest

from internvl_megatron.object_store import file_sizes, get_file, in_store, is_url, put_file, remove


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    return f"memory://{uuid.uuid4().hex}" if request.param == "memory" else f"file://{tmp_path}/store"


def test_files_go_there_and_come_back(url: str, tmp_path: Path) -> None:
    assert file_sizes(url) == {}
    (tmp_path / "one").write_bytes(b"12345")
    (tmp_path / "two").write_bytes(b"")
    put_file(tmp_path / "one", f"{url}/a/b/one")
    put_file(tmp_path / "two", f"{url}/a/two")
    assert file_sizes(url) == {"a/b/one": 5, "a/two": 0}
    assert file_sizes(f"{url}/a/") == {"b/one": 5, "two": 0}
    get_file(f"{url}/a/b/one", tmp_path / "new" / "folder" / "one")
    assert (tmp_path / "new" / "folder" / "one").read_bytes() == b"12345"
    (tmp_path / "one").write_bytes(b"another")
    put_file(tmp_path / "one", f"{url}/a/b/one")
    assert file_sizes(url)["a/b/one"] == 7, "as it is now"
    remove(f"{url}/a/b")
    assert file_sizes(url) == {"a/two": 0}
    remove(f"{url}/a/b")
    with pytest.raises(FileNotFoundError):
        get_file(f"{url}/a/b/one", tmp_path / "none")


def test_no_path_leads_out_of_its_folder() -> None:
    url = f"memory://{uuid.uuid4().hex}"
    in_store(url, lambda system, place: system.store.update({f"{place}/../x": system.open(f"{place}/y", "wb")}))
    with pytest.raises(OSError, match="leads out of it"):
        file_sizes(url)


def test_errors_are_those_of_files(tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such bucket")

    with pytest.raises(OSError, match="RuntimeError: no such bucket"):
        in_store("memory://x", fail)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(NotADirectoryError):
        file_sizes(f"file://{tmp_path}/file/folder")
    with pytest.raises(OSError, match="nonsense"):
        file_sizes("nonsense://x")


@pytest.mark.parametrize(("path", "expected"), [("s3://x", True), ("a/b", False), ("c:/x", False), ("1://x", False)])
def test_is_url(path: str, expected: bool) -> None:
    assert is_url(path) is expected
