"""WebDataset stores: built by energon's own command, read as the same records in a jsonl file are, and refused when broken."""

import io
import json
import pickle
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from internvl_megatron.data.dataset import load_datasets, prepare_records
from internvl_megatron.data.decode_pool import DecodePool
from internvl_megatron.data.energon_store import EnergonStore
from internvl_megatron.data.files import FileError, Span, open_file
from internvl_megatron.data.images import ImageRef, decode_tiles, image_size
from internvl_megatron.data.meta import read_meta
from internvl_megatron.data.records import SampleError
from internvl_megatron.data.row_bytes import row_to_bytes, rows_from_bytes
from internvl_megatron.data.stream import SampleStream, render_source
from internvl_megatron.data.video import VideoFrames
from internvl_megatron.errors import ConfigError, DataError
from tests.support.videos import write_video

pytest.importorskip("megatron.energon")
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")  # `energon prepare` forks

NUM_RECORDS, PER_SHARD = 22, 6
"""Of the store that most tests read: four shards, the last with four samples."""


def write_shard(path, samples, **options):
    """A tar of samples {key: {extension: bytes}}."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for key, members in samples.items():
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def prepare(folder, *options):
    """What a user runs."""
    from click.testing import CliRunner
    from megatron.energon.cli.main import main

    options = options or ("--split-ratio", "1,0,0")
    arguments = ["prepare", "--non-interactive", "--skip-dataset-yaml", "--num-workers", "1", *options, str(folder)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output


def png(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_meta(folder, **entries):
    defaults = {"root": "", "data_augment": False, "repeat_time": 1}
    path = folder / "meta.json"
    path.write_text(json.dumps({name: {**defaults, **entry} for name, entry in entries.items()}))
    return path


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same records as a store and as a jsonl file: text, one image, several, one that the record does not name, video."""
    folder = tmp_path_factory.mktemp("both")
    write_video(folder / "film.mp4", [k / 10 for k in range(30)])
    film = (folder / "film.mp4").read_bytes()
    lines, samples = [], {}
    for number in range(NUM_RECORDS):
        key, kind = f"{number:04d}", number % 5
        texts = {0: "how many?", 1: "<image>see", 2: "<image><image>see", 3: "see", 4: "<video>see"}
        turns = [
            {"from": "human", "value": texts[kind]},
            {"from": "gpt", "value": "seven " * (1 + number % 7) + "東京"},
        ]
        record, names = {"id": number, "conversations": turns}, []
        members = {"json": b""}
        for image in range({1: 1, 2: 2, 3: 1}.get(kind, 0)):
            extension = f"{image}.png" if kind == 2 else "png"
            names.append((extension, f"{key}.{extension}"))
            members[extension] = png(30 + 20 * (number % 3), 60 - 10 * (number % 4), seed=number + image)
        if kind == 4:
            members["mp4"] = film
        for extension, content in members.items():
            (folder / f"{key}.{extension}").write_bytes(content)
        on_line, in_store = dict(record), dict(record)
        if kind == 1:
            on_line["image"], in_store["image"] = names[0][1], names[0][number // 5 % 2]
        elif kind == 2:
            on_line["image"], in_store["image"] = [name for _, name in names], [names[0][0], names[1][1]]
        elif kind == 3:
            on_line["image"] = names[0][1]
        elif kind == 4:
            on_line |= {"video": f"{key}.mp4", "clip": [0.5, 2]}
            in_store |= {"video": "mp4", "clip": [0.5, 2]}
        lines.append(json.dumps(on_line))
        samples[key] = {**members, "json": json.dumps(in_store, ensure_ascii=False).encode()}
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    for start in range(0, NUM_RECORDS, PER_SHARD):
        part = {key: samples[key] for key in list(samples)[start : start + PER_SHARD]}
        write_shard(folder / "store" / f"shard-{start // PER_SHARD:03d}.tar", part)
    prepare(folder / "store")
    return folder


@pytest.fixture
def open_stream(both, make_settings, small, tmp_path):
    """A stream over the records in one form or the other, under the same name."""

    def make(annotation, index=0, num_streams=1, **changes):
        entry = {"root": str(both), "annotation": str(both / annotation), "data_augment": True, "repeat_time": 2}
        (tmp_path / annotation).mkdir(exist_ok=True)
        settings = make_settings(v2pe="random", max_video_frames=9, **changes)
        return SampleStream(
            load_datasets(write_meta(tmp_path / annotation, mixed=entry)), settings, small, index, num_streams
        )

    return make


def content(row):
    """All of a row that is trained on, tiles decoded."""
    arrays = [row.token_ids, row.targets, row.weights, row.positions, row.segment_lengths, row.tile_starts]
    tiles = [decode_tiles(image, 28, True) for image in row.images]
    return row.sources, [array.tolist() for array in arrays], [part.tobytes() for part in tiles]


def test_rows_equal_those_of_the_same_records_in_a_jsonl_file(open_stream):
    """Over more than an epoch, JPEG augmentation, position steps and frames of videos included."""
    lines, store = open_stream("a.jsonl"), open_stream("store")
    kinds, passes = set(), set()
    for _ in range(25):
        expected, row = lines.next_row(), store.next_row()
        passes |= {source.pass_number for source in row.sources}
        assert content(row) == content(expected)
        kinds |= {(image.kind, image.jpeg_seed is not None, image.span is not None) for image in row.images}
        assert all(image.span is None for image in expected.images)
    assert kinds == {("image", True, True), ("video", True, True)}
    assert passes >= {0, 1, 2, 3}, "not more than an epoch of two passes"


def test_a_saved_position_gives_the_same_rows(open_stream):
    stream = open_stream("store", 1, 2)
    for _ in range(5):
        stream.next_row()
    state = json.loads(json.dumps(stream.state_dict()))
    expected = [row_to_bytes(0, stream.next_row()) for _ in range(6)]
    again = open_stream("store", 1, 2)
    again.load_state_dict(state)
    assert [row_to_bytes(0, again.next_row()) for _ in range(6)] == expected


def test_rows_travel_with_the_places_of_their_members(open_stream):
    stream = open_stream("store")
    for _ in range(6):
        row = stream.next_row()
        (back,) = rows_from_bytes(row_to_bytes(3, row)).values()
        assert back.images == row.images and hash(back.images) == hash(row.images)


def test_members_are_decoded_by_processes_that_import_neither_energon_nor_torch(both, open_stream):
    row = next(row for row in iter(open_stream("store").next_row, None) if len({i.kind for i in row.images}) == 2)
    pool = DecodePool(1, 28, True, 60)
    try:
        for image in row.images:
            assert np.array_equal(pool.submit(image).result(), decode_tiles(image, 28, True))
        (pid,) = pool.pids()
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "torch" not in maps and "sqlite" not in maps
    finally:
        pool.close()
    code = (
        "import sys; from internvl_megatron.data import decode_worker, meta, stream; "
        "sys.exit(bool({'torch', 'megatron', 'megatron.energon', 'webdataset'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0, (
        "imported before a store is named"
    )


def test_records_are_found_by_number_from_any_thread_and_process(both):
    store = EnergonStore(both / "store")
    assert len(store) == NUM_RECORDS
    copy = pickle.loads(pickle.dumps(store))
    order = [*np.random.default_rng(0).permutation(NUM_RECORDS).tolist()] * 20
    for records in (store, copy):
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda index, of=records: of.read(index)["id"], order)) == order
    assert store.where(13) == f"{both}/store/shard-002.tar:0013"
    descriptors = {path.resolve().name for path in Path("/proc/self/fd").iterdir()}
    assert not {name for name in descriptors if name.endswith((".tar", ".sqlite"))}, "holds a file open"


