"""Answer a questions file or benchmarks with a trained model; the bodies of one rank."""

from collections.abc import Sequence
from pathlib import Path

from internvl_megatron.device import DeviceName
from internvl_megatron.evaluate.benchmark_report import write_results
from internvl_megatron.evaluate.benchmark_run import read_benchmarks, run_benchmarks
from internvl_megatron.evaluate.questions import TaskScore, evaluate_questions
from internvl_megatron.evaluate.settings import EvaluationSettings
from internvl_megatron.inference.best_of_n import draw_answers
from internvl_megatron.inference.critic import Solution, score_solutions
from internvl_megatron.inference.prompt import Prompt
from internvl_megatron.inference.run import load_generator, open_generator, open_place
from internvl_megatron.inference.settings import Generation, Setup
from internvl_megatron.inference.steps import JUDGE_INSTRUCTION
from internvl_megatron.ranks import RankInfo

MAX_NEW_TOKENS = 16
BENCHMARK_TIMEOUT_SECONDS = 7 * 24 * 3600
"""Replicas wait for the slowest at the end of a benchmark alone; a rank that fails ends the others at once."""


def answer_questions(
    info: RankInfo, run_folder: Path, questions: Path, answers: Path, device: DeviceName = "auto"
) -> list[TaskScore]:
    """Answer with the run's newest checkpoint, write the answers file and score it."""
    with open_generator(info, run_folder, device) as generator:
        return evaluate_questions(questions, answers, lambda prompts: generator.answer(prompts, MAX_NEW_TOKENS))


def best_of_n_rank(
    info: RankInfo,
    models: tuple[Path, Path],
    prompts: Sequence[Prompt],
    num_answers: int,
    settings: Generation,
    device: DeviceName = "auto",
    setup: Setup | None = None,
    instruction: str = JUDGE_INSTRUCTION,
) -> list[tuple[list[str], list[float]]]:
    """Answers to every prompt and their scores, by the model that answers and the critic, loaded one after the other."""
    policy, critic = models
    with open_place(info, device, setup or Setup()) as place:
        answers = draw_answers(load_generator(policy, place), prompts, num_answers, settings)
        solutions = [Solution(prompt, text) for prompt, own in zip(prompts, answers, strict=True) for text in own]
        scores = iter(score_solutions(load_generator(critic, place), solutions, instruction))
        return [(own, [next(scores) for _ in own]) for own in answers]


def benchmark_rank(
    info: RankInfo,
    folder: Path,
    settings: EvaluationSettings,
    device: DeviceName = "auto",
    setup: Setup | None = None,
) -> str:
    """Evaluate a model (`load_generator`) on benchmarks and write the results; their table, on rank 0."""
    asked = read_benchmarks(settings)
    with open_place(info, device, setup or Setup(), BENCHMARK_TIMEOUT_SECONDS) as place:
        results = run_benchmarks(load_generator(folder, place), settings, asked, str(folder))
        return write_results(settings.output, results) if info.rank == 0 else ""
