"""The pipeline's data: solutions are right, and no digit is in two of its three parts."""

from dataclasses import replace
from pathlib import Path

import pytest

from internvl_megatron.evaluate.final_answer import is_match
from internvl_megatron.inference.steps import split_steps
from tests.support import small_runs
from tests.support.digit_tiles import tiles
from tests.support.small_runs import read_lines
from tools.prepare_reversals import ReversalAmounts, prepare_reversals, solution

FEW = ReversalAmounts(
    num_sft=200, num_preference=80, num_judge=60, num_heldout=90, num_heldout_pairs=50, num_heldout_judge=40
)
PRETRAINING = replace(small_runs.FEW, heldout_share=0.9)


@pytest.mark.parametrize(
    ("digits", "steps"),
    [
        ("372", ["372", "2", "27", "273"]),
        ("990", ["990", "0", "09", "099"]),
        ("05", ["05", "5", "50"]),
    ],
)
def test_solutions(digits: str, steps: list[str]) -> None:
    assert split_steps(solution(digits), 12) == steps


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reversals") / "data"
    prepare_reversals(out, FEW, PRETRAINING)
    return out


def test_no_digit_is_in_two_parts(data: Path) -> None:
    parts = {
        "seen": [*(data / "demo" / "images" / "train").iterdir(), *(data / "images").glob("sft-*")],
        "practice": [*(data / "images").glob("preference-*"), *(data / "images").glob("judge-*")],
        "heldout": list((data / "images").glob("heldout*")),
    }
    digits = {name: {tile for path in paths for tile in tiles(path)} for name, paths in parts.items()}
    assert all(len(found) > 150 for found in digits.values())
    names = list(digits)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not digits[names[one]] & digits[names[other]], (names[one], names[other])


def test_questions_and_conversations_agree(data: Path) -> None:
    conversations = read_lines(data / "sft.jsonl")
    assert len(conversations) == FEW.num_sft
    for record in conversations:
        answer = record["conversations"][1]["value"]
        assert is_match(answer, "".join(reversed(answer.split("\n")[0])))
    questions = read_lines(data / "heldout_questions.jsonl")
    assert len(questions) == FEW.num_heldout
    assert questions[0]["question"] == conversations[0]["conversations"][0]["value"]
    assert all((data / question["image"]).is_file() and len(question["answer"]) == 2 for question in questions)


def test_the_same_amounts_are_left_alone(data: Path, tmp_path: Path) -> None:
    before = (data / "sft.jsonl").stat().st_mtime_ns
    prepare_reversals(data, FEW, PRETRAINING)
    assert (data / "sft.jsonl").stat().st_mtime_ns == before
    prepare_reversals(tmp_path / "again", FEW, PRETRAINING)
    for name in ("sft.jsonl", "heldout_questions.jsonl", "judge_questions.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (data / name).read_bytes()