def test_splits(tmp_path):
    """Training reads `train`, shards in the order of split.yaml, without what it excludes; `split` says another."""
    for shard in "abc":
        samples = {f"x/{shard}{n}": {"json": json.dumps({"id": f"{shard}{n}"}).encode()} for n in range(4)}
        write_shard(tmp_path / "store" / f"{shard}.tar", samples)
    prepare(tmp_path / "store", "--split-parts", "train:[ac].tar", "--split-parts", "val:b.tar")
    split = tmp_path / "store" / ".nv-meta" / "split.yaml"
    split.write_text(
        "split_parts: {train: [c.tar, a.tar], val: [b.tar], none: []}\n"
        "exclude: [c.tar/x/c1, c.tar/x/c2, a.tar/x/a0, b.tar/x/b3, a.tar/x/a9]\n"
    )
    entry = {"annotation": "store"}
    train, val = load_datasets(write_meta(tmp_path, train=entry, val={**entry, "split": "val"}))
    assert [train.file.read(n)["id"] for n in range(train.length)] == ["c0", "c3", "a1", "a2", "a3"]
    assert [val.file.read(n)["id"] for n in range(val.length)] == ["b0", "b1", "b2"]
    assert train.file.where(1) == f"{tmp_path}/store/c.tar:x/c3"
    for name in ("test", "none"):
        with pytest.raises(DataError, match=rf"store/\.nv-meta: split '{name}' cannot be used"):
            load_datasets(write_meta(tmp_path, train={**entry, "split": name}))


