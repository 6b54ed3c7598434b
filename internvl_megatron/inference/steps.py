"""Solutions as conversations with a judge that says + or - to every step. What its training data are made of, and what scoring asks.

As VisualPRM (arXiv 2503.10291). The user's first turn is the question and the first step, each later turn is one step more; the
assistant answers each with one character. Imports nothing heavy.
"""

import re
from collections.abc import Sequence
from itertools import pairwise

GOOD, BAD = "+", "-"

JUDGE_INSTRUCTION = (
    "You check solutions step by step. The user gives a question, with its images if it has any, and the first step of a "
    "solution, then one more step in every message. After every message say whether the solution is still on the way to the "
    "right answer: reply + if the step is right and helps, and - if it is wrong, contradicts the images, or leads astray. "
    "Reply with that one character."
)
"""System turn. Ours: a judge trained elsewhere needs the text it was trained with."""


def split_steps(solution: str, most_steps: int) -> list[str]:
    """Steps of a solution: its paragraphs, neighbours joined evenly where there are more than `most_steps`.

    Joining the steps with a blank line gives the solution, white space around paragraphs aside.
    """
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", solution) if part.strip()]
    count = min(most_steps, len(paragraphs))
    bounds = [number * len(paragraphs) // count for number in range(count + 1)] if count else []
    return ["\n\n".join(paragraphs[start:end]) for start, end in pairwise(bounds)]


def judged_turns(question: str, steps: Sequence[str]) -> list[str]:
    """The user's turns. `<image>` is a place of an image in the question, and mere text in steps."""
    first, *others = [step.replace("<image>", "image") for step in steps]
    return [f"### Question:\n{question}\n\n### Solution Process:\n{first}", *others]
