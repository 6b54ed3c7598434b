"""Preference pairs and step labels from a model's own answers: cut off, divided, and trained on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from internvl_megatron.config.schema import RunConfig
from internvl_megatron.watching.metrics import METRICS_FILE, read_metrics
from tests.support.small_runs import read_lines, small_data, small_run, write_lines
from tools import build_preferences, build_prm_data

pytestmark = pytest.mark.parallel

TRAIN_RANK = "internvl_megatron.trainer:train_rank"
RunRanks = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small version of the demo's data, and questions: with answers, with a response, and bare ones."""
    out = small_data(tmp_path_factory.mktemp("demo") / "data")
    questions: list[dict[str, Any]] = []
    for record in read_lines(out / "heldout_digits.jsonl")[:8]:
        question = {"id": record["id"], "image": record["image"], "question": "<image>\nRead the number."}
        questions.append(question)
    questions[0]["answer"] = questions[1]["answer"] = "unheard of"
    questions[2] |= {"response": "one two three four", "image": "images/none.png"}
    write_lines(out / "questions.jsonl", questions)
    return out


def settings(data: Path, folder: Path, meta: Path, steps: int) -> RunConfig:
    return small_run(data, folder, f"data.meta={meta}", "data.v2pe=fixed", f"num_steps={steps}")


@pytest.fixture(scope="module")
def weights(run_ranks: RunRanks, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has hardly begun: what it says is noise, but its own."""
    folder = tmp_path_factory.mktemp("run")
    run_ranks(TRAIN_RANK, 1, settings(data, folder, data / "train_meta.json", 2))
    return folder


def options(data: Path, weights: Path) -> list[str]:
    questions = str(data / "questions.jsonl")
    return [
        "--questions",
        questions,
        "--weights",
        str(weights),
        "--max-new-tokens",
        "8",
        "--device",
        "cpu",
        "--batch",
        "2",
    ]


def files(folder: Path) -> dict[str, str]:
    names = ("pairs.jsonl", "judged.jsonl", "report.json")
    return {name: (folder / name).read_text() for name in names if (folder / name).is_file()}


def cut_off(folder: Path, pattern: str, bytes_kept: float) -> None:
    """Leave of a file what a killed process might have."""
    for path in folder.glob(pattern):
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * bytes_kept)])


@pytest.fixture(scope="module")
def preferences(data: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("preferences")
    assert build_preferences.main([str(out), *options(data, weights), "--num-rollouts", "3"]) == 0
    return out


@pytest.fixture(scope="module")
def judged(data: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Solutions are given; that they are right is known, so labels are not all the same."""
    out = tmp_path_factory.mktemp("judged")
    answers = [
        {"id": "digits-00000", "answers": ["7\n\n8\n\nunheard of", "7\n\n8"]},
        {"id": "digits-00001", "answers": ["9"]},
    ]
    write_lines(data / "solutions.jsonl", answers)
    given = ["--solutions", str(data / "solutions.jsonl"), "--num-completions", "2"]
    assert build_prm_data.main([str(out), *options(data, weights), *given]) == 0
    return out


def test_without_the_image(preferences: Path) -> None:
    """The image of one question is not even there: nothing looks for it."""
    pairs = read_lines(preferences / "pairs.jsonl")
    given = {pair["id"]: pair for pair in pairs}["digits-00002-0"]
    assert given["chosen"] == "one two three four" and given["image"] == "images/none.png"
    assert given["rejected"].startswith("one two") and given["rejected"] != given["chosen"]
    assert {pair["source"] for pair in pairs} == {"dropout_ntp"}
    for pair in pairs:
        assert pair["rejected"].startswith(build_preferences.first_half(pair["chosen"]))
    report = json.loads((preferences / "report.json").read_text())
    assert report["right_answers"] == 0 and report["questions_without_pair"]["all answers wrong"] == 2
    rollouts = read_lines(next(preferences.glob("rollouts-*")))[1:]
    drawn = {line["id"]: line["answers"] for line in rollouts}
    assert [len(drawn[f"digits-{number:05d}"]) for number in (0, 1, 3)] == [3, 3, 1] and "digits-00002" not in drawn
    assert len(set(drawn["digits-00000"])) > 1, "answers are drawn"


@pytest.mark.parametrize("kept", [0.4, pytest.param(0.9, marks=pytest.mark.slow)])
def test_cut_off_preferences_end_the_same(
    data: Path, weights: Path, preferences: Path, tmp_path: Path, kept: float
) -> None:
    out = tmp_path / "out"
    shutil.copytree(preferences, out)
    cut_off(out, "rollouts-*", kept)
    for path in [*out.glob("without-image-*"), out / "pairs.jsonl", out / "report.json", out / "meta.json"]:
        path.unlink()
    assert build_preferences.main([str(out), *options(data, weights), "--num-rollouts", "3"]) == 0
    assert files(out) == files(preferences)


@pytest.mark.slow
def test_divided_preferences_are_the_same(data: Path, weights: Path, preferences: Path, tmp_path: Path) -> None:
    arguments = [str(tmp_path), *options(data, weights), "--num-rollouts", "3"]
    assert build_preferences.main([*arguments, "--part", "1/2"]) == 0
    assert not files(tmp_path), "the other part is missing"
    assert build_preferences.main([*arguments, "--part", "0/2", "--nproc", "2"]) == 0
    assert files(tmp_path) == files(preferences)


def test_other_settings_do_not_mix(
    data: Path, weights: Path, preferences: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(preferences), *options(data, weights), "--num-rollouts", "3", "--temperature", "1"]
    assert build_preferences.main(arguments) == 2
    assert "temperature was 0.7, is 1.0" in capsys.readouterr().err


def test_judged_steps_are_trained_on(
    run_ranks: RunRanks, data: Path, weights: Path, judged: Path, tmp_path: Path
) -> None:
    records = read_lines(judged / "judged.jsonl")
    labels = {record["id"]: [turn["value"] for turn in record["conversations"][2::2]] for record in records}
    assert labels == {"digits-00000#0": ["-", "-", "+"], "digits-00000#1": ["-", "-"], "digits-00001#0": ["-"]}
    assert records[0]["conversations"][0]["value"] == (judged / "instruction.txt").read_text()
    run_ranks(TRAIN_RANK, 1, settings(data, tmp_path, judged / "meta.json", 1))
    (row,) = read_metrics(tmp_path / METRICS_FILE)
    steps_a_solution = sum(map(len, labels.values())) / len(labels)
    assert row["num_supervised_tokens"] / row["num_samples"] == pytest.approx(2 * steps_a_solution, rel=0.5)


@pytest.mark.slow
def test_cut_off_labels_end_the_same(data: Path, weights: Path, judged: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(judged, out)
    cut_off(out, "completions-*", 0.8)
    (out / "judged.jsonl").unlink()
    given = ["--solutions", str(data / "solutions.jsonl"), "--num-completions", "2"]
    assert build_prm_data.main([str(out), *options(data, weights), *given]) == 0
    assert files(out) == files(judged)
