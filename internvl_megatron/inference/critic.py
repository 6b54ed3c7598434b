"""Scores of solutions by a process reward model: how sure it is of every step, in one pass over each solution.

As VisualPRM (arXiv 2503.10291): every step is answered with + in the conversation that is scored, whatever the model thinks of
it, and its score is the probability of + where it stands, of + and - alone. A solution's score is the mean over its steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from internvl_megatron.data.conversation import answer_header
from internvl_megatron.data.tokenizer import Tokenizer
from internvl_megatron.errors import ConfigError
from internvl_megatron.inference.generate import Generator
from internvl_megatron.inference.prompt import Prompt
from internvl_megatron.inference.scoring import answer_starts
from internvl_megatron.inference.steps import BAD, GOOD, JUDGE_INSTRUCTION, judged_turns, split_steps

MOST_STEPS = 12


@dataclass(frozen=True)
class Solution:
    """What is judged."""

    prompt: Prompt
    """The question; a system turn, earlier turns and a given beginning of the answer are not looked at."""
    text: str


def score_solutions(
    generator: Generator,
    solutions: Sequence[Solution],
    instruction: str = JUDGE_INSTRUCTION,
    most_steps: int = MOST_STEPS,
) -> list[float]:
    """Mean step score of every solution, from 0 to 1; 0 where there is no text."""
    return [
        float(np.mean(scores)) if len(scores) else 0.0
        for scores in score_steps(generator, solutions, instruction, most_steps)
    ]


def score_steps(
    generator: Generator,
    solutions: Sequence[Solution],
    instruction: str = JUDGE_INSTRUCTION,
    most_steps: int = MOST_STEPS,
) -> list[np.ndarray]:
    """Score of every step of every solution, fp64 [steps] each, from 0 to 1.

    Args:
        generator: around the process reward model.
        solutions: any number.
        instruction: system turn; the one the model was trained with.
        most_steps: into how many steps a solution is cut at most, as in training.

    Raises:
        ConfigError: the tokenizer has no token for + or -.
        DataError: an image cannot be read.
    """
    steps = [split_steps(solution.text, most_steps) for solution in solutions]
    prompts = [
        judge_prompt(solution.prompt, own, instruction) for solution, own in zip(solutions, steps, strict=True) if own
    ]
    pairs = answer_starts(generator, prompts, verdict_tokens(generator.tokenizer))
    # Of two tokens' softmax the first is the logistic function of their difference.
    scores = iter(1 / (1 + np.exp(pair[:, 1].astype(np.float64) - pair[:, 0])) for pair in pairs)
    return [next(scores) if own else np.empty(0) for own in steps]


def judge_prompt(asked: Prompt, steps: Sequence[str], instruction: str) -> Prompt:
    """The conversation up to the verdict on the last step, with + for those before it."""
    *before, last = judged_turns(asked.question, steps)
    history = tuple((turn, GOOD) for turn in before)
    return replace(asked, question=last, system=instruction, history=history, answer_start="", seed=None)


def verdict_tokens(tokenizer: Tokenizer) -> tuple[int, int]:
    """Tokens of + and - as answers.

    Raises:
        ConfigError: one of them is not one token.
    """
    header = answer_header(tokenizer)
    found = []
    for verdict in (GOOD, BAD):
        *before, token = answer_header(tokenizer, verdict)
        if before != header:
            raise ConfigError(f"the tokenizer has no token of its own for {verdict}; a process reward model needs one")
        found.append(token)
    return found[0], found[1]
