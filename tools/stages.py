"""Stages of a study on the demo's small model: runs in one folder, each of which starts from the weights of another.

What is done is not done again: interrupted, the same command goes on where it stopped.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from internvl_megatron.checkpoint import folders
from internvl_megatron.config.overrides import apply_overrides
from internvl_megatron.config.recipes import demo_digits
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.errors import UserError
from internvl_megatron.launcher import InterruptedRunError, RankFailedError, launch
from tools.asking_options import failed

TRAIN_RANK = "internvl_megatron.trainer:train_rank"


class Stages:
    """A folder of runs of the demo's model, all data parallel on so many CPU ranks."""

    def __init__(self, folder: Path, num_ranks: int, name: str) -> None:
        """Runs are called `NAME_STAGE` and lie in `folder/STAGE`."""
        self.folder = folder
        self.num_ranks = num_ranks
        self.name = name
        self.seconds: dict[str, float] = {}
        """Of every piece of work that has been done by this object."""

    def timed[T](self, name: str, work: Callable[[], T]) -> T:
        """Do something, and say how long it took."""
        start = time.perf_counter()
        result = work()
        self.seconds[name] = round(time.perf_counter() - start, 1)
        print(f"{name}: {self.seconds[name]} s", flush=True)
        return result

    def config(
        self, stage: str, steps: int, meta: Path, tokenizer: Path, start: str | None, *overrides: str
    ) -> RunConfig:
        """The configuration of a stage.

        Args:
            stage: its name.
            steps: to train.
            meta: file that lists its data sets.
            tokenizer: folder of the tokenizer.
            start: the stage whose weights it starts from; None = random ones.
            overrides: `field=value`, over everything else.
        """
        settings = [
            f"name={self.name}_{stage}",
            f"folder={self.folder / stage}",
            f"num_steps={steps}",
            f"data.meta={meta}",
            f"data.tokenizer={tokenizer}",
            "data.eval_meta=null",
            "eval_every_steps=null",
            "checkpoint.save_every_steps=100",
            "checkpoint.keep_last=1",
            "parallel.tensor_size=1",
            "parallel.pipeline_size=1",
            "log_every_steps=20",
        ]
        if start is not None:
            settings += [f"checkpoint.load={self.checkpoint(start)}", "data.v2pe=fixed"]
        return apply_overrides(demo_digits(), [*settings, *overrides])

    def checkpoint(self, stage: str) -> Path:
        """The newest of a stage."""
        return folders.finished(self.folder / stage / folders.CHECKPOINTS)[-1]

    def train(self, stage: str, steps: int, meta: Path, tokenizer: Path, start: str | None, *overrides: str) -> None:
        """Train a stage to its end, as `config` has it, unless that was done before."""
        done = folders.finished(self.folder / stage / folders.CHECKPOINTS)
        if done and folders.read_info(done[-1]).step >= steps:
            return
        config = self.config(stage, steps, meta, tokenizer, start, *overrides)
        self.timed(stage, lambda: launch(TRAIN_RANK, self.num_ranks, config, device=config.device))


def expect_done(status: int) -> None:
    """Go on if a command that is a stage has ended well.

    Raises:
        KeyboardInterrupt: it was interrupted.
        UserError: it has failed, and said why.
    """
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise UserError("the stage failed, as said above")


def run_study(
    name: str,
    description: str | None,
    study: Callable[[Path, int], dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
    arguments: Sequence[str] | None,
) -> int:
    """The command line of a study; its exit status.

    Args:
        name: of its module.
        description: that module's text.
        study: does all of it in a folder, on so many ranks; its report.
        show: prints the report.
        arguments: of the command line; None = those of this process.
    """
    folder = Path("runs") / name.removesuffix("_study")
    parser = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=folder, help=f"of its runs (default: {folder})")
    parser.add_argument("--nproc", type=int, default=2, help="ranks, each with the whole model (default: 2)")
    options = parser.parse_args(arguments)
    try:
        report = study(options.folder, options.nproc)
    except (UserError, RankFailedError, OSError) as error:
        return failed(name, error)
    except (InterruptedRunError, KeyboardInterrupt):
        print(f"{name}: interrupted; run it again to continue", file=sys.stderr)
        return 130
    show(report)
    return 0