def test_repeat_time_takes_the_first_records(both, tmp_path):
    entry = {"annotation": str(both / "store"), "repeat_time": 0.5}
    (dataset,) = load_datasets(write_meta(tmp_path, mixed=entry))
    assert dataset.num_records == NUM_RECORDS // 2


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path, form):
    """Names that take headers of their own, folders and files that belong to no sample between the members."""
    keys = ["d" * 60 + "/" + "k" * 70] if form == tarfile.USTAR_FORMAT else ["東京/" + "k" * 120, "ü"]
    samples = {key: {"json": b'{"id": 1}', "0.png": b"one", "1.png": b"two"} for key in keys}
    write_shard(tmp_path / "store" / "a.tar", samples, format=form)
    with tarfile.open(tmp_path / "store" / "a.tar", "a", format=form) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, text in [("__meta__/x.json", b"{}"), ("README", b"read me"), ("last.json", b"{}")]:
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    prepare(tmp_path / "store")
    store = EnergonStore(tmp_path / "store")
    assert len(store) == len(keys) + 1
    for number, key in enumerate(keys):
        members = store.read(number).members
        assert members.key == key and list(members.spans) == ["json", "0.png", "1.png"]
        for name in ("1.png", f"{key}.1.png", f"{key.rpartition('/')[2]}.1.png"):
            with open_file(members.path, members.find(name)) as file:
                assert file.read() == b"two"
    assert store.read(len(keys)) == {}


def test_a_part_of_a_file_is_a_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(range(256)) * 100)
    for place in (str(path), f"file://{path}"):
        with open_file(place, Span(1000, 300, "x")) as file:
            expected = io.BytesIO(path.read_bytes()[1000:1300])
            for offset, whence, count in [(0, 0, 10), (5, 1, 3), (-7, 2, 100), (290, 0, 20), (400, 0, 4), (0, 0, -1)]:
                assert file.seek(offset, whence) == expected.seek(offset, whence)
                assert file.read(count) == expected.read(count)
        with pytest.raises(FileError, match=r"25600 bytes, x ends at byte 25601") as caught:
            open_file(place, Span(25500, 101, "x")).__enter__()
        assert caught.value.fault == "unreadable"


