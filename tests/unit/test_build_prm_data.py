"""Step labels from completions that are there already, as conversations of which exactly the verdicts are trained on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from internvl_megatron.config.schema import DataConfig
from internvl_megatron.data.conversation import IGNORED_LABEL
from internvl_megatron.data.dataset import load_datasets
from internvl_megatron.data.fast_tokenizer import FastTokenizer
from internvl_megatron.data.records import SampleSettings, parse_record, render_sample
from internvl_megatron.data.tokenizer_build import train_small_tokenizer
from internvl_megatron.inference.steps import JUDGE_INSTRUCTION
from tools.asking_options import write_dataset
from tools.build_prm_data import Solution, count, cut_solutions, judged_record, main, right_shares
from tools.rollouts import Question, read_questions

TEXT = "372\n\n3+7=10\n\n10+2=13\n\n13"


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((28, 28, 3), dtype=np.uint8)).save(tmp_path / name)
    records: list[dict[str, Any]] = [
        {"id": "sum", "image": "a.png", "question": "<image>\nAdd the digits.", "answer": "12"},
        {"id": "two", "image": ["a.png", "b.png"], "question": "Add them.", "answer": "12"},
        {"id": "open", "question": "Say something."},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_questions(path, tmp_path)


def solution_of(questions: list[Question], text: str = TEXT, most_steps: int = 12) -> Solution:
    (solution,) = cut_solutions(questions[:1], {"sum": [text]}, most_steps)
    return solution


def test_a_step_is_good_if_one_ending_is_right(questions: list[Question]) -> None:
    solution = solution_of(questions)
    assert solution.starts() == ["372\n\n", "372\n\n3+7=10\n\n", "372\n\n3+7=10\n\n10+2=13\n\n"]
    endings = ["3+7=10\n\n10+2=12\n\n12", "13", "10+2=12\n\n12", "12", "13", "14"]
    shares = right_shares(solution, endings)
    assert shares == [0.5, 1.0, 0.0, 0.0]
    said = judged_record(solution, shares, "Reply.")["conversations"]
    assert [turn["value"] for turn in said[2::2]] == ["+", "+", "-", "-"]
    assert said[0] == {"from": "system", "value": "Reply."}
    assert said[1]["value"] == "### Question:\n<image>\nAdd the digits.\n\n### Solution Process:\n372"
    assert [turn["value"] for turn in said[3::2]] == ["3+7=10", "10+2=13", "13"]


def test_an_ending_may_go_on_in_the_middle_of_a_line(questions: list[Question]) -> None:
    """What counts is the answer as a whole: an ending that adds nothing leaves the step's own line the last one."""
    assert right_shares(solution_of(questions, "so 12\n\nor 13"), ["", " "]) == [0.0, 0.0]
    assert right_shares(solution_of(questions, "12\n\n13"), ["", "12"]) == [1.0, 0.0]


def test_a_solution_of_one_step_is_judged_by_its_answer(questions: list[Question]) -> None:
    assert right_shares(solution_of(questions, "12"), []) == [1.0]
    assert right_shares(solution_of(questions, "13"), []) == [0.0]


def test_steps_are_joined_where_there_are_many(questions: list[Question]) -> None:
    solution = solution_of(questions, most_steps=2)
    assert solution.steps == ["372\n\n3+7=10", "10+2=13\n\n13"]
    assert solution.starts() == ["372\n\n3+7=10\n\n"]


def test_no_solution_is_there_twice(questions: list[Question]) -> None:
    solutions = cut_solutions(questions[:2], {"sum": ["12", "12", "13", " "], "two": ["12"]}, 12)
    assert [solution.id for solution in solutions] == ["sum#0", "sum#1", "two#0"]


@pytest.mark.parametrize("which", [0, 1])
def test_exactly_the_verdicts_are_trained_on(questions: list[Question], tmp_path: Path, which: int) -> None:
    """Each + or -, and the <|im_end|> behind it, as after every answer of the template."""
    question = questions[which]
    text = "372 <image>\n\n3+7=10\n\n+ and - are signs"
    (solution,) = cut_solutions([question], {question.id: [text]}, 12)
    record = judged_record(solution, [1.0, 0.25, 0.0], JUDGE_INSTRUCTION)
    write_dataset(tmp_path / "out", "judged", "judged.jsonl", [record], tmp_path)
    (dataset,) = load_datasets(str(tmp_path / "out" / "meta.json"), tmp_path / "index")
    raw = json.loads((tmp_path / "out" / "judged.jsonl").read_text())
    tokenizer = FastTokenizer(train_small_tokenizer([TEXT, JUDGE_INSTRUCTION], vocab_size=300), "small")
    settings = SampleSettings(data=DataConfig(tokens_per_row=4096), tile_pixels=28, tokens_per_tile=4)
    sample = render_sample(parse_record(raw, "here", dataset.entry, 4), settings, tokenizer, np.random.default_rng)
    trained = sample.labels[sample.labels != IGNORED_LABEL].tolist()
    end = "<|im_end|>"
    assert [tokenizer.decode([token]) for token in trained] == ["+", end, "+", end, "-", end]
    assert len(sample.images) == which + 1


def test_the_report_counts(questions: list[Question]) -> None:
    solutions = cut_solutions(questions, {"sum": [TEXT, "12"], "two": ["13"]}, 12)
    shares = {"sum#0": [0.5, 0.0, 0.0, 0.0], "sum#1": [1.0], "two#0": [0.0]}
    assert count(questions, solutions, shares) == {
        "questions": 3,
        "questions_without_answer": 1,
        "solutions": 3,
        "right_solutions": pytest.approx(1 / 3),
        "wrong_solutions_with_a_bad_step_before_the_last": 1,
        "steps": {"bad": 4, "good": 2},
        "solutions_by_steps": {"1": 2, "4": 1},
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--weights is missing"),
        (["--weights", "none", "--num-completions", "0"], "--num-completions: must be at least 1"),
        (["--weights", "none", "--instruction", "none.txt"], "--instruction none.txt: cannot be read"),
        (["--weights", "none", "--instruction", "blank.txt"], "blank.txt: is empty"),
        (["--weights", "none", "--part", "x"], "--part x: must be I/N"),
    ],
)
def test_wrong_options(
    questions: list[Question],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("blank.txt").write_text("  \n")
    assert main(["out", "--questions", "q.jsonl", *options]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()
