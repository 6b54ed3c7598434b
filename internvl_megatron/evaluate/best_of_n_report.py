"""What more answers to a question are worth: share of right answers against their number, by how one of them is taken.

Questions are those of `questions`. Of N answers the first ones are those that fewer would have been, so that one set of
answers gives the whole curve.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from internvl_megatron.device import is_installed
from internvl_megatron.errors import ConfigError
from internvl_megatron.evaluate.final_answer import final_answer, is_match, normal_form
from internvl_megatron.evaluate.questions import Question, read_questions
from internvl_megatron.inference.choosing import best, most_frequent


@dataclass(frozen=True)
class Candidates:
    """Answers to one question."""

    question: Question
    answers: tuple[str, ...]
    """The most likely one first."""
    scores: tuple[float, ...]
    """The critic's, from 0 to 1."""


@dataclass(frozen=True)
class ScalingPoint:
    """Shares of questions that are answered right with so many answers each."""

    num_answers: int
    critic: float
    """Taking the answer with the highest score."""
    vote: float
    """Taking what most say."""
    any_right: float
    """If some answer is right: no choice can do better."""
    mean: float
    """Taking one at random."""


def scaling_curve(candidates: Sequence[Candidates]) -> list[ScalingPoint]:
    """Points at 1, 2, 4 .. answers, and at all of them. The first is the most likely answer alone."""
    most = len(candidates[0].answers)
    counts = sorted({1 << power for power in range(most.bit_length()) if 1 << power <= most} | {most})
    right = [[is_match(answer, own.question.truth) for answer in own.answers] for own in candidates]
    points = []
    for count in counts:
        chosen = [correct[best(own.scores[:count])] for own, correct in zip(candidates, right, strict=True)]
        voted = [
            correct[most_frequent(own.answers[:count], _said)] for own, correct in zip(candidates, right, strict=True)
        ]
        points.append(
            ScalingPoint(
                count,
                critic=_share(chosen),
                vote=_share(voted),
                any_right=_share([any(correct[:count]) for correct in right]),
                mean=_share([sum(correct[:count]) / count for correct in right]),
            )
        )
    return points


def format_curve(points: Sequence[ScalingPoint]) -> str:
    """A small table, one number of answers a line."""
    lines = [f"{'answers':>8}{'critic':>9}{'vote':>9}{'any':>9}{'mean':>9}"]
    lines += [
        f"{point.num_answers:>8}{point.critic:>9.1%}{point.vote:>9.1%}{point.any_right:>9.1%}{point.mean:>9.1%}"
        for point in points
    ]
    return "\n".join(lines)


def write_report(folder: str | Path, candidates: Sequence[Candidates]) -> list[ScalingPoint]:
    """Write `candidates.jsonl` (every answer with its score), `scaling.json` (the curve) and `scaling.png`; each appears whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    points = scaling_curve(candidates)
    lines = [
        {
            "id": own.question.id,
            "question": own.question.question,
            "truth": own.question.truth,
            "answers": list(own.answers),
            "scores": list(own.scores),
            "chosen": best(own.scores),
            "correct": [is_match(answer, own.question.truth) for answer in own.answers],
        }
        for own in candidates
    ]
    _write(folder / "candidates.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    _write(folder / "scaling.json", json.dumps([asdict(point) for point in points], indent=1) + "\n")
    _plot(folder / "scaling.png", points, len(candidates))
    return points


def report_best_of_n(questions: Path, output: Path, found: Sequence[tuple[list[str], list[float]]]) -> str:
    """Write the report of answers to a questions file, and say what it says."""
    asked = read_questions(questions)
    candidates = [
        Candidates(question, tuple(answers), tuple(scores))
        for question, (answers, scores) in zip(asked, found, strict=True)
    ]
    return format_curve(write_report(output, candidates))


def check_can_plot() -> None:
    """Raises `ConfigError` where there is nothing to plot with."""
    if not is_installed("matplotlib"):
        raise ConfigError("the report's plot needs matplotlib; pip install 'internvl_megatron[demo]'")


def _said(answer: str) -> str:
    return normal_form(final_answer(answer))


def _share(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _write(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _plot(path: Path, points: Sequence[ScalingPoint], num_questions: int) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    counts = [point.num_answers for point in points]
    for name, label in (
        ("any_right", "some answer is right"),
        ("critic", "best by the critic"),
        ("vote", "what most say"),
        ("mean", "one at random"),
    ):
        axes.plot(counts, [100 * getattr(point, name) for point in points], marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("answers to a question (the first: the most likely)")
    axes.set_ylabel(f"right, % of {num_questions} questions")
    axes.grid(alpha=0.3)
    axes.legend()
    beside = path.with_name(path.name + ".part")
    figure.savefig(beside, format="png", dpi=150)
    beside.replace(path)
