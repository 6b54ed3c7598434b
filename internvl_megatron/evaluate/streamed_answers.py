"""Answers to questions whose pictures become files when they are asked, and are files no longer than that."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from internvl_megatron.inference.generate import Generator
from internvl_megatron.inference.prompt import Answer, Prompt
from internvl_megatron.inference.settings import Generation


def streamed_answers(
    generator: Generator, count: int, prompt_of: Callable[[int, Path], Prompt], generation: Generation
) -> Iterator[tuple[int, Answer]]:
    """Answer a replica's own questions; collective over its ranks.

    Args:
        generator: around the model.
        count: of questions.
        prompt_of: makes the prompt of the n-th question, its pictures in a folder of its own that is there until the answer is.
        generation: how.

    Yields:
        The number of a question, and its answer, as they come.
    """
    with tempfile.TemporaryDirectory(prefix="internvl-evaluation-") as root:

        def prompts() -> Iterator[Prompt]:
            for number in range(count):
                folder = Path(root) / str(number)
                folder.mkdir()
                yield prompt_of(number, folder)

        for number, answer in generator.stream(prompts(), generation):
            shutil.rmtree(Path(root) / str(number))
            yield number, answer
