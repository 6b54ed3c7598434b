"""Make MPO's pairs of answers from a model's own: those that reach the known answer are preferred to those that do not.

    python -m tools.build_preferences OUT --questions FILE (--weights FOLDER | --rollouts FILE) [options]

Questions are jsonl, `{[id], [image], question, [answer], [response]}` a line. OUT gets `pairs.jsonl` and the `meta.json` that
`data.meta` of an MPO run takes, and `report.json`: how many questions gave no pair, and why. `docs/mpo.md` says more.

Two rules (arXiv 2411.10442): *correctness*, where a question has an `answer`; *DropoutNTP* where it has none: the first half
of an answer (`response`, or one of the model's), gone on with by the model without the images, is the rejected one.

Killed, the same command goes on where it stopped. Several processes share the work: `--part 0/8` ... `--part 7/8`.
"""

import argparse
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from internvl_megatron.data.files import write_whole
from internvl_megatron.errors import DataError, UserError
from internvl_megatron.evaluate.final_answer import is_match
from internvl_megatron.inference.prompt import Prompt
from internvl_megatron.launcher import InterruptedRunError, RankFailedError
from tools.asking_options import add_arguments, asking_of, check_counts, failed, print_report, write_dataset
from tools.rollouts import Job, Part, Question, ask, collect, read_answers, read_questions

Pair = dict[str, Any]

