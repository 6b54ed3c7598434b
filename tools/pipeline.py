"""All stages on real pictures, on a CPU: pre-training, fine-tuning, MPO, and a process reward model, each held against held-out questions.

    python -m tools.pipeline [FOLDER] [--nproc N]          (make pipeline)

A 1.8M-parameter InternVL3 learns to read handwritten digits (`tools.demo`'s pre-training), then numbers of two of them backwards,
step by step. Its own answers to new pictures become preference pairs (`tools.build_preferences`) and step labels
(`tools.build_prm_data`); MPO trains on the first, a judge on the second. FOLDER (runs/pipeline) gets a run of each stage and
`report.json`. Interrupted, the same command goes on.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from internvl_megatron.data.files import write_whole
from internvl_megatron.errors import UserError
from internvl_megatron.evaluate.final_answer import is_match
from internvl_megatron.launcher import launch
from internvl_megatron.ranks import RankInfo
from tools import build_preferences, build_prm_data
from tools.machine_record import machine_record
from tools.prepare_demo import Amounts
from tools.prepare_reversals import ReversalAmounts, prepare_reversals
from tools.rollouts import Asking, Job, Part, Question, ask, read_questions
from tools.stages import Stages, expect_done, run_study

SCORE_RANK = "internvl_megatron.score_reference:score_rank"
JUDGE_RANK = "tools.pipeline:judge_rank"

INSTRUCTION = "Reply + or -."
"""Of the judge: the demo's tokenizer spells long texts byte by byte."""

PAIR_TEMPERATURE, JUDGE_TEMPERATURE = 1.0, 1.5
"""Of answers that become pairs, and of solutions to be judged: a small model is soon sure of itself, and few of its answers to a
question would be both right and wrong."""

