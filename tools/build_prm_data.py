"""Make training data of a process reward model: which steps of a solution can still come to the right answer.

    python -m tools.build_prm_data OUT --questions FILE --weights FOLDER [--solutions FILE] [options]

Questions are jsonl, `{[id], [image], question, answer}` a line. A solution is cut into steps (its paragraphs), the model writes
several endings from behind each step, and a step is labelled + if one of them comes to the known answer, otherwise -
(VisualPRM, arXiv 2503.10291). The last step is behind the whole answer: its label is whether that is right.

OUT gets `judged.jsonl`, conversations of a step a turn that any fine-tuning trains on, and the `meta.json` for `data.meta`;
`instruction.txt`, their system turn, which scoring needs; `report.json`. `docs/prm.md` says more.

Killed, the same command goes on where it stopped. Several processes share the work: `--part 0/8` ... `--part 7/8`.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from internvl_megatron.data.conversation import IMAGE_PLACEHOLDER
from internvl_megatron.data.files import write_whole
from internvl_megatron.errors import ConfigError, DataError, UserError
from internvl_megatron.evaluate.final_answer import is_match
from internvl_megatron.inference.steps import BAD, GOOD, JUDGE_INSTRUCTION, judged_turns, split_steps
from internvl_megatron.launcher import InterruptedRunError, RankFailedError
from tools.asking_options import add_arguments, asking_of, check_counts, failed, print_report, write_dataset
from tools.rollouts import Job, Part, Question, ask, collect, read_answers, read_questions

NAME = "judged_steps"
"""Of the data set in the meta file."""


@dataclass(frozen=True, slots=True)
class Solution:
    """A solution of a question, cut into steps."""

    id: str
    question: Question
    steps: list[str]

    @property
    def is_right(self) -> bool:
        """Whether it comes to the known answer."""
        assert self.question.truth is not None, f"{self.question.where}: only questions with an answer have solutions"
        return is_match("\n\n".join(self.steps), self.question.truth)

    def starts(self) -> list[str]:
        """What the model goes on from, behind every step but the last."""
        return ["\n\n".join(self.steps[:count]) + "\n\n" for count in range(1, len(self.steps))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask, label, report; 2 if the user can mend what went wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add_arguments(parser)
    parser.add_argument("--solutions", type=Path, help="solutions made already, `{id, answers: [...]}` a line")
    parser.add_argument("--num-solutions", type=int, default=4, help="solutions a question (default: 4)")
    parser.add_argument("--max-steps", type=int, default=12, help="steps of a solution (default: 12)")
    parser.add_argument("--num-completions", type=int, default=16, help="endings written behind a step (default: 16)")
    parser.add_argument("--instruction", type=Path, help="text file of the system turn (default: a text of our own)")
    parser.set_defaults(temperature=1.0, top_k=0)
    options = parser.parse_args(arguments)
    try:
        check_counts(options, "num_solutions", "max_steps", "num_completions")
        report = build(options)
    except (UserError, RankFailedError, OSError) as error:
        return failed("build_prm_data", error)
    except (InterruptedRunError, KeyboardInterrupt):
        print("build_prm_data: interrupted; the same command goes on", file=sys.stderr)
        return 130
    if report is None:
        print("this part is done; the data are made by the part that ends last")
    else:
        print_report(report)
    return 0


def build(options: argparse.Namespace) -> dict[str, Any] | None:
    """Make the data; None if other parts have not asked all of theirs."""
    root = options.root or options.questions.parent
    part, asking = Part.parse(options.part), asking_of(options)
    instruction = read_instruction(options.instruction)
    questions = read_questions(options.questions, root)
    checkable = [question for question in questions if question.truth]
    own = part.of(checkable)
    given = None if options.solutions is None else read_answers(options.solutions)
    answers = ask(options.out, "solutions", solution_jobs(own, options), asking, part) if given is None else given
    jobs = completion_jobs(cut_solutions(own, answers, options.max_steps), options)
    ask(options.out, "completions", jobs, asking, part)
    if given is None:
        given = collect(options.out, "solutions", solution_jobs(checkable, options), part.count)
    if given is None:
        return None
    solutions = cut_solutions(checkable, given, options.max_steps)
    endings = collect(options.out, "completions", completion_jobs(solutions, options), part.count)
    if endings is None:
        return None
    shares = {solution.id: right_shares(solution, endings.get(solution.id, [])) for solution in solutions}
    records = [judged_record(solution, shares[solution.id], instruction) for solution in solutions]
    if not records:
        raise DataError(f"{options.questions}: no question has both an answer and a solution; nothing can be labelled")
    write_dataset(options.out, NAME, "judged.jsonl", records, root)
    write_whole(options.out / "instruction.txt", instruction)
    report = count(questions, solutions, shares)
    write_whole(options.out / "report.json", json.dumps(report, indent=2) + "\n")
    return report


def solution_jobs(questions: Sequence[Question], options: argparse.Namespace) -> list[Job]:
    """Solving every question some times."""
    return [Job(question.id, question.where, (question.prompt,), options.num_solutions) for question in questions]


def completion_jobs(solutions: Sequence[Solution], options: argparse.Namespace) -> list[Job]:
    """Going on from behind every step but the last."""
    return [
        Job(
            solution.id,
            solution.question.where,
            tuple(replace(solution.question.prompt, answer_start=start) for start in solution.starts()),
            options.num_completions,
        )
        for solution in solutions
        if len(solution.steps) > 1
    ]


def read_instruction(path: Path | None) -> str:
    """The judge's system turn.

    Raises:
        ConfigError: the file cannot be read, or is empty.
    """
    if path is None:
        return JUDGE_INSTRUCTION
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--instruction {path}: cannot be read as a text ({error})") from error
    if not text:
        raise ConfigError(f"--instruction {path}: is empty")
    return text


def cut_solutions(
    questions: Sequence[Question], answers: Mapping[str, Sequence[str]], most_steps: int
) -> list[Solution]:
    """Solutions of all questions, none twice."""
    return [
        Solution(f"{question.id}#{number}", question, steps)
        for question in questions
        for number, text in enumerate(dict.fromkeys(answers.get(question.id, ())))
        if (steps := split_steps(text, most_steps))
    ]


def right_shares(solution: Solution, endings: Sequence[str]) -> list[float]:
    """For every step the share of endings from behind it that come to the known answer.

    Args:
        solution: of n steps.
        endings: as many for each of the first n - 1.
    """
    starts = solution.starts()
    times = len(endings) // max(1, len(starts))
    assert len(endings) == times * len(starts), f"{solution.id}: {len(endings)} endings behind {len(starts)} steps"
    truth = solution.question.truth or ""
    shares = []
    for number, start in enumerate(starts):
        own = endings[number * times : (number + 1) * times]
        shares.append(sum(is_match(start + ending, truth) for ending in own) / times)
    return [*shares, float(solution.is_right)]


def judged_record(solution: Solution, shares: Sequence[float], instruction: str) -> dict[str, Any]:
    """The conversation with the judge; `right_shares` is for people, training does not read it."""
    question = solution.question
    turns = judged_turns(question.text, solution.steps)
    if len(question.paths) > 1 and IMAGE_PLACEHOLDER not in question.text:
        lines = [f"Image-{number}: <image>\n" for number in range(1, len(question.paths) + 1)]
        turns[0] = "".join(lines) + turns[0]  # as inference would
    said = [{"from": "system", "value": instruction}]
    for turn, share in zip(turns, shares, strict=True):
        said += [{"from": "human", "value": turn}, {"from": "gpt", "value": GOOD if share > 0 else BAD}]
    image = {} if question.image is None else {"image": question.image}
    return {"id": solution.id, **image, "conversations": said, "right_shares": list(shares)}


def count(
    questions: Sequence[Question], solutions: Sequence[Solution], shares: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """What became of everything."""
    labels = Counter("good" if share > 0 else "bad" for own in shares.values() for share in own)
    return {
        "questions": len(questions),
        "questions_without_answer": sum(not question.truth for question in questions),
        "solutions": len(solutions),
        "right_solutions": sum(own[-1] > 0 for own in shares.values()) / len(shares),
        "wrong_solutions_with_a_bad_step_before_the_last": sum(
            not own[-1] and not all(own[:-1]) for own in shares.values()
        ),
        "steps": dict(sorted(labels.items())),
        "solutions_by_steps": {
            str(length): number for length, number in sorted(Counter(len(own) for own in shares.values()).items())
        },
    }


if __name__ == "__main__":
    sys.exit(main())
