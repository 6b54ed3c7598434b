"""Metrics survive kills and resumes, are valid JSON whatever the numbers, and show on boards in groups."""

import json
import math
from dataclasses import fields, replace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from internvl_megatron.errors import DataError
from internvl_megatron.watching.boards import TENSORBOARD_FOLDER, TensorBoard
from internvl_megatron.watching.metrics import GROUPS, METRICS_FILE, MetricsWriter, StepMetrics, read_metrics

ONE = StepMetrics(
    step=0,
    loss=2.5,
    grad_norm=1.25,
    learning_rate=1e-3,
    tokens_per_second=4000.0,
    image_tokens_per_second=800.0,
    num_tiles=12,
    num_samples=9,
    num_supervised_tokens=120,
    step_seconds=0.5,
    mfu=0.4,
    model_tflops_per_second_per_rank=0.02,
    peak_memory_bytes=2**33,
    loss_by_dataset={"birds": 2.0, "silent": None},
    images_by_delta={"1/256": 3, "128/256": 1, "256/256": 2},
)


def write(folder, steps, resume_step=None, loss=2.5):
    board = TensorBoard(folder, 0 if resume_step is None else resume_step + 1)
    writer = MetricsWriter(folder, resume_step, [board])
    for step in steps:
        writer.write(replace(ONE, step=step, loss=loss, eval_loss=3.0 if step % 2 else None))
    writer.close()


def steps_and_losses(folder):
    return [(row["step"], row["loss"]) for row in read_metrics(folder / METRICS_FILE)]


def test_a_line_has_every_field(tmp_path):
    write(tmp_path, [0, 1])
    first, second = read_metrics(tmp_path / METRICS_FILE)
    assert list(first) == [field.name for field in fields(StepMetrics)]
    assert StepMetrics(**first) == ONE
    assert (first["eval_loss"], second["eval_loss"]) == (None, 3.0)


def test_a_line_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(ONE)
    assert len(read_metrics(tmp_path / METRICS_FILE)) == 1
    writer.close()


def test_numbers_that_json_cannot_hold_become_null(tmp_path):
    writer = MetricsWriter(tmp_path)
    numbers = {"a": math.nan, "b": 1.0}
    writer.write(
        replace(ONE, loss=math.nan, grad_norm=math.inf, mfu=-math.inf, eval_loss=math.nan, loss_by_dataset=numbers)
    )
    writer.close()

    def refuse(text):
        raise AssertionError(text)

    row = json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=refuse)
    assert [row[key] for key in ("loss", "grad_norm", "mfu", "eval_loss")] == [None] * 4
    assert row["learning_rate"] == 1e-3
    assert row["loss_by_dataset"] == {"a": None, "b": 1.0}


def test_resume_drops_later_steps_and_half_a_line(tmp_path):
    write(tmp_path, range(5))
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 5, "lo')
    write(tmp_path, [3, 4], resume_step=2, loss=1.0)
    assert steps_and_losses(tmp_path) == [(0, 2.5), (1, 2.5), (2, 2.5), (3, 1.0), (4, 1.0)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [METRICS_FILE, TENSORBOARD_FOLDER]


def test_resume_keeps_kept_lines_byte_for_byte(tmp_path):
    write(tmp_path, range(3))
    before = (tmp_path / METRICS_FILE).read_bytes()
    write(tmp_path, [], resume_step=2)
    assert (tmp_path / METRICS_FILE).read_bytes() == before


def test_resume_without_a_file(tmp_path):
    write(tmp_path / "run", [8], resume_step=7)
    assert steps_and_losses(tmp_path / "run") == [(8, 2.5)]


def test_a_new_run_starts_an_empty_file(tmp_path):
    write(tmp_path, range(3))
    write(tmp_path, [0], loss=9.0)
    assert steps_and_losses(tmp_path) == [(0, 9.0)]


def test_reading_leaves_out_a_cut_off_last_line(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_bytes(b'{"step": 0}\n{"step": 1}')  # cut off exactly before its newline: whole
    assert [row["step"] for row in read_metrics(path)] == [0, 1]
    for tail in (b"{", b'{"step": 1, "loss": 2.', b'{"name": "\xc3', b"\0\0\0"):
        path.write_bytes(b'{"step": 0}\n' + tail)
        assert read_metrics(path) == [{"step": 0}]
    path.write_bytes(b"")
    assert read_metrics(path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"step": 0}\n{"st\n{"step": 2}\n', r"metrics.jsonl:2: is not valid JSON"),
        ('{"step": 0}\n{"st\n', r"metrics.jsonl:2: is not valid JSON"),
        ('{"step": 0}\n{"loss": 1}\n', r"metrics.jsonl:2: field 'step': must be a whole number"),
        ("[]\n", r"metrics.jsonl:1: field 'step'"),
    ],
)
def test_damage_elsewhere_is_an_error(tmp_path, content, message):
    (tmp_path / METRICS_FILE).write_text(content)
    with pytest.raises(DataError, match=message):
        read_metrics(tmp_path / METRICS_FILE)
    with pytest.raises(DataError, match=message):
        MetricsWriter(tmp_path, resume_step=1)
    assert (tmp_path / METRICS_FILE).read_text() == content


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read"):
        read_metrics(tmp_path / "none.jsonl")


def test_tensorboard_shows_each_step_once(tmp_path):
    write(tmp_path, range(5))
    write(tmp_path, [3, 4, 5], resume_step=2, loss=1.0)
    events = EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER)).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("loss/loss")]
    assert shown == [(0, 2.5), (1, 2.5), (2, 2.5), (3, 1.0), (4, 1.0), (5, 1.0)]
    assert [event.step for event in events.Scalars("eval/loss")] == [1, 3, 5]
    tags = set(events.Tags()["scalars"])
    assert {"speed/mfu", "memory/peak_memory_bytes", "grad/updated", "loss/loss_by_dataset/birds"} <= tags
    assert not any("silent" in tag for tag in tags)


def test_every_field_is_shown_in_one_group():
    shown = [name for names in GROUPS.values() for name in names]
    assert sorted([*shown, "step", "unix_seconds", "images_by_delta"]) == sorted(
        field.name for field in fields(StepMetrics)
    )


def test_deltas_show_as_a_histogram(tmp_path):
    write(tmp_path, [1])
    events = EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER)).Reload()
    (event,) = events.Histograms("data/log2_delta")
    found = event.histogram_value
    assert (found.min, found.max, found.num, found.sum) == (-8, 0, 6, 3 * -8 - 1)
    counts = {limit: count for limit, count in zip(found.bucket_limit, found.bucket, strict=True) if count}
    assert counts == {-4.5: 3, -0.5: 1, 0.5: 2}, "bars end halfway to the next value that there is"
