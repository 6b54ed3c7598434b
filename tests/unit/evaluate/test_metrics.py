"""Metrics against plain implementations written here another way, on cases made by hand and at random."""

import random
import re
from collections import defaultdict
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import sklearn.metrics
import torch
from torchvision.ops import box_iou

from internvl_megatron.evaluate.metrics.accuracy import percent, percent_by_label
from internvl_megatron.evaluate.metrics.anls import anls, edit_distance
from internvl_megatron.evaluate.metrics.box_overlap import box_in, overlap
from internvl_megatron.evaluate.metrics.chosen_option import chosen_option
from internvl_megatron.evaluate.metrics.contained_text import contains_any
from internvl_megatron.evaluate.metrics.hallusion_accuracy import hallusion_accuracy
from internvl_megatron.evaluate.metrics.mme_score import COGNITION, PERCEPTION, mme_score
from internvl_megatron.evaluate.metrics.relaxed_accuracy import is_relaxed_match
from internvl_megatron.evaluate.metrics.rounded_number import is_rounded_match
from internvl_megatron.evaluate.metrics.vqa_accuracy import normalised, vqa_accuracy
from internvl_megatron.evaluate.metrics.yes_no import said, yes_no_score


def recursive_distance(first, second):
    """By its definition."""

    @cache
    def distance(i, j):
        if not i or not j:
            return i + j
        return min(
            distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (first[i - 1] != second[j - 1])
        )

    return distance(len(first), len(second))


def test_edit_distance_is_its_definition():
    rng = random.Random(1)
    for _ in range(300):
        first, second = ("".join(rng.choices("abc ", k=rng.randint(0, 9))) for _ in range(2))
        assert edit_distance(first, second) == recursive_distance(first, second)


def test_anls():
    assert anls("Two", ["two"]) == 1
    assert anls("two  dogs", ["two dogs"]) == 1, "the distance is without white space"
    assert anls("abcd", ["abxy"]) == 0.5
    assert anls("abc", ["xyc"]) == 0, "a third is below the threshold"
    assert anls("abcd", ["xxxx", "abcx"]) == 0.75, "the nearest counts"
    assert anls("", ["two"]) == 0
    assert anls("ab  cd", ["ab xd"]) == pytest.approx(1 - 1 / 6), "the divisor is the raw length"
    rng = random.Random(2)
    for _ in range(200):
        answer, *truths = ("".join(rng.choices("ab C", k=rng.randint(1, 7))) for _ in range(3))
        best = 0.0
        for truth in truths:
            plain = [re.sub(r"\s+", " ", text.strip()).lower() for text in (answer, truth)]
            best = max(best, 1 - recursive_distance(*plain) / max(len(answer), len(truth)))
        assert anls(answer, truths) == pytest.approx(best if best >= 0.5 else 0)


@pytest.mark.parametrize(
    ("answer", "truth", "of_truth", "of_answer"),
    [
        ("105", "100", True, True),
        ("95", "100", True, False),  # 5 / 95 is more than 5 %
        ("106", "100", False, False),
        ("105.2", "100", False, True),  # 5.2 / 105.2 is not
        ("5%", "0.05", True, True),
        ("5 %", "5", False, False),
        ("0", "0", True, True),
        ("0.0", "0", False, False),  # where the number to compare with is 0, the texts are
        ("Yes", "yes", True, True),
        ("1,000", "1000", False, False),
        ("-3", "-3.1", True, True),
        ("two", "2", False, False),
    ],
)
def test_relaxed_accuracy(answer, truth, of_truth, of_answer):
    assert is_relaxed_match(answer, truth) == of_truth
    assert is_relaxed_match(answer, truth, "answer") == of_answer


def test_vqa_accuracy_is_the_mean_over_those_left_out():
    """By all sets of nine of ten people, as the definition has it."""
    rng = random.Random(3)
    for _ in range(100):
        people = rng.choices(["two", "three", "2", "dogs"], k=10)
        answer = rng.choice(["2", "three", "cat"])
        same = {"two": "2", "three": "3"}
        values = [
            min(1, sum(same.get(one, one) == same.get(answer, answer) for one in nine) / 3)
            for nine in combinations(people, 9)
        ]
        assert vqa_accuracy(answer, people) == pytest.approx(np.mean(values))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The two dogs.", "2 dogs"),
        ("A man, a plan", "man plan"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("yall'll", "y'all'll"),
        ("lets", "lets"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("St. John's", "st john's"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("None", "0"),
        ("eleven", "eleven"),
        ("a\nb\tc", "b c"),
    ],
)
def test_normal_form_of_vqa_answers(text, expected):
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "B"),
        ("B. nine", "B"),
        ("(B)", "B"),
        ("The answer is B", "B"),
        ("A or B", None),
        ("A dog is what can be seen here", None),  # a letter so far from the end is an article
        ("the correct answer is **C**, because there are six of them in the picture", "C"),
        ("the answer is correct, whatever it may be, that is for sure", None),
        ("it says nine", "B"),
        ("two and nine", None),
        ("Z", None),
        ("", None),
        ("nine" + " so" * 60, None),
        ("b", None),
    ],
)
def test_chosen_option(answer, expected):
    assert chosen_option(answer, {"A": "two", "B": "Nine", "C": "six"}) == expected


