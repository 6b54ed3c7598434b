"""Where files of records may lie, files behind URLs, and reads that never end."""

import os
import socket
import threading
import time

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from internvl_megatron.data.dataset import load_datasets
from internvl_megatron.data.files import FileError, list_folder, locate, open_file, read_within
from internvl_megatron.data.images import image_size
from internvl_megatron.data.meta import read_meta
from internvl_megatron.data.step_rows import StepRows
from internvl_megatron.data.stream import SampleStream
from internvl_megatron.errors import ConfigError
from internvl_megatron.object_store import is_url
from tests.support.videos import write_video


@pytest.fixture
def tree(tmp_path):
    """A root with a file, a file beside it, and links of all kinds."""
    root, beside = tmp_path / "root", tmp_path / "root2"
    for folder in (root / "sub", beside):
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(b"x")
    (tmp_path / "secret").write_text("x")
    (root / "inward").symlink_to(root / "sub" / "a.png")
    (root / "outward").symlink_to(tmp_path / "secret")
    (root / "folder_out").symlink_to(beside)
    (root / "loop").symlink_to(root / "loop")
    (tmp_path / "other_name").symlink_to(root)
    return root


@pytest.mark.parametrize(
    "name", ["sub/a.png", "sub/../sub/a.png", "inward", "./sub//a.png", "none.png", "sub/ä 東.png", "."]
)
def test_names_inside_the_root(tree, name):
    assert os.path.realpath(locate(tree, name, False)) == os.path.realpath(tree / name)


def test_absolute_names_and_linked_roots(tree):
    inside = str(tree / "sub" / "a.png")
    assert locate(tree, inside, False) == inside
    assert locate(tree.parent / "other_name", inside, False) == inside, "the root's own links are followed"
    assert locate("/", inside, False) == inside


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "sub/../../secret",
        "/etc/passwd",
        "outward",
        "folder_out/a.png",
        "../root2/a.png",
        "..",
        "memory://a/b",
    ],
)
def test_names_that_lead_out_need_permission(tree, name):
    with pytest.raises(FileError, match=r"leads outside the data set's root .*data\.allow_outside_root") as caught:
        locate(tree, name, False)
    assert caught.value.fault == "path"
    located = locate(tree, name, True)
    assert located == name if is_url(name) else os.path.realpath(located) == os.path.realpath(tree / name)


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_names_that_are_no_paths(tree, name, allowed):
    with pytest.raises(FileError) as caught:
        locate(tree, name, allowed)
    assert caught.value.fault == "path"


def test_names_under_a_url():
    assert locate("s3://bucket/data", "a/b.png", False) == "s3://bucket/data/a/b.png"
    assert locate("s3://bucket/data/", "a/b.png", False) == "s3://bucket/data/a/b.png"
    assert locate("s3://bucket/data", "s3://bucket/data/x.png", False) == "s3://bucket/data/x.png"
    for name in ("../x.png", "a/../../x.png", "/etc/passwd", "s3://other/x.png", "s3://bucket/database/x", "gs://bucket/data/x",
                 "a/%2e%2E/x", "a%2F..%2Fx", "a\\..\\x", "file:///etc/passwd"):  # fmt: skip
        with pytest.raises(FileError) as caught:
            locate("s3://bucket/data", name, False)
        assert caught.value.fault == "path", name