NAME = "preferences"
"""Of the data set in the meta file."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask, pair, report; 2 if the user can mend what went wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add_arguments(parser)
    parser.add_argument("--rollouts", type=Path, help="answers made already, `{id, answers: [...]}` a line")
    parser.add_argument("--num-rollouts", type=int, default=32, help="answers a question (default: 32)")
    parser.add_argument("--max-pairs", type=int, default=15, help="pairs a question (default: 15)")
    parser.set_defaults(temperature=0.7, top_k=50)
    options = parser.parse_args(arguments)
    try:
        check_counts(options, "num_rollouts", "max_pairs")
        report = build(options)
    except (UserError, RankFailedError, OSError) as error:
        return failed("build_preferences", error)
    except (InterruptedRunError, KeyboardInterrupt):
        print("build_preferences: interrupted; the same command goes on", file=sys.stderr)
        return 130
    if report is None:
        print("this part is done; the pairs are made by the part that ends last")
    else:
        print_report(report)
    return 0


def build(options: argparse.Namespace) -> dict[str, Any] | None:
    """Make the pairs; None if other parts have not asked all of theirs."""
    root = options.root or options.questions.parent
    part = Part.parse(options.part)
    questions = read_questions(options.questions, root)
    asking = None if options.weights is None and options.rollouts is not None else asking_of(options)
    given = None if options.rollouts is None else read_answers(options.rollouts)
    if asking is not None:
        own = part.of(questions)
        answers = ask(options.out, "rollouts", rollout_jobs(own, options), asking, part) if given is None else given
        ask(options.out, "without-image", blind_jobs(own, answers), asking, part)
    if given is None:
        given = collect(options.out, "rollouts", rollout_jobs(questions, options), part.count)
    if given is None:
        return None
    blind: dict[str, str] = {}
    if asking is not None:
        jobs = blind_jobs(questions, given)
        endings = collect(options.out, "without-image", jobs, part.count)
        if endings is None:
            return None
        blind = {job.id: job.prompts[0].answer_start + endings[job.id][0] for job in jobs}
    pairs, report = pair_all(questions, given, blind, options.max_pairs, options.seed)
    write_pairs(options.out, pairs, root)
    write_whole(options.out / "report.json", json.dumps(report, indent=2) + "\n")
    return report


def rollout_jobs(questions: Sequence[Question], options: argparse.Namespace) -> list[Job]:
    """Where nothing can be checked one answer is enough, and none where the record has its own."""
    return [
        Job(question.id, question.where, (question.prompt,), options.num_rollouts if question.truth else 1)
        for question in questions
        if question.truth or not question.response
    ]


def blind_jobs(questions: Sequence[Question], rollouts: Mapping[str, Sequence[str]]) -> list[Job]:
    """Going on from the first half of an answer without the images, where nothing can be checked."""
    return [
        Job(
            question.id,
            question.where,
            (Prompt(question.text_without_images, answer_start=first_half(answer)),),
            1,
        )
        for question in questions
        if question.paths and (answer := unchecked_answer(question, rollouts))
    ]


def pair_all(
    questions: Sequence[Question],
    rollouts: Mapping[str, Sequence[str]],
    blind: Mapping[str, str],
    most: int,
    seed: int,
) -> tuple[list[Pair], dict[str, Any]]:
    """All pairs, and what became of every question.

    Args:
        questions: all.
        rollouts: answers by the question's id.
        blind: answers whose second half was written without the images, by id.
        most: pairs a question.
        seed: of the choice among more.
    """
    pairs: list[Pair] = []
    without = Counter[str]()
    sources = Counter[str]()
    num_right = num_answers = 0
    for question in questions:
        answers = [answer for answer in rollouts.get(question.id, ()) if answer.strip()]
        if question.truth:
            right = [is_match(answer, question.truth) for answer in answers]
            num_right, num_answers = num_right + sum(right), num_answers + len(right)
            found, why = pairs_by_correctness(answers, right, most, random.Random(f"{seed} {question.id}"))
            source = "correctness"
        else:
            found, why = pair_by_dropout(unchecked_answer(question, rollouts), blind.get(question.id), question)
            source = "dropout_ntp"
        sources[source] += len(found)
        if not found:
            without[why] += 1
        pairs += [
            {
                "id": f"{question.id}-{number}",
                **({} if question.image is None else {"image": question.image}),
                "question": question.text,
                "chosen": chosen,
                "rejected": rejected,
                "source": source,
            }
            for number, (chosen, rejected) in enumerate(found)
        ]
    report = {
        "questions": len(questions),
        "pairs": len(pairs),
        "pairs_by_rule": dict(sources),
        "right_answers": num_right / num_answers if num_answers else None,
        "questions_without_pair": dict(without.most_common()),
    }
    return pairs, report


def pairs_by_correctness(
    answers: Sequence[str], right: Sequence[bool], most: int, rng: random.Random
) -> tuple[list[tuple[str, str]], str]:
    """Pairs of a right answer and a wrong one, and why there are none. No text is there twice on its side."""
    chosen = list(dict.fromkeys(answer for answer, is_right in zip(answers, right, strict=True) if is_right))
    rejected = list(dict.fromkeys(answer for answer, is_right in zip(answers, right, strict=True) if not is_right))
    if not answers:
        return [], "no answer"
    if not chosen or not rejected:
        return [], "all answers wrong" if not chosen else "all answers right"
    everything = list(product(chosen, rejected))
    return rng.sample(everything, min(most, len(everything))), ""


def unchecked_answer(question: Question, rollouts: Mapping[str, Sequence[str]]) -> str | None:
    """The answer that is taken for good where none is known."""
    if question.truth:
        return None
    if question.response:
        return question.response
    return next((answer for answer in rollouts.get(question.id, ()) if answer.strip()), None)


def first_half(answer: str) -> str:
    """The first half of an answer's words; of its characters, if it is one word."""
    ends = [match.end() for match in re.finditer(r"\S+", answer)]
    return answer[: ends[len(ends) // 2 - 1]] if len(ends) > 1 else answer[: len(answer) // 2]


def pair_by_dropout(answer: str | None, blind: str | None, question: Question) -> tuple[list[tuple[str, str]], str]:
    """The pair of an answer and the one whose second half was written without images, and why there is none."""
    if answer is None:
        return [], "no known answer, and none to go on from"
    if not question.paths:
        return [], "no known answer, and no image to leave out"
    if blind is None:
        return [], "no known answer, and no model to go on without the image (--weights)"
    if blind.strip() == answer.strip():
        return [], "gone on with alike without the image"
    return [(answer, blind)], ""


def write_pairs(out: Path, pairs: Sequence[Pair], root: Path) -> None:
    """The pairs and the meta file.

    Raises:
        DataError: there are none.
    """
    if not pairs:
        raise DataError(
            f"{out}: no question gives a pair: where all answers are right or all wrong, raise --temperature"
        )
    write_dataset(out, NAME, "pairs.jsonl", pairs, root)


if __name__ == "__main__":
    sys.exit(main())
