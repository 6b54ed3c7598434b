"""The pipeline's data: solutions are right, and no digit is in two of its three parts."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from internvl_megatron.evaluate.final_answer import is_match
from internvl_megatron.inference.steps import split_steps
from tools.prepare_demo import Amounts
from tools.prepare_sums import SumAmounts, prepare_sums, solution

FEW = SumAmounts(
    num_sft=200, num_preference=80, num_judge=60, num_heldout=90, num_heldout_pairs=50, num_heldout_judge=40
)
PRETRAINING = Amounts(
    num_pictures=60,
    num_pairs=4,
    num_texts=4,
    num_heldout_pictures=8,
    num_heldout_pairs=2,
    num_heldout_texts=2,
    questions_per_task=2,
    heldout_share=0.6,
)


@pytest.mark.parametrize(
    ("digits", "steps"),
    [
        ("372", ["372", "3+7=0", "0+2=2", "2"]),
        ("999", ["999", "9+9=8", "8+9=7", "7"]),
        ("05", ["05", "0+5=5", "5"]),
    ],
)
def test_solutions(digits: str, steps: list[str]) -> None:
    assert split_steps(solution(digits), 12) == steps


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sums") / "data"
    prepare_sums(out, FEW, PRETRAINING)
    return out


def tiles(path: Path) -> list[bytes]:
    """The digits on a picture."""
    pixels = np.asarray(Image.open(path))
    return [np.ascontiguousarray(pixels[:, left : left + 28]).tobytes() for left in range(0, pixels.shape[1], 28)]


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
    conversations = [json.loads(line) for line in (data / "sft.jsonl").read_text().splitlines()]
    assert len(conversations) == FEW.num_sft
    for record in conversations:
        answer = record["conversations"][1]["value"]
        assert is_match(answer, str(sum(int(digit) for digit in answer.split("\n")[0]) % 10))
    questions = [json.loads(line) for line in (data / "heldout_questions.jsonl").read_text().splitlines()]
    assert len(questions) == FEW.num_heldout
    assert questions[0]["question"] == conversations[0]["conversations"][0]["value"]
    assert all((data / question["image"]).is_file() and 0 <= int(question["answer"]) <= 9 for question in questions)


def test_the_same_amounts_are_left_alone(data: Path, tmp_path: Path) -> None:
    before = (data / "sft.jsonl").stat().st_mtime_ns
    prepare_sums(data, FEW, PRETRAINING)
    assert (data / "sft.jsonl").stat().st_mtime_ns == before
    prepare_sums(tmp_path / "again", FEW, PRETRAINING)
    for name in ("sft.jsonl", "heldout_questions.jsonl", "judge_questions.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (data / name).read_bytes()