def test_names_in_messages(tmp_path):
    (tmp_path / "a.tar").write_bytes(bytes(2000))
    place, span = str(tmp_path / "a.tar"), Span(512, 100, "k/7.png")
    with pytest.raises(FileError, match=r"image .*/a\.tar:k/7\.png: cannot be read"):
        image_size(place, span)
    film = ImageRef(place, (1, 1), 8, None, "a.tar:7", VideoFrames(0, None), span)
    with pytest.raises(FileError, match=r"a\.tar:7: field 'video': video .*/a\.tar:k/7\.png: cannot be read"):
        decode_tiles(film, 28, True)


TALK = {"conversations": [{"from": "human", "value": "see"}, {"from": "gpt", "value": "ok"}]}


def sample(record, **members):
    text = record if isinstance(record, bytes) else json.dumps(record).encode()
    return {"json": text, **{name.replace("_", "."): value for name, value in members.items()}}


BROKEN = {
    "text": (sample({**TALK, "image": ""}, png=b"", x_png=b""), None, ""),
    "null": (sample({**TALK, "image": None}, png=png(9, 9)), None, ""),
    "other": (sample({**TALK, "image": "b.png"}, a_png=png(9, 9)), "missing", r"'b\.png' is not a member of the sample, "
              r"which has json, a\.png; name one of these"),
    "outside": (sample({**TALK, "image": "../x.png"}, png=png(9, 9)), "missing", r"field 'image': '\.\./x\.png' is not a member"),
    "film": (sample({**TALK, "video": "film/"}, png=png(9, 9)), "missing", r"field 'video': 'film/' is not a member"),
    "which": (sample(TALK, a_png=png(9, 9), b_JPG=b""), "record", r"to say which of a\.png, b\.JPG it is about"),
    "or_film": (sample(TALK, png=png(9, 9), mp4=b""), "record", r"to say which of png, mp4 it is about"),
    "cut": (sample(TALK, png=png(40, 40)[:20]), "image", r"field 'image': image .*/a\.tar:cut\.png: cannot be read"),
    "sound": (sample(TALK, webm=b"no video"), "video", r"field 'video': video .*/a\.tar:sound\.webm: cannot be read"),
    "no_json": ({"txt": b"{}", "png": png(9, 9)}, "json", r"has no member 'json' with the record, only txt, png"),
    "half_json": (sample(b'{"a": '), "json", r"half_json\.json: is not valid JSON .*; the member must be one object"),
    "list": (sample([1]), "json", r"list\.json: is a JSON list; the member must be one object"),
}  # fmt: skip


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    write_shard(folder / "store" / "a.tar", {name: members for name, (members, _, _) in BROKEN.items()})
    prepare(folder / "store")
    return load_datasets(write_meta(folder, broken={"annotation": "store"}))[0]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_samples(broken, make_settings, small, name):
    _, kind, message = BROKEN[name]
    number = list(BROKEN).index(name)

    def make():
        return render_source(broken, number, make_settings(), small, np.random.default_rng)

    if kind is None:
        assert len(make().images) == (name == "null")
        return
    with pytest.raises(SampleError, match=message) as caught:
        make()
    assert caught.value.kind == kind
    assert f"a.tar:{name}" in str(caught.value)


@pytest.fixture
def three(tmp_path):
    """A store of one shard with three samples."""
    samples = {f"k{n}": {"json": json.dumps({**TALK, "id": n}).encode(), "bin": bytes(700)} for n in range(3)}
    write_shard(tmp_path / "store" / "a.tar", samples)
    prepare(tmp_path / "store")
    return tmp_path / "store"


def faults(folder):
    """What comes of each of the three samples: its id, or what is wrong."""
    store, found = EnergonStore(folder), []
    for number in range(3):
        try:
            found.append(store.read(number)["id"])
        except FileError as error:
            assert "energon prepare" in str(error) and f"a.tar:k{number}" in str(error)
            found.append(error.fault)
    return found


