"""Thousands of broken records: each fault is counted under its kind, and nothing else happens."""

import json
from collections import Counter

import numpy as np
import pytest

from internvl_megatron.data.dataset import Dataset
from internvl_megatron.data.meta import read_meta
from internvl_megatron.data.records import SampleError
from internvl_megatron.data.rows import SampleSource, build_row
from internvl_megatron.data.step_rows import StepRows
from internvl_megatron.data.stream import SampleStream, apply_policy, render_source
from tests.support.fuzzed_records import Fuzzer, write_fuzz_files

BATCH = 500


@pytest.fixture(scope="module")
def fuzz_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    write_fuzz_files(folder)
    return folder


def check_sample(sample, settings, tokenizer):
    length = len(sample.token_ids)
    assert 0 < length <= settings.data.tokens_per_row
    context = np.flatnonzero(sample.token_ids == tokenizer.image_context_id)
    assert context.tolist() == [start + k for start in sample.tile_starts for k in range(settings.tokens_per_tile)]
    assert len(sample.tile_starts) == sample.num_tiles <= settings.data.tiles_per_row
    trained = sample.labels != -100
    assert (sample.labels[trained] == sample.token_ids[trained]).all()
    assert not trained[context].any() and (np.diff(sample.positions) >= 0).all()
    frames = sum(image.num_tiles if image.video else 1 for image in sample.images)
    assert np.count_nonzero(sample.token_ids == tokenizer.image_start_id) == frames


def run_fuzz(folder, make_settings, tokenizer, seed, count):
    """Records of one seed, by `render_source` and then by the decoding of their rows; then some rows of a stream of them."""
    fuzzer = Fuzzer(folder, seed)
    records = [fuzzer.draw() for _ in range(count)]
    (folder / f"{seed}.jsonl").write_bytes(b"\n".join(record.line for record in records) + b"\n")
    entry = {"root": "root", "annotation": f"{seed}.jsonl", "data_augment": bool(seed % 2), "repeat_time": 1}
    (folder / f"{seed}.json").write_text(json.dumps({"fuzz": entry}))
    dataset = Dataset(read_meta(folder / f"{seed}.json")[0])
    assert len(dataset.file) == count, "no line is blank"
    settings = make_settings(
        tokens_per_row=2048, tiles_per_row=128, on_bad_sample="skip", on_long_sample="truncate", read_timeout_seconds=60,
        v2pe="random", system_prompt=None,
    )  # fmt: skip

    outcomes: list[str] = []
    skipped: dict[str, int] = {}
    good = []
    for index in range(count):
        try:
            sample = render_source(
                dataset, index, settings, tokenizer, lambda image, n=index: np.random.default_rng((n, image))
            )
        except SampleError as error:
            assert str(error).startswith(f"{folder / f'{seed}.jsonl'}:{index + 1}: "), "file and line come first"
            apply_policy(error, settings, skipped, index + 1)
            outcomes.append(error.kind)
            continue
        check_sample(sample, settings, tokenizer)
        good.append((SampleSource(0, index, index), sample))
        outcomes.append("good")
    assert skipped == {kind: number for kind, number in Counter(outcomes).items() if kind != "good"}

    rows = [build_row([item], settings, tokenizer.pad_id) for item in good]
    step = StepRows(rows, range(len(rows)), settings, 0, 1)
    decoded = step.tiles()
    for (row, image), tiles in decoded.tiles.items():
        assert tiles.shape == (rows[row].images[image].num_tiles, 3, 28, 28)
    assert {*decoded.tiles, *decoded.failed} == {(n, k) for n, row in enumerate(rows) for k in range(len(row.images))}
    for (row, _), message in decoded.failed.items():
        index = good[row][0].record
        outcomes[index] = "undecodable"
        assert message.startswith(f"{folder / f'{seed}.jsonl'}:{index + 1}: field '")
    for number, (record, outcome) in enumerate(zip(records, outcomes, strict=True), start=1):
        assert outcome in record.outcomes, f"{record.made_by}, line {number}: {outcome}, {record.line[:2000]!r}"

    stream = SampleStream([dataset], settings, tokenizer, 0, 1)
    drawn = {source.record for _ in range(4) for source in stream.next_row().sources}
    assert all(records[index].outcomes & {"good", "undecodable"} for index in drawn)
    assert stream.skipped.keys() <= skipped.keys()
    return Counter((record.made_by, outcome) for record, outcome in zip(records, outcomes, strict=True))


def check_all_ways_seen(seen):
    """Each way of breaking a record was drawn, and damaged files ended in each way they can."""
    makers = Counter(maker for maker, _ in seen.elements())
    assert min(makers.values()) >= 3 and len(makers) == 28, makers
    assert {outcome for maker, outcome in seen if maker == "damaged_image"} >= {"good", "image", "undecodable"}


def test_fuzzed_records(fuzz_folder, make_settings, small):
    seen = Counter()
    for seed in range(3):
        seen += run_fuzz(fuzz_folder, make_settings, small, seed, BATCH)
    check_all_ways_seen(seen)


@pytest.mark.slow
def test_ten_thousand_fuzzed_records(fuzz_folder, make_settings, small):
    seen = Counter()
    for seed in range(100, 120):
        seen += run_fuzz(fuzz_folder, make_settings, small, seed, BATCH)
    assert seen.total() == 10_000
    check_all_ways_seen(seen)


def test_fuzzed_records_are_always_the_same(fuzz_folder):
    fuzzers = [Fuzzer(fuzz_folder, 7) for _ in range(2)]
    lines = [[fuzzer.draw() for _ in range(200)] for fuzzer in fuzzers]
    assert lines[0] == lines[1]
