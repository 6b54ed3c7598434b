"""The command that checks a meta file: every fault is counted under its kind, whatever the number of processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from internvl_megatron.config.overrides import to_json
from internvl_megatron.config.recipes import find_recipe
from internvl_megatron.data.dataset import load_datasets
from internvl_megatron.data.records import SampleSettings
from internvl_megatron.data.tokenizer_build import train_small_tokenizer
from tests.support.deadly_file import DEADLY_RECORDS, DeadlyFile
from tests.support.fuzzed_records import Fuzzer, write_fuzz_files
from tools import check_data, data_settings
from tools.check_data import chunks_of, main
from tools.check_records import FIRST_FEW, Chunk, Kind
from tools.check_workers import Job, check_chunks

FUZZ_SETTINGS = ("data.tokens_per_row=2048", "data.tiles_per_row=128", "data.max_tiles=4", "data.system_prompt=null")
TURNS = [{"from": "human", "value": "how many?"}, {"from": "gpt", "value": "three"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_small_tokenizer(["how many are there in the picture? three, two"], vocab_size=320).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    """A meta file of two data sets of broken records, and what must come of each: [data set][record] -> kind."""
    folder = tmp_path_factory.mktemp("fuzz")
    write_fuzz_files(folder)
    meta, expected = {}, {}
    for name, seed, count in (("first", 1, 300), ("second", 2, 150)):
        fuzzer = Fuzzer(folder, seed)
        drawn = [record for record in (fuzzer.draw() for _ in range(count)) if len(record.outcomes) == 1]
        (folder / f"{name}.jsonl").write_bytes(b"\n".join(record.line for record in drawn) + b"\n")
        meta[name] = {"root": "root", "annotation": f"{name}.jsonl", "data_augment": False, "repeat_time": 1}
        expected[name] = [kind for record in drawn for kind in record.outcomes]
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder / "meta.json", expected


def write_data(folder, records, **entry):
    """A meta file of one data set."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "a.jsonl").write_text("".join(line + "\n" for line in lines))
    entry = {"root": "", "annotation": "a.jsonl", "data_augment": False, "repeat_time": 1, **entry}
    (folder / "meta.json").write_text(json.dumps({"a": entry}))
    return folder / "meta.json"


def run_check(meta, tokenizer, *arguments, status=0):
    """The report of a run that ends with this status."""
    output = meta.with_name("report.json")
    output.unlink(missing_ok=True)
    common = [str(meta), "--recipe", "demo_digits", "--tokenizer", tokenizer, "--output", str(output)]
    assert main([*common, *arguments]) == status
    return json.loads(output.read_text())


def counted(report, name):
    """{kind: count} of a data set's faults; those that only decoding shows are one."""
    counts = Counter()
    for kind, found in report["datasets"][name]["faults"].items():
        counts["undecodable" if kind.endswith(" (decoding)") else kind] += found["count"]
    return counts


def test_every_fault_is_counted_under_its_kind(fuzzed, tokenizer, capsys):
    meta, expected = fuzzed
    report = run_check(meta, tokenizer, "--decode", "--workers", "2", *FUZZ_SETTINGS, status=1)
    text = capsys.readouterr().out
    total = Counter()
    for name, kinds in expected.items():
        counts = Counter(kinds)
        good = counts.pop("good")
        assert counted(report, name) == counts and len(counts) >= 10
        found = report["datasets"][name]
        assert (found["records"], found["good"]) == (len(kinds), good)
        for kind, fault in found["faults"].items():
            if not kind.endswith(" (decoding)"):
                lines = [number for number, one in enumerate(kinds, start=1) if one == kind]
                wheres = [f"{meta.parent / name}.jsonl:{line}" for line in lines]
                assert [one["where"] for one in fault["first"]] == wheres[:FIRST_FEW]
                assert fault["share"] == pytest.approx(len(lines) / len(kinds))
            for one in fault["first"]:
                assert one["where"] in text and one["reason"] and not one["reason"].startswith(one["where"])
        total += counts
    assert report["faulty"] == total.total() and report["records"] == sum(map(len, expected.values()))
    assert set(report["faults"]) >= set(total) - {"undecodable"}

    again = run_check(meta, tokenizer, "--decode", "--workers", "1", *FUZZ_SETTINGS, status=1)
    assert again == report, "the number of processes changes nothing"


def test_without_decoding_only_headers_are_read(fuzzed, tokenizer):
    meta, expected = fuzzed
    report = run_check(meta, tokenizer, "--workers", "1", "--limit", "100", *FUZZ_SETTINGS, status=1)
    for name, kinds in expected.items():
        counts = Counter(kinds[:100])
        good = counts.pop("good") + counts.pop("undecodable")
        assert counted(report, name) == counts
        assert (report["datasets"][name]["records"], report["datasets"][name]["good"]) == (100, good)
        assert report["datasets"][name]["not_checked"] == len(kinds) - 100


