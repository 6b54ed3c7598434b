"""The demo: train a small InternVL3 on real pictures with the real parallel stack, then let it answer.

    python tools/demo.py [--fresh]

Four CPU ranks (TP2 x PP2, the vision encoder data parallel over all four) train the recipe `demo_digits` in one stage on
text and pictures; then one rank loads the checkpoint and answers held-out questions. Interrupted, it continues where it
was; finished, it only answers. `--fresh` starts again.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from internvl_megatron.checkpoint import folders
from internvl_megatron.config.overrides import apply_overrides
from internvl_megatron.config.recipes import demo_digits
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.errors import UserError
from internvl_megatron.evaluate.questions import format_table
from internvl_megatron.launcher import InterruptedRunError, RankFailedError, launch
from internvl_megatron.watching.metrics import METRICS_FILE
from tools.demo_report import contact_sheet, loss_curve
from tools.prepare_demo import prepare

NUM_RANKS = 4
TRAIN_RANK = "internvl_megatron.trainer:train_rank"
ANSWER_QUESTIONS = "internvl_megatron.evaluate.run:answer_questions"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare, train (or continue), answer, draw."""
    parser = argparse.ArgumentParser(description="Train a small InternVL3 on handwritten digits and ask it.")
    parser.add_argument("--fresh", action="store_true", help="forget the last run and train again")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings to change")
    options = parser.parse_args(arguments)
    try:
        run(apply_overrides(demo_digits(), options.overrides), options.fresh)
    except (UserError, RankFailedError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except (InterruptedRunError, KeyboardInterrupt):
        print("demo: interrupted; run it again to continue", file=sys.stderr)
        return 130
    return 0


def run(config: RunConfig, fresh: bool) -> None:
    """The demo with some configuration."""
    folder, data = Path(config.folder), Path(config.data.meta).parent
    if fresh:
        shutil.rmtree(folder / folders.CHECKPOINTS, ignore_errors=True)
    prepare(data)
    checkpoints = folders.finished(folder / folders.CHECKPOINTS)
    if not checkpoints or folders.read_info(checkpoints[-1]).step < config.num_steps:
        print(
            f"training {config.name}: {NUM_RANKS} ranks, {config.num_steps} steps; Ctrl-C stops in order", flush=True
        )
        launch(TRAIN_RANK, NUM_RANKS, config, device="cpu")
    print("answering held-out questions, each asked alone, at delta 1", flush=True)
    answers = folder / "answers.jsonl"
    scores = launch(ANSWER_QUESTIONS, 1, folder, data / "heldout_questions.jsonl", answers, "cpu", device="cpu")[0]
    print(format_table(scores))
    loss_curve(folder / METRICS_FILE, folder / "loss.png")
    contact_sheet(answers, data, folder / "answers.png")
    print(f"loss curve: {folder / 'loss.png'}   pictures with answers: {folder / 'answers.png'}")


if __name__ == "__main__":
    sys.exit(main())
