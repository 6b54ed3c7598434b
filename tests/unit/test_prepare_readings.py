"""Data of the Best-of-N study: solutions and comparisons are right, and the judge has seen no held-out digit."""

import re
from pathlib import Path
from typing import Any

import pytest

from internvl_megatron.evaluate.final_answer import is_match
from internvl_megatron.inference.steps import split_steps
from tests.support import small_runs
from tests.support.digit_tiles import tiles
from tests.support.small_runs import read_lines
from tools.prepare_readings import INSTRUCTION, ReadingAmounts, known_answer, prepare_readings, solution

FEW = ReadingAmounts(
    num_sft=150,
    num_texts=20,
    num_pairs=20,
    num_digits=300,
    num_readings=400,
    num_places=200,
    num_solutions=50,
    num_verdicts=50,
    num_heldout=120,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("readings") / "data"
    prepare_readings(out, FEW, small_runs.FEW)
    return out


def shown(data: Path, *patterns: str) -> set[bytes]:
    return {tile for pattern in patterns for path in data.glob(pattern) for tile in tiles(path)}


def test_who_has_seen_what(data: Path) -> None:
    policy = shown(data, "policy/images/train/*", "images/sft-*")
    lessons = [f"images/{name}-*" for name in ("digit", "reading", "place", "solution", "verdict")]
    judge = shown(data, "judge/images/train/*", *lessons)
    heldout = shown(data, "images/heldout-*")
    assert len(policy) > 150 and len(heldout) > 150
    assert not (policy | judge) & heldout, "held-out digits were trained on"
    assert len(judge) > 3 * len(policy), "the judge has seen more than the policy"


def turns(record: dict[str, Any]) -> list[tuple[str, str]]:
    said = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
    return list(zip(said[::2], said[1::2], strict=True))


def digits_of(answer: str) -> list[str]:
    """What a solution says, place by place."""
    said = re.findall(r"(\d): (\d)", answer)
    assert [int(place) for place, _ in said] == list(range(1, len(said) + 1))
    return [digit for _, digit in said]


def labels(data: Path) -> dict[bytes, str]:
    """What every digit is, by the readings it is in."""
    known: dict[bytes, str] = {}
    for record in read_lines(data / "readings.jsonl"):
        known.update(zip(tiles(data / record["image"]), digits_of(turns(record)[0][1]), strict=True))
    return known


def test_comparisons_are_right(data: Path) -> None:
    known, checked, signs = labels(data), 0, set()
    for name in ("digits", "places"):
        for record in read_lines(data / f"{name}.jsonl"):
            digits = [known.get(tile) for tile in tiles(data / record["image"])]
            for claim, sign in turns(record):
                place, said = claim.split(": ")
                truth = digits[int(place) - 1]
                if truth is not None:
                    assert sign == ("-" if int(truth) < int(said) else ">" if int(truth) > int(said) else "+"), claim
                    checked += 1
                    signs.add(sign)
    assert checked > 300 and signs == set("-+>")
    for record in read_lines(data / "pairs.jsonl"):
        for claim, sign in turns(record):
            first, second = map(int, claim.split())
            assert sign == ("-" if first < second else ">" if first > second else "+"), claim


@pytest.mark.parametrize(("name", "answers"), [("solutions", "-+>"), ("verdicts", "-+")])
def test_made_solutions_are_conversations_with_the_judge(data: Path, name: str, answers: str) -> None:
    known, found, right = labels(data), set(), 0
    records = read_lines(data / f"{name}.jsonl")
    for record in records:
        system, first, *_ = record["conversations"]
        assert system == {"from": "system", "value": INSTRUCTION}
        assert first["value"].startswith("### Question:\n<image>\nRead.\n\n### Solution Process:\n\\boxed{1: ")
        said = [turn["value"].split("\n")[-1].strip("}")[-1] for turn in record["conversations"][1::2]]
        verdicts = [turn["value"] for turn in record["conversations"][2::2]]
        digits = [known.get(tile) for tile in tiles(data / record["image"])]
        for digit, claim, verdict in zip(digits, said, verdicts, strict=True):
            if digit is not None:
                assert (verdict == "+") == (claim == digit), record
        found |= set(verdicts)
        right += set(verdicts) == {"+"}
    assert found == set(answers)
    assert 0 < right < len(records), "some are right and some wrong"


def test_fine_tuning_has_mistakes(data: Path) -> None:
    known, agree = labels(data), []
    for record in read_lines(data / "sft.jsonl"):
        truth = [known.get(tile) for tile in tiles(data / record["image"])]
        said = digits_of(turns(record)[0][1])
        agree += [one == digit for one, digit in zip(said, truth, strict=True) if digit is not None]
    assert 0.8 < sum(agree) / len(agree) < 0.97, f"{FEW.mistaken_share} of the digits are wrong, of {len(agree)}"


def test_solutions_and_questions(data: Path) -> None:
    assert solution("372") == "\\boxed{1: 3\n\n2: 7\n\n3: 2}"
    assert split_steps(solution("372"), 12) == ["\\boxed{1: 3", "2: 7", "3: 2}"]
    assert is_match(solution("372"), known_answer("372"))
    assert not is_match(solution("371"), known_answer("372"))
    questions = read_lines(data / "heldout_questions.jsonl")
    assert len(questions) == FEW.num_heldout
    first = questions[0]
    assert (data / first["image"]).is_file() and len(digits_of(first["answer"])) == FEW.length
    assert first["question"] == read_lines(data / "sft.jsonl")[0]["conversations"][0]["value"]


def test_the_same_amounts_are_left_alone(data: Path) -> None:
    before = (data / "sft.jsonl").stat().st_mtime_ns
    prepare_readings(data, FEW, small_runs.FEW)
    assert (data / "sft.jsonl").stat().st_mtime_ns == before