def test_a_shard_that_is_cut_off(three):
    """At every length: what is whole is read, what is not is said to be not."""
    whole, size = (three / "a.tar").read_bytes(), 512 * 5
    assert faults(three) == [0, 1, 2]
    for length in [*range(0, 3 * size, 256), size - 1, size + 1]:
        (three / "a.tar").write_bytes(whole[:length])
        padding = 512 - 700 % 512  # behind the last member of a sample
        there = [length >= size * (n + 1) - padding for n in range(3)]
        assert faults(three) == [n if is_there else "unreadable" for n, is_there in enumerate(there)], length
    (three / "a.tar").unlink()
    assert faults(three) == ["missing"] * 3


def test_a_shard_that_was_written_again(three):
    members = {"json": json.dumps({**TALK, "id": 9}).encode(), "bin": bytes(700)}
    longer = {"json": members["json"], "bin": bytes(1300)}
    before = (three / "a.tar").read_bytes()
    for samples in (
        {f"x{n}": members for n in range(3)},  # other keys
        {f"k{n}": members for n in (1, 2, 0)},  # another order
        {f"k{n}": longer for n in range(3)},  # other sizes: the first begins where it did
        {f"k{n}": dict(reversed(longer.items())) for n in range(3)},
    ):
        write_shard(three / "a.tar", samples)
        assert faults(three) == ["unreadable"] * 3, list(samples)
    prepare(three, "--split-ratio", "1,0,0", "--force-overwrite")
    assert faults(three) == [9, 9, 9]
    (three / "a.tar").write_bytes(before)
    assert faults(three) == ["unreadable"] * 3


def test_faults_of_shards_are_counted_by_kind(three, tmp_path, make_settings, small):
    (dataset,) = load_datasets(write_meta(tmp_path, talk={"annotation": "store"}))
    whole = (three / "a.tar").read_bytes()
    for make, kind in (
        (lambda: (three / "a.tar").write_bytes(whole[:100]), "unreadable"),
        (lambda: (three / "a.tar").unlink(), "missing"),
    ):
        make()
        with pytest.raises(SampleError) as caught:
            render_source(dataset, 1, make_settings(), small, np.random.default_rng)
        assert caught.value.kind == kind


def test_a_header_behind_very_many_headers(three):
    """A tar of nothing but headers of headers, which Python's reader follows one inside the other."""
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 512
    (three / "a.tar").write_bytes((header.tobuf() + b"9 pax=yz\n".ljust(512, b"\0")) * 3000)
    assert faults(three) == ["unreadable"] * 3


@pytest.mark.parametrize(("name", "kind"), [("k.bin", tarfile.REGTYPE), ("k.other", tarfile.GNUTYPE_SPARSE)])
def test_members_that_are_there_twice_or_in_pieces(tmp_path, name, kind):
    write_shard(tmp_path / "store" / "a.tar", {"k": {"json": b"{}", "bin": b"one"}})
    with tarfile.open(tmp_path / "store" / "a.tar", "a") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, 3
        tar.addfile(info, io.BytesIO(b"two"))
    prepare(tmp_path / "store")
    with pytest.raises(FileError, match=rf"a\.tar:k: has the member '{name}' twice or in pieces"):
        EnergonStore(tmp_path / "store").read(0)