def test_yes_and_no_equal_scikit_learn():
    assert [said(text) for text in ("Yes", "yes, it is.", "No!", "no-one", "yes or no", "maybe", "")] == [
        True, True, False, False, None, None, None,
    ]  # fmt: skip
    rng = np.random.default_rng(4)
    for _ in range(20):
        answers = rng.choice(np.array([True, False, None], dtype=object), size=30)
        truths = rng.choice(np.array([True, False]), size=30)
        found = yes_no_score(zip(answers.tolist(), truths.tolist(), strict=True))
        as_yes = [answer is True for answer in answers.tolist()]
        expected = sklearn.metrics.precision_recall_fscore_support(truths, as_yes, average="binary", zero_division=0)  # pyright: ignore[reportArgumentType]
        assert (found.precision, found.recall, found.f1) == pytest.approx(expected[:3])
        assert found.accuracy == pytest.approx(
            np.mean([a is t for a, t in zip(answers.tolist(), truths.tolist(), strict=True)])
        )
        assert found.yes_share == pytest.approx(np.mean(as_yes))
    assert yes_no_score([(False, False)]).f1 == 0


def test_mme_score():
    """By loops over an array of subtasks, images and two questions each."""
    names = (*PERCEPTION, *COGNITION)
    right = np.random.default_rng(5).random((len(names), 6, 2)) < 0.7
    found = mme_score((names[s], str(i), bool(right[s, i, q])) for s in range(14) for i in range(6) for q in range(2))
    expected = [100 * (right[s].mean() + (right[s].sum(axis=1) == 2).mean()) for s in range(14)]
    assert [found.by_subtask[name] for name in names] == pytest.approx(expected)
    assert found.perception == pytest.approx(sum(expected[:10]))
    assert found.total == pytest.approx(sum(expected))
    assert mme_score((name, "1", True) for name in names).total == 2800


def test_hallusion_accuracy():
    rng = random.Random(6)
    rows = [(("x", rng.randint(0, 4)), ("x", rng.randint(0, 3)), rng.random() < 0.8) for _ in range(40)]
    found = hallusion_accuracy(rows)
    figures, questions = defaultdict(set), defaultdict(set)
    for figure, question, right in rows:
        figures[figure].add(right)
        questions[question].add(right)
    assert found.all == sum(row[2] for row in rows) / 40
    assert found.figures == sum(own == {True} for own in figures.values()) / len(figures)
    assert found.questions == sum(own == {True} for own in questions.values()) / len(questions)
    assert found.mean == pytest.approx(np.mean([found.all, found.figures, found.questions]))


def test_overlap_equals_torchvision():
    rng = np.random.default_rng(7)
    for _ in range(100):
        boxes = [np.sort(rng.integers(0, 50, (2, 2)), axis=0).flatten() + np.array([0, 0, 1, 1]) for _ in range(2)]
        one, other = (torch.tensor(box[None], dtype=torch.float64) for box in boxes)
        expected = box_iou(one, other).item()
        assert overlap(boxes[0].tolist(), boxes[1].tolist()) == pytest.approx(expected)
    assert overlap((3, 3, 3, 3), (3, 3, 3, 3)) == 0
    assert overlap((9, 9, 0, 0), (0, 0, 9, 9)) == 0, "a box that is upside down has no area"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<ref>dog</ref><box>[[100, 200, 500, 1000]]</box>", (4, 4, 20, 20)),
        ("[100,200,500,1000] and [0,0,1,1]", (4, 4, 20, 20)),
        ("[0.1, 0.2, 0.5, 1.0]", (4, 4, 20, 20)),
        ("100, 200, 500, 1000", None),
        ("[1, 2, 3]", None),
        ("", None),
    ],
)
def test_boxes_in_answers(answer, expected):
    found = box_in(answer, 40, 20)
    assert found is None if expected is None else found == pytest.approx(expected)


def test_boxes_without_brackets_are_an_option():
    assert box_in("at 100, 200, 500, 1000", 40, 20, "optional") == pytest.approx((4, 4, 20, 20))


def test_contained_text():
    assert contains_any("It says: EXIT\nhere", ["exit here"])
    assert not contains_any("EXI T", ["exit"])
    assert contains_any("x ^ 2 + y", ["x^2+y"], ignore_blanks=True)
    assert not contains_any("X^2", ["x^2"], ignore_blanks=True), "letters of formulas are as they stand"
    assert contains_any("three", ["two", "three"])


def test_rounded_numbers():
    assert is_rounded_match("1.249", "1.2", 1) and not is_rounded_match("1.26", "1.2", 1)
    assert is_rounded_match("$1,200.", "1200", 0) and is_rounded_match("\\(7\\)", "7", 0)
    assert not is_rounded_match("seven", "7", 0) and not is_rounded_match("inf", "inf", 0)


def test_percentages():
    assert percent([1, 0, 0.5]) == 50
    answers = [({"a": "x"}, 1.0), ({"a": "y", "b": "z"}, 0.0), ({"a": "x"}, 0.0)]
    assert percent_by_label(answers) == {"a/x": 50, "a/y": 0, "b/z": 0}