MAX_NEW_TOKENS = 32
MAX_SEQUENCES = 256


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How long it trains, and how much it asks."""

    pretrain_steps: int = 500
    sft_steps: int = 120
    mpo_steps: int = 80
    judge_steps: int = 400
    rollouts: int = 16
    judge_solutions: int = 4
    judge_completions: int = 8
    heldout_solutions: int = 8
    data: ReversalAmounts = ReversalAmounts()  # noqa: RUF009  # frozen
    pretraining: Amounts = Amounts(heldout_share=0.9)  # noqa: RUF009


class Pipeline:
    """The stages, each of which does what is not done yet."""

    def __init__(self, folder: Path, num_ranks: int, sizes: Sizes) -> None:
        """Stages run on so many ranks, all data parallel."""
        self.folder = folder
        self.data = folder / "data"
        self.num_ranks = num_ranks
        self.sizes = sizes
        self.stages = Stages(folder, num_ranks, "pipeline")

    def run(self) -> dict[str, Any]:
        """All of it; the report."""
        self.stages.timed("data", lambda: prepare_reversals(self.data, self.sizes.data, self.sizes.pretraining))
        self._train("pretrain", self.sizes.pretrain_steps, self.data / "demo" / "train_meta.json", None)
        self._train("sft", self.sizes.sft_steps, self.data / "sft_meta.json", "pretrain")
        for name, rollouts in (("preference", self.sizes.rollouts), ("heldout_pair", self.sizes.rollouts)):
            self.stages.timed(f"{name} pairs", lambda name=name, rollouts=rollouts: self._pairs(name, rollouts))
        self._train(
            "mpo",
            self.sizes.mpo_steps,
            self.data / "preference" / "meta.json",
            "sft",
            "loss.kind=mpo",
            "loss.weighting=token",
            "optimizer.learning_rate=5e-5",
            "optimizer.beta2=0.999",
        )
        self.stages.timed("step labels", self._label_steps)
        self._train(
            "judge", self.sizes.judge_steps, self.data / "judge" / "meta.json", "sft", "optimizer.learning_rate=1e-3"
        )
        report = {
            "what": "pre-training, fine-tuning, MPO and a process reward model of a 1.8M model, against held-out questions",
            **machine_record(),
            "sizes": asdict(self.sizes),
            "exact_match": {
                stage: self.stages.timed(f"ask {stage}", lambda s=stage: self._exact_match(s))
                for stage in ("sft", "mpo")
            },
            "preference": self.stages.timed("score pairs", self._preference),
            "judge": self.stages.timed("judge solutions", self._ranking),
            "seconds": self.stages.seconds,
        }
        write_whole(self.folder / "report.json", json.dumps(report, indent=2) + "\n")
        return report

    def _train(self, stage: str, steps: int, meta: Path, start: str | None, *overrides: str) -> None:
        self.stages.train(stage, steps, meta, self.tokenizer, start, *overrides)

    @property
    def tokenizer(self) -> Path:
        """Of all stages."""
        return self.data / "demo" / "tokenizer"

    def _asking(self, stage: str, temperature: float) -> list[str]:
        return [
            *("--weights", str(self.stages.checkpoint(stage)), "--root", str(self.data)),
            *("--temperature", str(temperature)),
            *("--max-new-tokens", str(MAX_NEW_TOKENS), "--batch", "64", "--max-sequences", str(MAX_SEQUENCES)),
            *("--nproc", str(self.num_ranks), "--device", "cpu"),
        ]

    def _pairs(self, name: str, rollouts: int) -> None:
        questions = str(self.data / f"{name}_questions.jsonl")
        arguments = [str(self.data / name), "--questions", questions, "--num-rollouts", str(rollouts)]
        expect_done(build_preferences.main([*arguments, *self._asking("sft", PAIR_TEMPERATURE)]))

    def _label_steps(self) -> None:
        instruction = self.data / "instruction.txt"
        instruction.write_text(INSTRUCTION)
        arguments = [str(self.data / "judge"), "--questions", str(self.data / "judge_questions.jsonl")]
        numbers = ["--num-solutions", self.sizes.judge_solutions, "--num-completions", self.sizes.judge_completions]
        arguments += [*map(str, numbers), "--instruction", str(instruction)]
        expect_done(build_prm_data.main([*arguments, *self._asking("sft", JUDGE_TEMPERATURE)]))

    def _answers(self, name: str, stage: str, times: int, temperature: float) -> dict[Question, list[str]]:
        """Answers of a stage's model to held-out questions."""
        questions = read_questions(self.data / f"{name}_questions.jsonl", self.data)
        jobs = [Job(question.id, question.where, (question.prompt,), times) for question in questions]
        asking = Asking(
            weights=str(self.stages.checkpoint(stage)),
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            seed=0,
            max_new_tokens=MAX_NEW_TOKENS,
            batch_jobs=256,
            max_sequences=MAX_SEQUENCES,
            num_ranks=self.num_ranks,
            device="cpu",
        )
        answers = ask(self.folder / "answers", f"{name}-{stage}", jobs, asking, Part())
        return {question: answers[question.id] for question in questions}

    def _exact_match(self, stage: str) -> float:
        """Share of held-out questions whose most likely answer comes to the known one."""
        return share(
            right(answers, question)[0] for question, answers in self._answers("heldout", stage, 1, 0.0).items()
        )

    def _preference(self) -> dict[str, float]:
        """How often the chosen answer of a held-out pair is preferred.

        `rewards`: by MPO's implicit reward, what the log-probability has gained since fine-tuning. Before MPO all rewards are 0,
        which is no order: 0.5. `likelihood_STAGE`: by the log-probability itself.
        """
        scores = {}
        for stage in ("sft", "mpo"):
            config = self.stages.config(
                "scoring", 1, self.data / "heldout_pair" / "meta.json", self.tokenizer, stage, "loss.kind=mpo"
            )
            file = self.folder / f"heldout_pairs_{stage}.jsonl"
            launch(SCORE_RANK, self.num_ranks, config, str(file), device=config.device)
            pairs = [json.loads(line) for line in file.read_text().splitlines()[1:]]
            scores[stage] = {pair["record"]: (pair["chosen"], pair["rejected"]) for pair in pairs}
        gains = [
            tuple(after - before for after, before in zip(scores["mpo"][record], scores["sft"][record], strict=True))
            for record in scores["sft"]
        ]
        return {
            "pairs": len(gains),
            "rewards": share(preferred(*gain) for gain in gains),
            **{
                f"likelihood_{stage}": share(preferred(*pair) for pair in own.values())
                for stage, own in scores.items()
            },
        }

    def _ranking(self) -> dict[str, float]:
        """How well the judge tells right solutions of held-out questions from wrong ones; see `ranking`."""
        answers = self._answers("heldout_judge", "sft", self.sizes.heldout_solutions, JUDGE_TEMPERATURE)
        texts = [(question, text) for question, own in answers.items() for text in dict.fromkeys(own)]
        judge = self.stages.checkpoint("judge")
        scores = launch(JUDGE_RANK, self.num_ranks, judge, texts, INSTRUCTION, device="cpu")[0]
        judged: dict[Question, list[tuple[float, bool]]] = {}
        for (question, text), score in zip(texts, scores, strict=True):
            judged.setdefault(question, []).append((score, right([text], question)[0]))
        return ranking(list(judged.values()))