def test_damaged_headers(three):
    whole = (three / "a.tar").read_bytes()
    for start in (0, 1024, 2560):  # headers of k0.json, k0.bin, k1.json
        damaged = bytearray(whole)
        damaged[start + 130] ^= 1  # in the size
        (three / "a.tar").write_bytes(damaged)
        assert faults(three) == ["unreadable" if n == start // 2560 else n for n in range(3)], start


def test_compressed_shards(tmp_path):
    """energon indexes them, but nothing in them has a place of its own."""
    tmp_path.joinpath("store").mkdir()
    with tarfile.open(tmp_path / "store" / "a.tar", "w:gz") as tar:
        info = tarfile.TarInfo("k.json")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    prepare(tmp_path / "store")
    with pytest.raises(FileError, match=r"a\.tar:k: is not where .*is compressed, run `energon prepare` on plain tar"):
        EnergonStore(tmp_path / "store").read(0)


def test_an_index_that_does_not_fit_the_metadata(three):
    info, index = three / ".nv-meta" / ".info.json", three / ".nv-meta" / "index.sqlite"
    good = info.read_text()
    for count in (2, 4):
        info.write_text(good.replace(": 3", f": {count}"))
        with pytest.raises(DataError, match=rf"has not the {count} samples of .*a\.tar .*run `energon prepare` again"):
            EnergonStore(three)
    info.write_text(good)
    store = EnergonStore(three)
    with sqlite3.connect(index) as database:
        database.execute("UPDATE samples SET byte_offset = 'x' WHERE sample_index = 1")
    with pytest.raises(DataError, match=r"index\.sqlite: cannot be used .*run `energon prepare` again"):
        store.read(1)
    for content in (b"", b"no database" * 1000):
        index.write_bytes(content)
        with pytest.raises(DataError, match=r"index\.sqlite: cannot be used"):
            EnergonStore(three)
        with pytest.raises(DataError, match=r"index\.sqlite: cannot be used"):
            store.where(2)
    index.unlink()
    with pytest.raises(DataError, match=r"index\.sqlite: is missing; run `energon prepare` again"):
        EnergonStore(three)


def test_folders_that_are_no_stores(three, tmp_path):
    cases = {
        "no .nv-meta": (lambda: shutil.rmtree(three / ".nv-meta"), r"store: is a folder without \.nv-meta, .*energon prepare"),
        "empty .nv-meta": (lambda: (three / ".nv-meta").mkdir(), r"\.nv-meta: split 'train' cannot be used"),
        "no split.yaml": (lambda: prepare(three) or (three / ".nv-meta/split.yaml").unlink(), "split 'train' cannot be used"),
        "no YAML": (lambda: (three / ".nv-meta/split.yaml").write_text("a: [b"), "split 'train' cannot be used"),
    }  # fmt: skip
    meta = write_meta(tmp_path, faces={"annotation": "store"})
    for make, message in cases.values():
        make()
        with pytest.raises(DataError, match=message):
            load_datasets(meta)
        with pytest.raises(DataError, match=message):  # on the first rank of a run, before the others look
            prepare_records(read_meta(meta), None, 1)


def test_stores_are_not_indexed_again(three, tmp_path, capsys):
    from tools.index_data import main

    assert main([str(write_meta(tmp_path, talk={"annotation": "store"})), "--jobs", "1"]) == 0
    assert "0 records, 0.00 GB in 0 files" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.index"))


def test_split_of_a_jsonl_file(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"a\.jsonl: is not a folder; 'split' is for WebDataset stores"):
        load_datasets(write_meta(tmp_path, faces={"annotation": "a.jsonl", "split": "val"}))
    with pytest.raises(DataError, match=r"'split' must be the name of a split, not 3"):
        read_meta(write_meta(tmp_path, faces={"annotation": "a.jsonl", "split": 3}))


def test_energon_is_not_installed(three, monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.energon.flavors.webdataset.metadata", None)
    with pytest.raises(
        ConfigError, match=r"store: WebDataset stores need energon .*pip install 'internvl_megatron\[energon\]'"
    ):
        EnergonStore(three)


def test_nothing_that_is_held_grows_with_the_samples(tmp_path):
    """Two stores of which one has ten times the samples, in as many shards."""
    sizes = []
    for name, number in (("few.", 10), ("many", 100)):
        folder = tmp_path / name
        write_shard(folder / "a.tar", {f"{n:05d}": {"json": b"{}"} for n in range(number)})
        prepare(folder)
        store = EnergonStore(folder)
        assert [store.read(n) for n in reversed(range(number))] == [{}] * number
        sizes.append(len(pickle.dumps(store)))
    assert sizes[0] == sizes[1]
