"""Choosing among answers, and the curve of what more of them are worth."""

import json

import pytest

from internvl_megatron.evaluate.best_of_n_report import Candidates, scaling_curve, write_report
from internvl_megatron.evaluate.questions import Question
from internvl_megatron.inference.choosing import best, most_frequent


def asked(number, truth):
    return Question(id=number, task="t", image=None, paths=(), question="?", truth=truth, chance=0.0)


def test_the_best_is_the_first_of_the_highest():
    assert best([0.2, 0.7, 0.7, 0.1]) == 1
    assert best([0.0]) == 0


def test_votes():
    def last(answer):
        return answer.split()[-1] if answer else ""

    assert most_frequent(["so 4", "it is 5", "5", "4", "5"], last) == 1
    assert most_frequent(["so 4", "it is 5", "5", "4"], last) == 0, "of ties what came first"
    assert most_frequent(["", "", "", "7"], last) == 3, "silence has no vote"
    assert most_frequent(["", ""], last) == 0


@pytest.fixture
def candidates():
    return [
        Candidates(asked(1, "12"), ("a\n\n12", "13", "13", "12.0", "13"), (0.5, 0.6, 0.1, 0.9, 0.2)),
        Candidates(asked(2, "b"), ("answer: (b) yes", "c", "c", "c", "b"), (0.3, 0.2, 0.1, 0.0, 0.1)),
        Candidates(asked(3, "7"), ("6", "7", "6", "5", "7"), (0.3, 0.4, 0.5, 0.0, 0.1)),
    ]


def test_curve(candidates):
    """By hand: right are 1,4 of the first, 1,5 of the second, 2,5 of the third."""
    expected = {
        # answers: critic, vote, any right, mean
        1: (2 / 3, 2 / 3, 2 / 3, 2 / 3),
        2: (2 / 3, 2 / 3, 1, 1 / 2),
        # critic: 12.0 right, (b) right, 6 wrong; votes: 12 and 13 tie, 12 came first: right; c; 6.
        4: (2 / 3, 1 / 3, 1, (2 + 1 + 1) / 12),
        # votes: 13 three times; c; 6 and 7 tie.
        5: (2 / 3, 0, 1, (2 + 2 + 2) / 15),
    }
    points = scaling_curve(candidates)
    assert [point.num_answers for point in points] == list(expected)
    for point in points:
        found = (point.critic, point.vote, point.any_right, point.mean)
        assert found == pytest.approx(expected[point.num_answers])


def test_report(candidates, tmp_path):
    points = write_report(tmp_path / "out", candidates)
    lines = [json.loads(line) for line in (tmp_path / "out" / "candidates.jsonl").read_text().splitlines()]
    assert [line["chosen"] for line in lines] == [3, 0, 2]
    assert lines[0]["correct"] == [True, False, False, True, False]
    assert [point["num_answers"] for point in json.loads((tmp_path / "out" / "scaling.json").read_text())] == [
        point.num_answers for point in points
    ]
    assert (tmp_path / "out" / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "candidates.jsonl", "scaling.json", "scaling.png",
    ]  # fmt: skip
