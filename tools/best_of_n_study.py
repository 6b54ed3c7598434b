"""What Best-of-N is worth: a process reward model trained on a CPU chooses among the answers of a model that has seen little.

    python -m tools.best_of_n_study [FOLDER] [--nproc N]          (make best-of-n)

One model of 1.8M parameters reads three handwritten digits, and has seen 15 in 100 of the digits there are. A judge of the same
size has seen 80, and learns to say of every step of a solution whether it agrees with the picture (`tools.prepare_readings`).
`best-of-n` then asks both about digits that neither has seen. FOLDER (runs/best_of_n) gets a run of each stage, the report of
`best-of-n` and `report.json`. Interrupted, the same command goes on.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from internvl_megatron.__main__ import main as command_line
from internvl_megatron.data.files import write_whole
from tools.machine_record import machine_record
from tools.prepare_demo import Amounts
from tools.prepare_readings import INSTRUCTION, ReadingAmounts, prepare_readings
from tools.stages import Stages, expect_done, run_study

SHORT_STEPS = ("rows_per_step=2", "data.tokens_per_row=256", "data.tiles_per_row=24")
"""A seventh of the demo's step: what a judge has to learn takes many updates, not much data."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How long it trains, and how much it asks."""

    pretrain_steps: int = 500
    policy_steps: int = 500
    digits_steps: int = 1000
    places_steps: int = 3000
    solutions_steps: int = 1200
    verdicts_steps: int = 500
    answers: int = 8
    temperature: float = 1.0
    top_p: float = 0.95
    data: ReadingAmounts = ReadingAmounts()  # noqa: RUF009  # frozen
    pretraining: Amounts = Amounts()  # noqa: RUF009


class BestOfNStudy:
    """The stages, each of which does what is not done yet."""

    def __init__(self, folder: Path, num_ranks: int, sizes: Sizes) -> None:
        """Stages run on so many ranks, all data parallel."""
        self.folder = folder
        self.data = folder / "data"
        self.sizes = sizes
        self.stages = Stages(folder, num_ranks, "best_of_n")

    def run(self) -> dict[str, Any]:
        """All of it; the report."""
        sizes = self.sizes
        self.stages.timed("data", lambda: prepare_readings(self.data, sizes.data, sizes.pretraining))
        for who in ("policy", "judge"):
            self._train(f"{who}_pretrain", who, sizes.pretrain_steps, self.data / who / "train_meta.json", None)
        self._train_short("policy", "policy", sizes.policy_steps, "sft", "policy_pretrain", 7e-4)
        start = "judge_pretrain"
        for stage, steps, rate in (
            ("digits", sizes.digits_steps, 1e-3),
            ("places", sizes.places_steps, 1e-3),
            # At 1e-3 these forget what the lessons have taught.
            ("solutions", sizes.solutions_steps, 7e-4),
            ("verdicts", sizes.verdicts_steps, 5e-4),
        ):
            self._train_short(stage, "judge", steps, stage, start, rate)
            start = stage
        self.stages.timed("best of N", self._ask)
        curve = json.loads((self.folder / "answers" / "scaling.json").read_text(encoding="utf-8"))
        report = {
            "what": "Best-of-N by a process reward model, both of 1.8M parameters, on held-out handwritten digits",
            **machine_record(),
            "sizes": asdict(sizes),
            "questions": sizes.data.num_heldout,
            "curve": curve,
            "seconds": self.stages.seconds,
        }
        write_whole(self.folder / "report.json", json.dumps(report, indent=2) + "\n")
        return report

    def _train(self, stage: str, who: str, steps: int, meta: Path, start: str | None, *overrides: str) -> None:
        self.stages.train(stage, steps, meta, self.data / who / "tokenizer", start, *overrides)

    def _train_short(self, stage: str, who: str, steps: int, data: str, start: str, rate: float) -> None:
        rate_is = f"optimizer.learning_rate={rate}"
        self._train(stage, who, steps, self.data / f"{data}_meta.json", start, rate_is, *SHORT_STEPS)

    def _ask(self) -> None:
        """The command a user would give."""
        sizes = self.sizes
        instruction = self.data / "instruction.txt"
        instruction.write_text(INSTRUCTION, encoding="utf-8")
        models = [self.folder / "policy", self.folder / "verdicts", "--instruction", instruction]
        files = ["--questions", self.data / "heldout_questions.jsonl", "--output", self.folder / "answers"]
        drawn = ["--num-answers", sizes.answers, "--temperature", sizes.temperature, "--top-p", sizes.top_p]
        ranks = ["--nproc", self.stages.num_ranks, "--device", "cpu", "--max-sequences", 256]
        options = [*models, *files, *drawn, *ranks, "--max-new-tokens", 40]
        expect_done(command_line(["best-of-n", *map(str, options)]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it and say what came out."""
    return run_study(
        "best_of_n_study",
        __doc__,
        lambda folder, num_ranks: BestOfNStudy(folder, num_ranks, Sizes()).run(),
        print_results,
        arguments,
    )


def print_results(report: dict[str, Any]) -> None:
    """For people."""
    first, *_, last = report["curve"]
    print(
        f"\n{report['questions']} held-out questions: most likely answer {first['critic']:.1%}, best of "
        f"{last['num_answers']} by the judge {last['critic']:.1%} (one of them is right: {last['any_right']:.1%})"
    )


if __name__ == "__main__":
    sys.exit(main())
