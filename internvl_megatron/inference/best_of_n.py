"""Test-time scaling: many answers to every question, and which of them to take.

As InternVL3 is evaluated (paper, sec. 2.4; VisualPRM, arXiv 2503.10291; VLMEvalKit): the first answer is the most likely one, the
others are drawn; a critic scores every step of each, an answer's score is the mean over its steps, and the best answer wins.
"""

from collections.abc import Sequence
from dataclasses import replace

from internvl_megatron.errors import ConfigError
from internvl_megatron.inference.generate import Generator
from internvl_megatron.inference.prompt import Prompt
from internvl_megatron.inference.settings import GREEDY, Generation

MOST_ANSWERS = 1 << 20


def draw_answers(
    generator: Generator, prompts: Sequence[Prompt], num_answers: int, settings: Generation
) -> list[list[str]]:
    """`num_answers` answers to every prompt, the most likely one first; collective over all ranks.

    The n-th answer to a prompt does not depend on how many there are: fewer are the first of these.

    Args:
        generator: around the model that answers.
        prompts: with their numbers as seeds, in place of their own.
        num_answers: at least 1.
        settings: how; its sampling is that of the drawn ones.

    Raises:
        ConfigError: the number of answers is out of its range, or nothing would be drawn.
        DataError: an image cannot be read.
    """
    if not 1 <= num_answers <= MOST_ANSWERS:
        raise ConfigError(f"num_answers: must be 1 to {MOST_ANSWERS}, not {num_answers}")
    if num_answers > 1 and settings.sampling.is_greedy:
        raise ConfigError("temperature: with 0 all answers are the same; set it above 0 to draw some")
    first = generator.generate(
        prompts, replace(settings, sampling=replace(GREEDY, repetition_penalty=settings.sampling.repetition_penalty))
    )
    drawn = generator.generate(
        [
            replace(prompt, seed=number * MOST_ANSWERS + nth)
            for number, prompt in enumerate(prompts)
            for nth in range(1, num_answers)
        ],
        settings,
    )
    others = iter(answer.text for answer in drawn)
    return [[answer.text, *(next(others) for _ in range(1, num_answers))] for answer in first]