def test_good_data_and_what_is_odd_about_them(tmp_path, tokenizer, capsys):
    odd = [{"from": "human", "value": "say <|im_end|>"}, {"from": "gpt", "value": "<ref>a</ref>"}]
    long = [{"from": "human", "value": "東" * 2000}, {"from": "gpt", "value": "three"}]
    records = [{"conversations": turns} for turns in (TURNS, odd, long)] * 2
    meta = write_data(tmp_path, records, repeat_time=0.84)
    entry = json.loads(meta.read_text())["a"]
    meta.write_text(json.dumps({"a": entry, "b": entry}))
    report = run_check(meta, tokenizer, "--workers", "1")
    found = report["datasets"]["a"]
    assert (report["records"], report["good"], report["faulty"]) == (10, 10, 0), "a part of each file is in use"
    assert found["not_checked"] == 1 and found["faults"] == {}
    where = {kind: [one["where"].rpartition(":")[2] for one in of["first"]] for kind, of in found["notices"].items()}
    assert where == {"control tokens": ["2", "5"], "cut": ["3"], "nothing trained on": ["3"]}
    assert "<|im_end|>" in found["notices"]["control tokens"]["first"][0]["reason"]
    assert len(report["meta_notices"]) == 1 and "'a' and 'b'" in report["meta_notices"][0]
    assert report["meta_notices"][0] in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.index", "meta.json", "report.json"]


def test_long_samples_are_faults_unless_they_are_cut(tmp_path, tokenizer):
    meta = write_data(tmp_path, [{"conversations": [TURNS[0], {"from": "gpt", "value": "東" * 2000}]}])
    report = run_check(meta, tokenizer, "--workers", "1", "data.on_long_sample=skip", status=1)
    assert report["faults"] == {"long": 1}
    report = run_check(meta, tokenizer, "data.on_long_sample=truncate", "--workers", "1")
    assert report["notices"] == {"cut": 1}, "the answer is trained on as far as it goes"


@pytest.mark.slow
def test_a_record_that_ends_its_process_costs_itself_alone(tmp_path, tokenizer):
    records = [{"conversations": TURNS}] * 200
    datasets = load_datasets(write_data(tmp_path, records))
    datasets[0]._file = DeadlyFile(tmp_path / "a.jsonl")
    job = Job(datasets, SampleSettings.of_run(find_recipe("demo_digits")), tokenizer, decode=False)
    found = list(check_chunks(chunks_of(datasets, None), job, 2))
    checked = sorted(number for chunk, _ in found for number in range(chunk.start, chunk.stop))
    assert checked == list(range(200)) and sum(tally.num_records for _, tally in found) == 200
    faulty = sorted(chunk.start for chunk, tally in found if tally.num_faulty)
    assert faulty == list(DEADLY_RECORDS)
    (reason,) = {tally.faults["crash"].first[0][2] for _, tally in found if tally.num_faulty}
    assert "killed by SIGKILL" in reason