def ranking(solutions: Sequence[Sequence[tuple[float, bool]]]) -> dict[str, float]:
    """How often right solutions have higher scores than wrong ones of the same question.

    Args:
        solutions: of each question, (score, is right).

    Returns:
        `order`: the share of pairs, a right and a wrong solution of one question, in which the right one has the higher
        score, ties counted as a half: 0.5 by chance. `best`: of questions with right and wrong solutions the share whose
        highest score is of a right one; `any`: of a solution at random. And how many `pairs` and `questions` those are.
    """
    mixed = [own for own in solutions if len({is_right for _, is_right in own}) == 2]
    order, best = [], []
    for own in mixed:
        order += [preferred(good, bad) for good, is_good in own if is_good for bad, is_right in own if not is_right]
        highest = max(score for score, _ in own)
        best.append(share(is_right for score, is_right in own if score == highest))
    chance = [share(is_right for _, is_right in own) for own in mixed]
    counts = {"questions": len(mixed), "pairs": len(order)}
    return {**counts, "order": share(order), "best": share(best), "any": share(chance)}


def judge_rank(info: RankInfo, weights: Path, texts: Sequence[tuple[Question, str]], instruction: str) -> list[float]:
    """Scores of solutions; the body of one rank."""
    from internvl_megatron.inference.critic import Solution, score_solutions
    from internvl_megatron.inference.run import open_generator

    with open_generator(info, weights, "cpu") as generator:
        return score_solutions(generator, [Solution(question.prompt, text) for question, text in texts], instruction)


def right(answers: Sequence[str], question: Question) -> list[bool]:
    """Which answers come to the known one."""
    assert question.truth is not None, f"{question.where}: all questions here have an answer"
    return [is_match(answer, question.truth) for answer in answers]


def preferred(one: float, other: float) -> float:
    """1 if the first is larger, 0 if it is smaller, and a half if they are the same."""
    return 0.5 + 0.5 * ((one > other) - (one < other))


def share(values: Iterable[float]) -> float:
    """The mean.

    Raises:
        UserError: of nothing.
    """
    listed = [float(value) for value in values]
    if not listed:
        raise UserError(
            "nothing to take a mean of: all held-out solutions are right, or all wrong; train longer, or shorter"
        )
    return sum(listed) / len(listed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it and say what came out."""
    return run_study(
        "pipeline",
        __doc__,
        lambda folder, num_ranks: Pipeline(folder, num_ranks, Sizes()).run(),
        print_results,
        arguments,
    )


def print_results(report: dict[str, Any]) -> None:
    """For people."""
    matched, pairs, judge = report["exact_match"], report["preference"], report["judge"]
    print(f"\nheld-out questions, exact match:    SFT {matched['sft']:.1%}   MPO {matched['mpo']:.1%}")
    print(f"held-out pairs in the right order:  by reward 50 % -> {pairs['rewards']:.1%}; by likelihood ", end="")
    print(f"{pairs['likelihood_sft']:.1%} -> {pairs['likelihood_mpo']:.1%}   ({pairs['pairs']} pairs)")
    print(f"judge, right before wrong:          {judge['order']:.1%} of {judge['pairs']} pairs (chance 50 %)")
    print(
        f"judge, best of the mixed questions: {judge['best']:.1%} of {judge['questions']} right (any: {judge['any']:.1%})"
    )


if __name__ == "__main__":
    sys.exit(main())
