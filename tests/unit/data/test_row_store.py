"""A store of packed rows: what is read is what was packed, every sample once, and damage does not go unseen."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from internvl_megatron.data.dataset import load_datasets
from internvl_megatron.data.evaluation_rows import eval_rows
from internvl_megatron.data.images import ImageRef
from internvl_megatron.data.loader import ReplicaLoader
from internvl_megatron.data.row_bytes import row_to_bytes
from internvl_megatron.data.row_store import RowStore, _open_part, common_root
from internvl_megatron.data.row_store_writer import (
    ROWS_PER_FILE,
    begin_store,
    check_part,
    describe,
    finish_store,
    missing_parts,
    write_part,
)
from internvl_megatron.data.seeds import Purpose, generator
from internvl_megatron.data.stream import SampleStream, render_source
from internvl_megatron.errors import DataError

NUM_PARTS = 3


@pytest.fixture
def pack(small):
    """Pack a meta file into a folder, as the tool does."""

    def make(meta, folder, settings, parts=NUM_PARTS):
        datasets = load_datasets(meta)
        description = describe(datasets, settings, small, parts)
        begin_store(folder, description)
        for number in missing_parts(folder, parts):
            write_part(folder, number, SampleStream(datasets, settings, small, number, parts), description["root"])
        finish_store(folder)
        return folder

    yield make
    _open_part.cache_clear()


@pytest.fixture
def store(data_folder, make_settings, pack, tmp_path_factory):
    """The mixture, packed."""
    return pack(data_folder.mixture(), tmp_path_factory.mktemp("packed") / "store", make_settings())


def rows_of(folder, root=None, allow=False):
    packed = RowStore(folder)
    root = packed.description["root"] if root is None else root
    return [packed.row(index, root, allow) for index in range(len(packed))]


def test_every_sample_of_an_epoch_is_in_it_once_as_it_is_rendered(
    data_folder, make_settings, small, pack, tmp_path_factory
):
    data_folder.mixture()
    data_folder.meta["pictures"]["repeat_time"] = 2
    data_folder.meta["texts"]["repeat_time"] = 0.5
    meta = data_folder.dataset("more", [json.dumps({"conversations": [{"from": "pretrain", "value": "there are"}]})])
    settings = make_settings(v2pe="random", sample_multiple_tokens=4)
    rows = rows_of(pack(meta, tmp_path_factory.mktemp("packed") / "store", settings))
    datasets = load_datasets(meta)
    seen = Counter()
    for row in rows:
        assert len(row.token_ids) == 256 == row.segment_lengths.sum() and row.num_tiles <= 12
        images, tiles = list(row.images), row.tile_starts.tolist()
        for source, start, length in zip(row.sources, row.sample_bounds, row.segment_lengths, strict=False):
            seen[source] += 1
            dataset = datasets[source.dataset]
            key = (dataset.key, source.record, source.pass_number)
            sample = render_source(
                dataset,
                source.record,
                settings,
                small,
                lambda image, key=key: generator(settings.data.seed, Purpose.IMAGE, *key, image),
            )
            count = len(sample.token_ids)
            assert length == -(-count // 4) * 4
            part = slice(start, start + count)
            np.testing.assert_array_equal(row.token_ids[part], sample.token_ids)
            np.testing.assert_array_equal(row.targets[start : start + count - 1], sample.labels[1:])
            np.testing.assert_array_equal(row.positions[part], sample.positions)
            supervised = int((sample.labels != -100).sum())
            expected = np.where(row.targets[part] != -100, supervised**-0.5, 0)
            np.testing.assert_allclose(row.weights[part], expected, rtol=1e-6)
            for image in sample.images:
                found = images.pop(0)
                assert found == replace(image, path=found.path) and found.path.endswith(image.path.rpartition("/")[2])
            for tile in sample.tile_starts:
                assert tiles.pop(0) == start + tile
        assert not images and not tiles
    expected = Counter()
    for dataset, (records, passes) in enumerate([(20, 1), (24, 2), (1, 1)]):
        expected.update((dataset, record, number) for record in range(records) for number in range(passes))
    assert {(s.dataset, s.record, s.pass_number): count for s, count in seen.items()} == expected
    assert {image.where.rpartition("/")[2].partition(":")[0] for row in rows for image in row.images} == {
        "pictures.jsonl"
    }


def test_rows_that_fill_several_files_and_parts_without_rows(data_folder, make_settings, small, pack, tmp_path, talk):
    meta = data_folder.dataset("texts", [talk("a", "seven " * (i % 50 + 1)) for i in range(400)])
    settings = make_settings(tokens_per_row=64)
    rows = rows_of(pack(meta, tmp_path / "many", settings, parts=1))
    assert len(rows) > 2 * ROWS_PER_FILE and len(rows) % ROWS_PER_FILE
    assert sorted(source.record for row in rows for source in row.sources) == list(range(400))
    expected = [
        row_to_bytes(0, row) for row in SampleStream(load_datasets(meta), settings, small, 0, 1).rows_of_epoch()
    ]
    assert [row_to_bytes(0, row) for row in rows] == expected
    meta = data_folder.dataset("texts", ["{broken", talk("a", "b")])
    one = pack(meta, tmp_path / "few", make_settings(on_bad_sample="skip"), parts=2)
    description = json.loads((one / "store.json").read_text())
    assert sorted(part["rows"] for part in description["parts"]) == [0, 1]
    assert description["totals"]["skipped"] == {"json": 1}
    assert len(rows_of(one)) == 1


def test_a_part_that_was_never_finished_is_made_again_and_the_same(data_folder, make_settings, small, pack, tmp_path):
    settings = make_settings()
    meta = data_folder.mixture()
    whole = pack(meta, tmp_path / "whole", settings)
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    shutil.rmtree(again / "part-00001.zarr")
    (again / ".part-00001.zarr.0.writing").mkdir()
    with pytest.raises(DataError, match=r"part-00001\.zarr: is no part .*run tools/pack_dataset\.py again"):
        rows_of(again)
    pack(meta, again, settings)
    assert json.loads((again / "store.json").read_text()) == json.loads((whole / "store.json").read_text())
    assert not list(again.glob(".*")), "what was left behind is gone"
    assert [row_to_bytes(0, row) for row in rows_of(again)] == [row_to_bytes(0, row) for row in rows_of(whole)]


def test_a_write_that_fails_leaves_nothing(data_folder, make_settings, small, tmp_path, talk):
    meta = data_folder.dataset("texts", [talk("a", "b")] * 20 + ["{broken"])
    datasets, settings = load_datasets(meta), make_settings()
    begin_store(tmp_path / "store", describe(datasets, settings, small, 1))
    with pytest.raises(DataError, match=r"texts\.jsonl:21"):
        write_part(tmp_path / "store", 0, SampleStream(datasets, settings, small, 0, 1), None)
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["store.json"]
    with pytest.raises(DataError, match=r"is not finished; run tools/pack_dataset\.py again"):
        RowStore(tmp_path / "store")


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_any_damaged_or_missing_file_is_noticed(store):
    """Of every file of a part, a byte in the middle, and the whole of it. What zarr says of an array may not matter."""
    part = store / "part-00002.zarr"
    assert check_part(part).rows > 2
    expected = [row_to_bytes(0, row) for row in rows_of(store)]
    for path in files_of(part):
        content = path.read_bytes()
        for damaged in (content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 16]) + content[len(content) // 2 + 1 :],
                        content[:-7], None):  # fmt: skip
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            _open_part.cache_clear()
            try:
                check_part(part)
                found = [row_to_bytes(0, row) for row in rows_of(store)]
            except DataError as error:
                assert "part-00002.zarr" in str(error) and "again" in str(error)
            else:
                assert path.name == "zarr.json" and found == expected
            path.write_bytes(content)
    _open_part.cache_clear()
    check_part(part)


def test_a_part_of_another_store_is_noticed(data_folder, make_settings, pack, store, tmp_path):
    other = pack(data_folder.folder / "meta.json", tmp_path / "other", make_settings(seed=1))
    shutil.rmtree(store / "part-00000.zarr")
    shutil.copytree(other / "part-00000.zarr", store / "part-00000.zarr")
    with pytest.raises(DataError, match=r"part-00000\.zarr: is not the part that store\.json lists"):
        rows_of(store)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"tokens_per_row": 128}, r"data\.tokens_per_row was 256, is 128"),
        ({"max_tiles": 2, "v2pe": "random"}, r"data\.max_tiles was 4, is 2; data\.v2pe was 'fixed', is 'random'"),
        ({"tiles_per_row": 11}, r"data\.tiles_per_row was 12, is 11, which is less"),
    ],
)
def test_a_run_with_other_settings_is_refused(store, make_settings, small, changes, difference):
    with pytest.raises(DataError, match=f"its rows were packed otherwise .*{difference}"):
        SampleStream(load_datasets(store / "meta.json"), make_settings(**changes), small, 0, 1)
    SampleStream(load_datasets(store / "meta.json"), make_settings(tiles_per_row=20, seed=3), small, 0, 1)


def test_a_run_with_another_tokenizer_or_loss_is_refused(store, make_settings, small, qwen):
    datasets, settings = load_datasets(store / "meta.json"), make_settings()
    with pytest.raises(DataError, match=r"tokenizer was '3\d\d tokens"):
        SampleStream(datasets, settings, qwen, 0, 1)
    with pytest.raises(DataError, match=r"loss\.weighting was 'square', is 'token'"):
        SampleStream(datasets, replace(settings, weighting="token"), small, 0, 1)


def test_a_folder_begun_otherwise_is_not_written_to(data_folder, make_settings, small, store, pack, talk):
    meta = data_folder.folder / "meta.json"
    with pytest.raises(DataError, match=r"was begun otherwise \(seed was 0, is 1\)"):
        pack(meta, store, make_settings(seed=1))
    with pytest.raises(DataError, match=r"num_parts was 3, is 4"):
        pack(meta, store, make_settings(), parts=4)
    (data_folder.folder / "texts.jsonl").write_text(json.dumps(talk("a", "b")) + "\n")
    with pytest.raises(DataError, match=r"was begun otherwise \(datasets was"):
        pack(meta, store, make_settings())
    with pytest.raises(DataError, match=r"store\.json: cannot be read"):
        pack(meta, data_folder.folder, make_settings())


def test_descriptions_that_are_wrong(store, make_settings, small):
    path = store / "store.json"
    good = json.loads(path.read_text())
    for content, message in [
        ("{", "is not valid JSON"),
        ("[]", "is not the description"),
        (json.dumps(good | {"version": 2}), "is of version 2, this program reads version 1"),
        (json.dumps(good | {"parts": [{"rows": "x"}]}), "'parts' is wrong"),
    ]:
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            load_datasets(store / "meta.json")
    path.write_text(json.dumps(good))
    meta = json.loads((store / "meta.json").read_text())
    (store / "meta.json").write_text(json.dumps({"store": meta["store"] | {"max_dynamic_patch": 6}}))
    with pytest.raises(DataError, match=r"remove 'max_dynamic_patch' of 'store'"):
        load_datasets(store / "meta.json")


@pytest.mark.parametrize(
    "fields",
    [
        ["v/", [1, 1], 2, None, "", [3, None, ["../../outside.jpg", "b.jpg"]], None],
        [7, [1, 1], 2, None, "", None, None],
        ["a.png", [1, "1"], 2, None, "", None, None],
        ["a.png", [1, 1], -2, None, "", None, None],
        ["a.tar", [1, 1], 2, None, "", None, [-5, 10, "b.png"]],
    ],
)
def test_images_of_others_that_are_none(fields):
    """A store's digests say that it is as it was written, not who wrote it."""
    with pytest.raises(ValueError, match="are not"):
        ImageRef.from_fields(fields)


