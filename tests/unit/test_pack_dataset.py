"""The command that packs a run's data ahead: the same store however it is made, and clear words when it cannot."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from internvl_megatron.config.overrides import apply_overrides
from internvl_megatron.config.recipes import find_recipe
from internvl_megatron.data.dataset import load_datasets
from internvl_megatron.data.fast_tokenizer import FastTokenizer
from internvl_megatron.data.records import SampleSettings
from internvl_megatron.data.stream import SampleStream
from internvl_megatron.data.tokenizer import load_tokenizer
from internvl_megatron.data.tokenizer_build import train_small_tokenizer
from tools import check_data, inspect_data
from tools.pack_dataset import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The arguments of a run: 300 records, a third of them with an image."""
    folder = tmp_path_factory.mktemp("run")
    FastTokenizer(train_small_tokenizer(["how many? three"], vocab_size=320), "small").save(folder / "tokenizer")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    Image.fromarray(rng.integers(0, 256, (30, 60, 3), dtype=np.uint8)).save(folder / "images" / "a.png")
    records = []
    for number in range(300):
        turns = [("human", "<image>how many?" if number % 3 == 0 else "how many?"), ("gpt", "three " * (number % 70))]
        record = {"conversations": [{"from": sender, "value": text} for sender, text in turns]}
        records.append(record | ({"image": "a.png"} if number % 3 == 0 else {}))
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    entry = {"root": "images", "annotation": "a.jsonl", "data_augment": True, "repeat_time": 1}
    (folder / "meta.json").write_text(json.dumps({"a": entry}))
    tokenizer = ["--tokenizer", str(folder / "tokenizer"), "--recipe", "demo_digits", "data.tokens_per_row=512"]
    return [str(folder / "meta.json"), *tokenizer]


@pytest.fixture(scope="module")
def store(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "store"
    assert main([*run, "--output", str(folder), "--workers", "2", "--parts", "4"]) == 0
    return folder


def description(folder):
    return json.loads((folder / "store.json").read_text())


def test_what_it_says_and_what_there_is(run, store, tmp_path, capsys):
    other = tmp_path / "store"
    assert main([*run, "--output", str(other), "--workers", "1", "--parts", "4"]) == 0
    assert description(other) == description(store), "whatever the number of processes"
    totals = description(store)["totals"]
    assert (totals["samples"], totals["images"], totals["tiles"]) == (300, 100, 300)
    out = capsys.readouterr().out
    assert f"300 samples in {totals['rows']} rows of 512 tokens" in out and f"data.meta={other}/meta.json" in out
    assert main([str(store), "--verify", "--workers", "1"]) == 0
    assert f"{totals['rows']} rows in 4 parts are whole" in capsys.readouterr().out


def test_a_run_trains_on_it(run, store):
    overrides = ["data.tokens_per_row=512", "data.packing_window_rows=1"]
    settings = SampleSettings.of_run(apply_overrides(find_recipe("demo_digits"), overrides))
    stream = SampleStream(load_datasets(store / "meta.json"), settings, load_tokenizer(run[2]), 0, 1)
    rows = [stream.next_row() for _ in range(description(store)["totals"]["rows"])]
    assert sum(row.num_samples for row in rows) == 300
    assert {image.path for row in rows for image in row.images} == {f"{description(store)['root']}/a.png"}


@pytest.mark.slow
def test_machines_share_the_parts_and_a_killed_one_is_made_good(run, store, tmp_path, capsys):
    folder = tmp_path / "store"
    arguments = [*run, "--output", str(folder), "--workers", "1", "--parts", "4"]
    code = f"from tools.pack_dataset import main; main({[*arguments, '--machine', '0/2']!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], start_new_session=True, env=os.environ | {"PYTHONPATH": str(Path.cwd())}
    )
    for _ in range(2400):
        if list(folder.glob("*part-*")):
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(folder.glob("*part-*")), "it had begun"
    assert main([*arguments, "--machine", "1/2"]) == 0
    there = len(list(folder.glob("part-*.zarr")))
    assert there in (2, 3) and f"{there} of 4 parts are there" in capsys.readouterr().out
    assert "parts" not in description(folder)
    assert main([*arguments, "--machine", "0/2"]) == 0
    assert description(folder) == description(store)


def test_damage_is_found_and_mended(run, store, tmp_path, capsys):
    folder = tmp_path / "store"
    shutil.copytree(store, folder)
    path = folder / "part-00002.zarr" / "targets" / "c" / "0" / "0"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 2
    path.write_bytes(content)
    assert main([f"{folder}/meta.json", "--verify", "--workers", "1"]) == 2
    assert "part-00002.zarr: row" in capsys.readouterr().err
    shutil.rmtree(folder / "part-00002.zarr")
    assert main([*run, "--output", str(folder), "--workers", "1", "--parts", "4"]) == 0
    assert main([f"{folder}/meta.json", "--verify", "--workers", "1"]) == 0
    assert description(folder) == description(store)


def test_it_can_be_checked_and_looked_at(run, store, tmp_path, capsys):
    folder = tmp_path / "store"
    shutil.copytree(store, folder)
    arguments = [f"{folder}/meta.json", *run[1:]]
    num_rows = description(folder)["totals"]["rows"]
    assert check_data.main([*arguments, "--workers", "1", "--decode"]) == 0
    assert str(num_rows) in capsys.readouterr().out
    assert check_data.main([*arguments, "--workers", "1", "data.max_tiles=2"]) == 2
    assert "its rows were packed otherwise (data.max_tiles was 6, is 2)" in capsys.readouterr().err
    look = ["data.packing_window_rows=1", "--rows", str(num_rows), "--output", str(tmp_path / "look")]
    assert inspect_data.main([*arguments, *look, "rows_per_step=1"]) == 0
    report = json.loads((tmp_path / "look" / "report.json").read_text())
    page = (tmp_path / "look" / "index.html").read_text()
    assert report["rows"] == num_rows and report["samples"] == 300 and "part-0000" in page
    path = folder / "part-00002.zarr" / "positions" / "c" / "0" / "0"
    content = bytearray(path.read_bytes())
    content[5] ^= 2
    path.write_bytes(content)
    assert check_data.main([*arguments, "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert "row" in out and "part-00002.zarr: row 0" in out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.max_tiles=3"], "was begun otherwise (data.max_tiles was 6, is 3; max_tiles was 6, is 3)"),
        (["--parts", "5"], "num_parts was 4, is 5"),
        (["data.group_weights=a=1"], "pack a store of each group"),
        (["data.tokenizer=/none"], "tokenizer /none: no such folder"),
        (["data.max_tile=3"], "max_tile"),
    ],
)
def test_what_does_not_go_together(run, store, capsys, changes, message):
    before = description(store)
    assert main([*run, "--parts", "4", *changes, "--output", str(store), "--workers", "1"]) == 2
    assert message in capsys.readouterr().err
    assert description(store) == before


def test_a_store_is_not_packed_again(run, store, tmp_path, capsys):
    assert main([f"{store}/meta.json", *run[1:], "--output", str(tmp_path / "x")]) == 2
    assert "names a store of packed rows" in capsys.readouterr().err
    assert not Path(tmp_path / "x").exists()


@pytest.mark.parametrize(
    "arguments",
    [[], ["m.json"], ["m.json", "--output", "x", "--workers", "0"], ["m.json", "--output", "x", "--machine", "2/2"],
     ["m.json", "--output", "x", "--verify"]],
)  # fmt: skip
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and "usage" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*run, "--output", str(tmp_path / "file" / "store"), "--workers", "1"]) == 2
    assert "file/store" in capsys.readouterr().err
