"""Questions files are checked to the last line before anything is asked; answers are scored by task."""

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from internvl_megatron.errors import DataError
from internvl_megatron.evaluate.questions import TaskScore, evaluate_questions, format_table, read_questions
from internvl_megatron.inference.prompt import Prompt


class Parrot:
    """Stands in for a model: answers with the first word of the question."""

    def __init__(self):
        self.calls = []

    def answer(self, prompts):
        self.calls.append(list(prompts))
        return [prompt.question.split()[0] for prompt in prompts]


def entry(**changes: Any) -> dict[str, Any]:
    return {"id": "a", "question": "two digits?", "answer": "two", "task": "count", "chance": 0.25} | changes


@pytest.fixture
def questions(tmp_path):
    """Writes a questions file next to one picture, `a.png`; a line that is a string is written as it is."""
    Image.fromarray(np.zeros((28, 28, 3), np.uint8)).save(tmp_path / "a.png")

    def make(*lines):
        path = tmp_path / "questions.jsonl"
        text = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
        path.write_text("\n".join(text) + "\n", encoding="utf-8")
        return path

    return make


def test_asks_each_question_alone_and_writes_the_answers(questions, tmp_path):
    path = questions(
        entry(),
        "",
        entry(id=2, image="a.png", question="one\n<image>?", answer=" two\n"),
        entry(id="c", image=["a.png", "a.png"], question="数 it", answer="数", task="pairs", chance=0),
        entry(id="d", answer="zwei", image=None),
    )
    parrot = Parrot()
    answers = tmp_path / "out" / "answers.jsonl"
    scores = evaluate_questions(path, answers, parrot.answer)
    picture = str(tmp_path / "a.png")
    assert parrot.calls == [
        [
            Prompt("two digits?"),
            Prompt("one\n<image>?", (picture,)),
            Prompt("数 it", (picture, picture)),
            Prompt("two digits?"),
        ]
    ]
    assert scores == [TaskScore("count", 3, 1 / 3, 0.25), TaskScore("pairs", 1, 1.0, 0.0)]
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert rows[2] == {
        "id": "c",
        "task": "pairs",
        "image": ["a.png", "a.png"],
        "question": "数 it",
        "answer": "数",
        "truth": "数",
        "chance": 0.0,
        "correct": True,
    }
    assert [row["correct"] for row in rows] == [True, False, True, False]
    assert [row["image"] for row in rows[:2]] == [None, "a.png"]
    assert [file.name for file in answers.parent.iterdir()] == ["answers.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "is a JSON list"),
        (entry(id=None), "field 'id': must be a string or a whole number, not None"),
        (entry(id=True), "field 'id'"),
        (entry(id="first"), "field 'id': 'first' is taken by an earlier line"),
        (entry(question=["x"]), "field 'question': must be a string"),
        (entry(question=" "), "field 'question': must be a string that is not empty"),
        (
            '{"id": "a", "question": "\\ud800", "answer": "x", "task": "t", "chance": 0}',
            "field 'question': has half a",
        ),
        (entry(answer=7), "field 'answer': must be a string that is not empty, not 7"),
        (entry(task=""), "field 'task'"),
        (entry(chance="0.5"), "field 'chance': must be a number from 0 to below 1, not '0.5'"),
        (entry(chance=1), "field 'chance'"),
        (entry(chance=float("nan")), "field 'chance'"),
        (entry(chance=True), "field 'chance'"),
        (entry(chance=0.5), "field 'chance': is 0.5, but 0.25 in earlier lines of task 'count'"),
        (entry(image=7), "field 'image': must be a path or a list of paths, not 7"),
        (entry(image=["a.png", 7]), "field 'image': must be a path or a list of paths"),
        (entry(image="none.png"), "field 'image': image .*none.png: file not found"),
        (entry(image="questions.jsonl"), "field 'image': image .*questions.jsonl: cannot be read"),
        (entry(image="a.png", question="<image><image>?"), "field 'question': has 2 <image> but field 'image' has 1"),
        (entry(question="<image>?"), "field 'question': has 1 <image> but field 'image' has 0"),
    ],
)
def test_every_malformed_line_is_named_before_anything_is_asked(questions, tmp_path, line, message):
    path = questions(entry(id="first"), "", line)
    parrot = Parrot()
    with pytest.raises(DataError, match=rf"questions.jsonl:3: {message}"):
        evaluate_questions(path, tmp_path / "answers.jsonl", parrot.answer)
    assert parrot.calls == []
    assert not (tmp_path / "answers.jsonl").exists()


def test_questions_without_tasks_are_one(questions):
    lines = [
        {name: value for name, value in entry(id=name).items() if name not in ("task", "chance")} for name in "ab"
    ]
    found = read_questions(questions(*lines))
    assert [(question.task, question.chance) for question in found] == [("all", 0.0)] * 2


@pytest.mark.parametrize("field", ["id", "question", "answer"])
def test_a_missing_field_is_named(questions, field):
    line = entry()
    del line[field]
    with pytest.raises(DataError, match=rf"questions.jsonl:1: field '{field}'"):
        read_questions(questions(line))


def test_no_file_and_no_questions(questions, tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: no such questions file"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="has no records"):
        read_questions(questions(""))


def test_a_failure_leaves_the_old_answers(questions, tmp_path):
    answers = tmp_path / "answers.jsonl"
    answers.write_text("old")

    class Broken(Parrot):
        def answer(self, prompts):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        evaluate_questions(questions(entry()), answers, Broken().answer)
    assert answers.read_text() == "old"


def test_gap_closed():
    assert TaskScore("x", 10, 0.75, 0.5).gap_closed == 0.5
    assert TaskScore("x", 10, 1.0, 0.9).gap_closed == 1.0
    assert TaskScore("x", 10, 0.25, 0.5).gap_closed == -0.5


def test_table_is_aligned():
    table = format_table([TaskScore("read", 100, 0.97, 0.02), TaskScore("pair_longer", 7, 1 / 3, 0.5)])
    assert table.splitlines() == [
        "task         questions  exact match  chance  gap closed",
        "read               100        97.0%    2.0%       96.9%",
        "pair_longer          7        33.3%   50.0%      -33.3%",
    ]
    assert format_table([]) == "task  questions  exact match  chance  gap closed"