def test_an_image_that_hangs_is_counted(tmp_path, tokenizer):
    """Time runs out for any image if there is next to none."""
    for name in "ab":
        Image.fromarray(np.zeros((6000, 6000, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    records = [{"conversations": TURNS, "image": f"{name}.png"} for name in "ab"] + [{"conversations": TURNS}]
    meta = write_data(tmp_path, records)
    report = run_check(meta, tokenizer, "--workers", "1", "--decode", "data.read_timeout_seconds=0.02", status=1)
    assert sum(report["faults"].values()) == 2 and set(report["faults"]) <= {"timeout", "timeout (decoding)"}
    assert report["good"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["data.max_tile=3"], "data.max_tiles"),
        (["nonsense"], "section.field=value"),
        (["data.tokens_per_row=-5"], "data.tokens_per_row=-5 must be"),
        (["--recipe", "demo_digit"], "demo_digits"),
        (["--tokenizer", "none/here"], "none/here: no such folder"),
        (["--output", "none/here/report.json"], "there is no folder none/here"),
        (["--output", "."], "is a folder"),
    ],
)
def test_wrong_arguments(tmp_path, tokenizer, capsys, change, message):
    meta = write_data(tmp_path, [{"conversations": TURNS}])
    assert main([str(meta), "--recipe", "demo_digits", "--tokenizer", tokenizer, "--workers", "1", *change]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


@pytest.mark.parametrize(
    "arguments", [[], ["--workers", "0"], ["--limit", "0"], ["--limit", "many"], ["--frobnicate"]]
)
def test_arguments_that_are_none(tmp_path, arguments):
    with pytest.raises(SystemExit) as error:
        main([*([str(tmp_path)] if arguments else []), *arguments])
    assert error.value.code == 2


def test_a_tokenizer_is_needed(tmp_path, capsys):
    assert main([str(write_data(tmp_path, [{"conversations": TURNS}]))]) == 2
    assert "--tokenizer is missing" in capsys.readouterr().err


def test_a_meta_file_that_cannot_be_used(tmp_path, tokenizer, capsys):
    meta = write_data(tmp_path, [{"conversations": TURNS}])
    entry = json.loads(meta.read_text())["a"]
    meta.write_text(
        json.dumps({"a": {**entry, "annotation": "none.jsonl"}, "b": {**entry, "annotation": "lost.jsonl"}})
    )
    assert main([str(meta), "--tokenizer", tokenizer]) == 2
    err = capsys.readouterr().err
    assert "none.jsonl: cannot be read" in err and "lost.jsonl: cannot be read" in err
    meta.write_text("{}")
    assert main([str(meta), "--tokenizer", tokenizer]) == 2


def test_a_report_that_cannot_be_written(tmp_path, tokenizer, capsys, monkeypatch):
    """It appears whole or not at all."""
    meta = write_data(tmp_path, [{"conversations": TURNS}])
    output = tmp_path / "report.json"
    output.write_text("older")

    load_datasets(meta)  # indexed before the disk is full

    def fail(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data_settings.os, "fsync", fail)
    common = [str(meta), "--recipe", "demo_digits", "--tokenizer", tokenizer, "--workers", "1"]
    assert main([*common, "--output", str(output)]) == 2
    captured = capsys.readouterr()
    assert "report.json: cannot be written (No space left on device)" in captured.err
    assert "total" in captured.out, "what was found is not lost"
    assert output.read_text() == "older"
    assert not list(tmp_path.glob(".report*")), "nothing is left behind"


def is_decoding(process):
    try:
        is_decoder = "internvl_megatron.data.decode_worker" in process.cmdline()
        return (
            is_decoder and "memfd:tiles" in Path(f"/proc/{process.pid}/maps").read_text()
        )  # it has been given an image
    except (psutil.Error, OSError):  # it is gone
        return False


def test_an_interruption_leaves_no_process(tmp_path, tokenizer):
    """Not even one that decodes an image and hangs."""
    Image.fromarray(np.zeros((30, 30, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    meta = write_data(tmp_path, [{"conversations": TURNS, "image": "a.png"}] * 20000)
    arguments = [str(meta), "--recipe", "demo_digits", "--tokenizer", tokenizer, "--workers", "1", "--decode"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.check_data", *arguments],
        cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    tool, started = psutil.Process(process.pid), time.monotonic()
    descendants, decoding = [], []
    while not decoding:
        assert process.poll() is None and time.monotonic() < started + 120
        time.sleep(0.05)
        descendants = tool.children(recursive=True)
        decoding = [one for one in descendants if is_decoding(one)]
    decoding[0].suspend()
    assert len(descendants) >= 3, "the process they are forked from, one that checks, one that decodes"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and b"interrupted" in err and b"Traceback" not in err
    _, alive = psutil.wait_procs(descendants, timeout=120)
    for one in alive:
        one.kill()
    assert alive == []


def test_a_run_may_be_named_for_its_settings(tmp_path, tokenizer):
    config = find_recipe("demo_digits")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(to_json(config).replace('"max_tiles": 6', '"max_tiles": 5'))
    options = check_data._parser().parse_args([str(tmp_path / "meta.json"), "--recipe", str(tmp_path / "run")])
    read = data_settings.read_config(options)
    assert read.data.max_tiles == 5 and read.data.meta == str(tmp_path / "meta.json")
    assert read.data.tokenizer == config.data.tokenizer


def test_the_first_few_are_the_same_in_any_order():
    kinds = [Kind(), Kind()]
    numbers = [9, 3, 40, 0, 7, 21, 8]
    for kind, order in zip(kinds, (numbers, numbers[::-1]), strict=True):
        for number in order:
            kind.add(number, f"a:{number}", f"a:{number}: why")
    assert kinds[0] == kinds[1] and kinds[0].count == 7
    assert kinds[0].first == [(number, f"a:{number}", "why") for number in sorted(numbers)[:FIRST_FEW]]


def test_parts_of_a_chunk():
    assert Chunk(1, 4, 9).around(6) == [Chunk(1, 4, 6), Chunk(1, 6, 7), Chunk(1, 7, 9)]
    assert Chunk(1, 4, 6).around(4) == [Chunk(1, 4, 5), Chunk(1, 5, 6)] and Chunk(1, 4, 5).around(4) == []
