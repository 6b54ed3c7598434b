"""Answer a questions file with a trained run; the body of one rank."""

from pathlib import Path

from internvl_megatron.device import DeviceName
from internvl_megatron.evaluate.questions import TaskScore, evaluate_questions
from internvl_megatron.inference.run import open_generator
from internvl_megatron.ranks import RankInfo

MAX_NEW_TOKENS = 16


def answer_questions(
    info: RankInfo, run_folder: Path, questions: Path, answers: Path, device: DeviceName = "auto"
) -> list[TaskScore]:
    """Answer with the run's newest checkpoint, write the answers file and score it."""
    with open_generator(info, run_folder, device) as generator:
        return evaluate_questions(questions, answers, lambda prompts: generator.answer(prompts, MAX_NEW_TOKENS))
