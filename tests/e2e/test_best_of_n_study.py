"""Best-of-8 with a trained process reward model, against the most likely answer, on digits that neither model has seen.

`make best-of-n` runs the same. Seeds are fixed.
"""

import json
import re
from pathlib import Path

import pytest

from tests.support.small_runs import read_lines
from tools.best_of_n_study import BestOfNStudy, Sizes

pytestmark = [pytest.mark.slow, pytest.mark.parallel]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("best_of_n")
    BestOfNStudy(folder, 2, Sizes()).run()
    return folder


def test_best_of_8_is_better_than_the_most_likely_answer(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    assert report["questions"] >= 500
    by_count = {point["num_answers"]: point for point in report["curve"]}
    greedy, eight = by_count[1]["critic"], by_count[8]["critic"]
    assert 0.3 < greedy < 0.95, "the task is hard, and not hopeless"
    assert eight >= greedy + 0.05
    assert eight <= by_count[8]["any_right"]
    assert eight > by_count[8]["vote"], "the critic knows more than a vote does"


def test_the_curve_is_that_of_the_candidates(folder: Path) -> None:
    """Counted from the answers and scores themselves."""
    report = json.loads((folder / "report.json").read_text())
    candidates = read_lines(folder / "answers" / "candidates.jsonl")
    assert len(candidates) == report["questions"]
    for point in report["curve"]:
        count, right = point["num_answers"], 0
        for own in candidates:
            scores = own["scores"][:count]
            chosen = own["answers"][scores.index(max(scores))]
            right += re.findall(r"\d: \d", chosen) == re.findall(r"\d: \d", own["truth"])
        assert point["critic"] == pytest.approx(right / len(candidates), abs=0.01), "but for boxes that are not closed"
