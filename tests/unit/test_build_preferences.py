"""Preference pairs from answers that are there already; no model runs."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from internvl_megatron.data.dataset import load_datasets
from internvl_megatron.data.preference import parse_pair
from tools.build_preferences import first_half, main, pairs_by_correctness

QUESTIONS = [
    {"id": "mixed", "image": "a.png", "question": "<image>\nhow many?", "answer": "3"},
    {"id": "easy", "image": "a.png", "question": "how many?", "answer": "4"},
    {"id": "hard", "image": "a.png", "question": "how many?", "answer": "5"},
    {"id": "unasked", "question": "how many?", "answer": "5"},
    {"id": "open", "image": "a.png", "question": "describe it", "response": "a grey heron stands there"},
    {"id": "text", "question": "say something", "response": "something"},
]
ROLLOUTS = {
    "mixed": ["two and one\n\n3", "two and two\n\n4", "two and one\n\n3", "3.0", "so five", ""],
    "easy": ["4", "**4**"],
    "hard": ["4", "6"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "questions").mkdir()
    lines = "".join(json.dumps(question) + "\n" for question in QUESTIONS)
    (tmp_path / "questions" / "q.jsonl").write_text(lines)
    lines = "".join(json.dumps({"id": name, "answers": answers}) + "\n" for name, answers in ROLLOUTS.items())
    (tmp_path / "rollouts.jsonl").write_text(lines)
    return tmp_path


def run(folder: Path, *options: str, out: str = "out") -> int:
    questions, rollouts = str(folder / "questions" / "q.jsonl"), str(folder / "rollouts.jsonl")
    return main([str(folder / out), "--questions", questions, "--rollouts", rollouts, *options])


def pairs_of(folder: Path, out: str = "out") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / out / "pairs.jsonl").read_text().splitlines()]


def test_right_answers_are_preferred(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder) == 0
    pairs = pairs_of(folder)
    assert {(pair["chosen"], pair["rejected"]) for pair in pairs} == {
        (chosen, rejected) for chosen in ("two and one\n\n3", "3.0") for rejected in ("two and two\n\n4", "so five")
    }
    assert all((pair["image"], pair["question"]) == ("a.png", "<image>\nhow many?") for pair in pairs)
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["questions_without_pair"] == {
        "all answers right": 1,
        "all answers wrong": 1,
        "no answer": 1,
        "no known answer, and no model to go on without the image (--weights)": 1,
        "no known answer, and no image to leave out": 1,
    }
    assert (report["questions"], report["pairs"], report["right_answers"]) == (6, 4, pytest.approx(5 / 9))
    assert "55.6%  right answers" in capsys.readouterr().out


def test_the_loader_reads_the_pairs(folder: Path) -> None:
    assert run(folder) == 0
    (dataset,) = load_datasets(str(folder / "out" / "meta.json"), folder / "index")
    assert dataset.num_records == 4
    assert Path(dataset.entry.root).resolve() == (folder / "questions").resolve(), (
        "images are found beside the questions"
    )
    for pair in pairs_of(folder):
        chosen, rejected = parse_pair(pair, "here", dataset.entry, 12)
        assert (chosen.turns[-1].text, rejected.turns[-1].text) == (pair["chosen"], pair["rejected"])


def test_the_same_seed_gives_the_same_pairs(folder: Path) -> None:
    outs = {"one": ("--seed", "1"), "again": ("--seed", "1"), "other": ("--seed", "2"), "third": ("--seed", "3")}
    for out, seed in outs.items():
        assert run(folder, "--max-pairs", "2", *seed, out=out) == 0
    chosen = [[(pair["chosen"], pair["rejected"]) for pair in pairs_of(folder, out)] for out in outs]
    assert len(chosen[0]) == 2 and chosen[0] == chosen[1]
    assert chosen[2] != chosen[0] or chosen[3] != chosen[0], "the seed chooses"


def test_at_most_so_many_pairs() -> None:
    answers = [f"right {n}" for n in range(20)] + [f"wrong {n}" for n in range(12)]
    right = [True] * 20 + [False] * 12
    pairs, why = pairs_by_correctness(answers, right, 15, random.Random(0))
    assert len(set(pairs)) == 15 and not why
    assert all(chosen.startswith("right") and rejected.startswith("wrong") for chosen, rejected in pairs)


@pytest.mark.parametrize(
    ("answer", "half"),
    [
        ("a grey heron stands", "a grey"),
        ("a grey heron stands there", "a grey"),
        ("one\n\ntwo  three\n\nfour", "one\n\ntwo"),
        ("heron", "he"),
        ("一只灰色的鸟", "一只灰"),
    ],
)
def test_the_first_half(answer: str, half: str) -> None:
    assert first_half(answer) == half


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-pairs", "0"], "--max-pairs: must be at least 1"),
        (["--part", "2/2"], "--part 2/2: must be I/N"),
        (["--rollouts", "none.jsonl"], "none.jsonl: no such file of answers"),
        (["--questions", "none.jsonl"], "none.jsonl: no such questions file"),
    ],
)
def test_wrong_options(folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert run(folder, *options) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "out").exists(), "nothing is half made"


def test_nothing_to_prefer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "rollouts.jsonl").write_text(json.dumps({"id": "easy", "answers": ["4"]}) + "\n")
    assert run(folder) == 2
    assert "no question gives a pair" in capsys.readouterr().err


def test_a_model_is_needed_without_rollouts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder / "out"), "--questions", str(folder / "questions" / "q.jsonl")]) == 2
    assert "--weights is missing" in capsys.readouterr().err