def test_only_regular_files_are_opened(tmp_path):
    """Opening a pipe nobody writes to would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for path, what in [
            ("pipe", "not a regular file"),
            ("", "a folder"),
            ("socket", ""),
            ("/dev/zero", "not a regular"),
        ]:
            with (
                pytest.raises(FileError, match=rf"cannot be opened \(.*{what}") as caught,
                open_file(str(tmp_path / path)),
            ):
                pass
            assert caught.value.fault == "unreadable"


def test_missing_forbidden_and_looping_files(tree, tmp_path):
    for path, fault in [(tree / "none", "missing"), (tree / "sub/a.png/b", "missing"), (tree / "loop", "unreadable")]:
        with pytest.raises(FileError) as caught, open_file(str(path)):
            pass
        assert caught.value.fault == fault


def test_folders_are_listed_as_people_count(tmp_path):
    for name in ("f10", "f2", "f1", "g", "f02b", "10", "9"):
        (tmp_path / name).write_text("")
    assert list_folder(str(tmp_path)) == ["9", "10", "f1", "f2", "f02b", "f10", "g"]


def test_read_within_gives_results_and_errors():
    assert read_within(5, "a", lambda: 7) == 7
    for error in (KeyError("x"), TimeoutError("inside"), FileError("image", "y")):

        def fail(error=error):
            raise error

        with pytest.raises(type(error)) as caught:
            read_within(5, "a", fail)
        assert caught.value is error
    stuck = threading.Event()
    start = time.monotonic()
    with pytest.raises(FileError, match=r"a\.png: was not read within 0\.2 seconds") as caught:
        read_within(0.2, "a.png", stuck.wait)
    assert caught.value.fault == "timeout" and 0.2 <= time.monotonic() - start < 5
    stuck.set()


class StuckFileSystem(MemoryFileSystem):
    """Files whose name holds `stuck` are opened but never give a byte."""

    protocol = ("stuck",)
    released = threading.Event()

    def open(self, path, *args, **options):
        file = super().open(path.replace("stuck://", "memory://"), *args, **options)
        if "stuck.png" in path:
            setattr(file, "read", lambda *_: self.released.wait())
        return file


@pytest.fixture
def store(tmp_path):
    """A store in memory with a picture, a video and a folder of frames; the same behind `memory` and `stuck`."""
    fsspec.register_implementation("stuck", StuckFileSystem, clobber=True)
    StuckFileSystem.released.clear()
    memory = fsspec.filesystem("memory")
    Image.fromarray(np.arange(30 * 60 * 3, dtype=np.uint32).astype(np.uint8).reshape(30, 60, 3)).save(
        tmp_path / "a.png"
    )
    write_video(tmp_path / "film.mp4", [k / 25 for k in range(40)])
    content = {
        "a.png": "a.png",
        "stuck.png": "a.png",
        "film.mp4": "film.mp4",
        "film/f1.png": "a.png",
        "film/f2.png": "a.png",
    }
    for name, source in content.items():
        memory.pipe(f"/data/{name}", (tmp_path / source).read_bytes())
    yield tmp_path
    StuckFileSystem.released.set()
    memory.rm("/data", recursive=True)


def open_stream(meta, make_settings, small, **changes):
    settings = make_settings(**{"tokens_per_row": 256, "tiles_per_row": 40, "on_bad_sample": "skip", **changes})
    return SampleStream(load_datasets(meta), settings, small, 0, 1), settings


@pytest.mark.parametrize("root", ["memory://data", "memory://data/"])
def test_records_of_a_store(data_folder, talk, make_settings, small, store, root):
    names = [{"image": "a.png"}, {"video": "film.mp4"}, {"video": "film/"}, {"image": "../a.png"}, {"image": "none.png"},
             {"video": "none/"}, {"image": "memory://data/a.png"}, {"image": "film.mp4"}]  # fmt: skip
    meta = data_folder.dataset("a", [{**talk("?", "x"), **name} for name in names], root=root)
    assert read_meta(meta)[0].root == root
    stream, settings = open_stream(meta, make_settings, small, max_video_frames=9)
    rows = [stream.next_row() for _ in range(8)]
    assert {source.record for row in rows for source in row.sources} == {0, 1, 2, 6}
    assert set(stream.skipped) == {"path", "missing", "image"}
    decoded = StepRows(rows, range(8), settings, 0, 1).tiles()
    assert not decoded.failed
    picture = np.asarray(Image.open(store / "a.png").resize((28, 28), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    frames = [
        decoded.tiles[row, image]
        for row in range(8)
        for image, ref in enumerate(rows[row].images)
        if ref.path.endswith("film/")
    ]
    assert frames and all((tile == picture).all() for tiles in frames for tile in tiles)


def test_reads_that_get_stuck_are_bad_samples(data_folder, talk, make_settings, small, store, caplog):
    """In the header, by the one who makes rows, and later, by the one who decodes."""
    records = [{**talk("?", "x"), "image": name} for name in ("a.png", "stuck.png")]
    meta = data_folder.dataset("a", records, root="stuck://data")
    start = time.monotonic()
    stream, settings = open_stream(
        meta, make_settings, small, read_timeout_seconds=0.3, tokens_per_row=64, packing_buffer_rows=1
    )
    rows = [stream.next_row() for _ in range(2)]
    assert set(stream.skipped) == {"timeout"} and {source.record for row in rows for source in row.sources} == {0}
    assert "a.jsonl:2: field 'image': image stuck.png: was not read within 0.3 seconds" in caplog.text
    stuck = [type(ref)(ref.path.replace("/a.png", "/stuck.png"), *ref_fields(ref)) for ref in rows[0].images]
    object.__setattr__(rows[0], "images", tuple(stuck))
    decoded = StepRows(rows, range(2), settings, 0, 1).tiles()
    assert set(decoded.failed) == {(0, index) for index in range(len(stuck))} and decoded.tiles
    assert all("was not read within 0.3 seconds" in message for message in decoded.failed.values())
    assert time.monotonic() - start < 60


def ref_fields(ref):
    return ref.grid, ref.num_tiles, ref.jpeg_seed, ref.where, ref.video


def test_a_pipe_among_the_images(data_folder, talk, make_settings, small):
    os.mkfifo(data_folder.folder / "pipe.png")
    picture = data_folder.image("a.png", 30, 30)
    records = [{**talk("?", "x"), "image": name} for name in (picture, "pipe.png")]
    stream, _ = open_stream(data_folder.dataset("a", records), make_settings, small)
    rows = [stream.next_row() for _ in range(2)]
    assert {source.record for row in rows for source in row.sources} == {0}
    assert set(stream.skipped) == {"unreadable"}


@pytest.mark.parametrize(("allowed", "kinds"), [(True, set()), (False, {"path"})])
def test_files_outside_the_root_by_configuration(
    data_folder, talk, make_settings, small, tmp_path_factory, allowed, kinds
):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "b.png"
    Image.new("RGB", (30, 30)).save(elsewhere)
    (data_folder.folder / "link.png").symlink_to(elsewhere)
    picture = data_folder.image("a.png", 30, 30)
    records = [{**talk("?", "x"), "image": name} for name in (picture, str(elsewhere), "link.png")]
    stream, _ = open_stream(data_folder.dataset("a", records), make_settings, small, allow_outside_root=allowed)
    rows = [stream.next_row() for _ in range(8)]
    assert set(stream.skipped) == kinds
    assert {source.record for row in rows for source in row.sources} == ({0, 1, 2} if allowed else {0})


def test_frames_that_lead_outside_their_folder(data_folder, talk, make_settings, small, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "b.png"
    Image.new("RGB", (30, 30)).save(elsewhere)
    (data_folder.folder / "film").mkdir()
    (data_folder.folder / "film" / "1.png").symlink_to(elsewhere)
    meta = data_folder.dataset("a", [{**talk("?", "x"), "video": "film"}, talk("a", "b " * 60)])
    stream, _ = open_stream(meta, make_settings, small)
    stream.next_row()
    assert set(stream.skipped) == {"path"}


def test_a_url_without_its_program_stops_the_run(data_folder, talk, make_settings, small):
    """It would be every sample of the data set: nothing to leave out and go on."""
    meta = data_folder.dataset("a", [{**talk("?", "x"), "image": "a.png"}], root="adl://none/data")
    stream, _ = open_stream(meta, make_settings, small)
    with pytest.raises(ConfigError, match=r"adl://none/data/a\.png"):
        stream.next_row()
    with pytest.raises(FileError, match=r"cannot be opened \(.*nosuch") as caught:
        image_size("nosuch://a/b.png")
    assert caught.value.fault == "unreadable"
