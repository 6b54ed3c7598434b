"""What the tools that ask a model many times have in common: their arguments, and the files and reports they write."""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl_megatron.data.files import write_whole
from internvl_megatron.errors import ConfigError, UserError
from internvl_megatron.launcher import RankFailedError
from tools.rollouts import Asking


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What tools that ask questions many times have in common."""
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make, or to go on with")
    parser.add_argument("--questions", type=Path, required=True, help="jsonl of questions")
    parser.add_argument("--root", type=Path, help="folder of the images (default: that of the questions)")
    parser.add_argument("--weights", help="who answers: folder of a run, of a checkpoint, or of converted weights")
    parser.add_argument("--temperature", type=float, help="(default: %(default)s)")
    parser.add_argument("--top-k", type=int, help="draw from so many tokens; 0 = from all (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from so much probability (default: 1)")
    parser.add_argument("--max-new-tokens", type=int, default=4096, help="of an answer (default: 4096)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8, help="questions asked together (default: 8)")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="ask only every N-th question, from the I-th on")
    parser.add_argument("--nproc", type=int, default=1, help="local ranks (default: 1); replicas share the questions")
    parser.add_argument("--tensor-size", type=int, default=1, help="ranks a layer is divided over (default: 1)")
    parser.add_argument("--pipeline-size", type=int, default=1, help="ranks the layers are divided over (default: 1)")
    parser.add_argument("--max-sequences", type=int, default=32, help="answers under way, a replica (default: 32)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def check_counts(options: argparse.Namespace, *names: str) -> None:
    """Whether numbers, those of all tools and some more, are from 1.

    Raises:
        ConfigError: one is not.
    """
    common = ("max_new_tokens", "batch", "nproc", "tensor_size", "pipeline_size", "max_sequences")
    for name in (*names, *common):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: must be at least 1, not {getattr(options, name)}")


def failed(tool: str, error: Exception) -> int:
    """Say what went wrong; the exit status."""
    print(f"{tool}: {error}", file=sys.stderr)
    by_user = isinstance(error, UserError) or (isinstance(error, RankFailedError) and error.failures[0].is_user_error)
    return 2 if by_user else 1


def asking_of(options: argparse.Namespace) -> Asking:
    """How a model is asked.

    Raises:
        ConfigError: there is none.
    """
    if options.weights is None:
        raise ConfigError("--weights is missing: name who answers, the folder of a run or of converted weights")
    return Asking(
        weights=options.weights,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        max_new_tokens=options.max_new_tokens,
        batch_jobs=options.batch,
        num_ranks=options.nproc,
        tensor_size=options.tensor_size,
        pipeline_size=options.pipeline_size,
        max_sequences=options.max_sequences,
        device=options.device,
    )


def write_dataset(out: Path, name: str, file: str, records: Sequence[Mapping[str, Any]], root: Path) -> None:
    """A jsonl of records, and a meta file with it alone."""
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    entry = {
        "root": os.path.relpath(root, out),
        "annotation": file,
        "data_augment": False,
        "repeat_time": 1,
        "length": len(records),
    }
    write_whole(out / "meta.json", json.dumps({name: entry}, indent=2, ensure_ascii=False) + "\n")


def print_report(report: Mapping[str, Any]) -> None:
    """For people."""
    for name, value in report.items():
        shown = value if isinstance(value, dict) else {"": value}
        for key, number in shown.items():
            text = f"{number:.1%}" if isinstance(number, float) else "-" if number is None else f"{number:,}"
            print(f"{text:>10}  {name.replace('_', ' ')}{': ' if key else ''}{key}")