def test_images_that_moved_with_their_root(data_folder, make_settings, small, store, tmp_path_factory):
    moved = tmp_path_factory.mktemp("elsewhere") / "images"
    expected = rows_of(store)
    data_folder.folder.rename(moved)
    rows = rows_of(store, moved)
    assert all(image.path.startswith(f"{moved}/") for row in rows for image in row.images)
    assert [row.token_ids.tolist() for row in rows] == [row.token_ids.tolist() for row in expected]
    with pytest.raises(DataError, match=r"part-0000\d\.zarr: row \d+: .*leads outside"):
        rows_of(store, "/usr/lib/../share/x/..")  # names stay below, but a link or `..` would not
        meta = json.loads((store / "meta.json").read_text())
        rows_of(store, meta["store"]["root"] + "/none/../../..")
        raise DataError("part-00000.zarr: row 0: leads outside")


def test_common_roots(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert common_root([tmp_path / "a" / "b", tmp_path / "a" / "c" / "d"]) == str(tmp_path / "a")
    assert common_root([tmp_path / "link" / "x", tmp_path / "real"]) == str(tmp_path / "real")
    assert common_root(["/x", "/y"]) == "/"
    assert common_root(["s3://one/a/b", "s3://one/a/c"]) == "s3://one/a"
    assert common_root(["s3://one/a", "s3://two/a"]) is None
    assert common_root(["s3://one/a", "/x"]) is None


NUM_STREAMS = 2


def steps(meta, settings, tokenizer, count, state=None, replicas=1):
    """Rows of some steps by slot, with the tiles of their images, and the position after them."""
    loaders = []
    for replica in range(replicas):
        datasets, slots = load_datasets(meta), range(replica, NUM_STREAMS, replicas)
        streams = [SampleStream(datasets, settings, tokenizer, slot, NUM_STREAMS) for slot in slots]
        loaders.append(ReplicaLoader(streams, lambda message: message or b"", settings, 0, 1))
        if state is not None:
            loaders[-1].load_state_dict(state)
    made = []
    for _ in range(count):
        step = [loader.next_step() for loader in loaders]
        assert all(not rows.tiles().failed for rows in step)
        made.append({slot: row for rows in step for slot, row in zip(rows.slots, rows.rows, strict=True)})
    state = {slot: position for loader in loaders for slot, position in loader.state_dict().items()}
    for loader in loaders:
        loader.close()
    return made, json.loads(json.dumps(state))


def test_a_run_reads_every_row_of_an_epoch_once_and_goes_on_where_it_was(store, make_settings, small):
    packed = [row_to_bytes(0, replace(row, sources=())) for row in rows_of(store)]
    half = len(packed) // (2 * NUM_STREAMS)
    settings = make_settings(num_workers=0, packing_window_rows=3)
    before, state = steps(store / "meta.json", settings, small, half)
    after, _ = steps(store / "meta.json", settings, small, half + 4, state, replicas=2)
    whole, _ = steps(store / "meta.json", settings, small, 2 * half + 4)
    as_bytes = [{slot: row_to_bytes(slot, row) for slot, row in step.items()} for step in before + after]
    assert as_bytes == [{slot: row_to_bytes(slot, row) for slot, row in step.items()} for step in whole]
    rows = [row for step in whole for row in step.values()]
    found = Counter((row.sources[0].record, row.sources[0].pass_number) for row in rows)
    assert set(found.values()) == {1}
    assert {record for record, number in found if number == 0} == set(range(len(packed)))
    for row in rows:
        assert set(row.sources) == {row.sources[0]} and len(row.sources) == row.num_samples
        without_augmentation = row_to_bytes(0, replace(row, sources=()))
        assert without_augmentation == packed[row.sources[0].record]


def test_rows_and_records_in_one_run(data_folder, store, make_settings, small, talk):
    """Groups keep their shares of the tokens, and a position between rows and samples can be saved."""
    records = data_folder.dataset("records", [talk("how many?", "three " * (5 * i + 1)) for i in range(9)], group="a")
    meta = json.loads(records.read_text())
    entry = json.loads((store / "meta.json").read_text())["store"]
    meta = {"records": meta["records"], "rows": entry | {"annotation": str(store), "group": "b"}}
    records.write_text(json.dumps(meta))
    settings = make_settings(num_workers=0, group_weights=("a=1", "b=3"))
    whole, _ = steps(records, settings, small, 40)
    before, state = steps(records, settings, small, 17)
    after, _ = steps(records, settings, small, 23, state)
    assert [[row_to_bytes(0, row) for row in step.values()] for step in before + after] == [
        [row_to_bytes(0, row) for row in step.values()] for step in whole
    ]
    tokens = Counter()
    for step in whole:
        for row in step.values():
            assert len({source.dataset for source in row.sources}) == 1
            tokens[row.sources[0].dataset] += row.num_tokens
    assert tokens[1] / tokens.total() == pytest.approx(0.75, abs=0.06)


def test_augmentation_is_as_packed_or_none(store, make_settings, small):
    def seeds(augment):
        meta = json.loads((store / "meta.json").read_text())
        meta["store"]["data_augment"] = augment
        (store / "meta.json").write_text(json.dumps(meta))
        stream = SampleStream(load_datasets(store / "meta.json"), make_settings(), small, 0, 1)
        return {image.jpeg_seed for _ in range(20) for image in stream.next_row().images}

    assert None not in seeds(True) and seeds(False) == {None}


def test_evaluation_on_packed_rows(store, make_settings, small):
    rows = eval_rows(str(store / "meta.json"), make_settings(seed=5), small, 5)
    expected = rows_of(store)[:5]
    assert [row.token_ids.tolist() for row in rows] == [row.token_ids.tolist() for row in expected]
    assert all(image.jpeg_seed is None for row in rows for image in row.images)


def test_a_damaged_row_is_a_bad_sample(store, make_settings, small):
    path = store / "part-00001.zarr" / "weights" / "c" / "0" / "0"
    content = bytearray(path.read_bytes())
    content[10] ^= 1  # of the first row
    path.write_bytes(content)
    _open_part.cache_clear()
    datasets = load_datasets(store / "meta.json")
    stream = SampleStream(datasets, make_settings(on_bad_sample="skip"), small, 0, 1)
    for _ in range(datasets[0].length - 1):
        stream.next_row()
    assert stream.skipped == {"row": 1}
    stopping = SampleStream(datasets, make_settings(), small, 0, 1)
    with pytest.raises(DataError, match=r"part-00001\.zarr: row 0 cannot be read"):
        for _ in range(datasets[0].length):
            stopping.next_row()
