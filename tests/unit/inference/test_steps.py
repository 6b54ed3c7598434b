"""Solutions cut into steps, and the turns a judge sees."""

import pytest

from internvl_megatron.inference.steps import judged_turns, split_steps


@pytest.mark.parametrize(
    ("solution", "steps"),
    [
        ("one\n\ntwo\nstill two\n \t\n\n\nthree\n", ["one", "two\nstill two", "three"]),
        ("one", ["one"]),
        (" \n\n ", []),
        ("", []),
    ],
)
def test_paragraphs_are_steps(solution: str, steps: list[str]) -> None:
    assert split_steps(solution, 12) == steps


@pytest.mark.parametrize(("paragraphs", "most"), [(12, 12), (13, 12), (24, 12), (25, 12), (100, 12), (5, 2), (3, 1)])
def test_too_many_are_joined_evenly(paragraphs: int, most: int) -> None:
    solution = "\n\n".join(f"step {number}" for number in range(paragraphs))
    steps = split_steps(solution, most)
    lengths = [step.count("step") for step in steps]
    assert len(steps) == min(most, paragraphs)
    assert max(lengths) - min(lengths) <= 1
    assert "\n\n".join(steps) == solution


def test_turns_of_the_judge() -> None:
    turns = judged_turns("<image>\nHow many?", ["see <image>: two", "so two"])
    assert turns == [
        "### Question:\n<image>\nHow many?\n\n### Solution Process:\nsee image: two",
        "so two",
    ], "the question's image has its place; a step's is mere text"
