"""Command line: `internvl-megatron` = `python -m internvl_megatron`."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from internvl_megatron.checkpoint.weights import check_start
from internvl_megatron.cluster.commands import add_parsers as add_cluster_parsers
from internvl_megatron.config.plan import plan
from internvl_megatron.config.recipes import RECIPES, named_config, summary
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.device import choose_hardware_queues
from internvl_megatron.errors import TrainingError, UserError
from internvl_megatron.faults.stop_signals import EXIT_INTERRUPTED, EXIT_STALLED, EXIT_TRAINING_ERROR, exit_code
from internvl_megatron.inference_commands import add_commands
from internvl_megatron.ranks import RankInfo
from internvl_megatron.serving.commands import add_parsers as add_serving_parsers
from internvl_megatron.watching.metrics import RunSummary

TRAIN_RANK = "internvl_megatron.trainer:train_rank"
EXIT_USER_ERROR = 2
EXIT_FAILED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Exit code: 0; 1, a rank failed; 2, the user can mend it; 3, training met what it may not go on after; 75, the system stopped a run, which has saved: start it again; 124, the run got
        nowhere, and its watchdog has ended it; 130, interrupted with Ctrl-C; 128 and a signal's number, ended at once by a second signal, or before there was anything to save.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(options, "overrides") or any(argument.startswith("-") for argument in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse takes overrides from one place only: before the options, or after them
        options.overrides += rest
    from internvl_megatron.launcher import InterruptedRunError, RankFailedError

    try:
        return options.run(options)
    except UserError as error:
        print(f"internvl-megatron: {error}", file=sys.stderr)
        return _code_of(error)
    except RankFailedError as error:
        first = error.failures[0]
        print(f"internvl-megatron: {first.text if first.is_user_error else error}", file=sys.stderr)
        if first.is_stall:
            return EXIT_STALLED
        if first.is_training_error:
            return EXIT_TRAINING_ERROR
        return EXIT_USER_ERROR if first.is_user_error else EXIT_FAILED
    except InterruptedRunError as error:
        print(f"internvl-megatron: {error}", file=sys.stderr)
        return exit_code(error.signal_number) if error.in_order else 128 + error.signal_number
    except KeyboardInterrupt:
        print("internvl-megatron: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="internvl-megatron", description="Train InternVL3 with 3D parallelism.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    recipes = commands.add_parser("recipes", help="list the recipes, or show one with the source of every value")
    recipes.add_argument(
        "--show", metavar="NAME", help="every setting of this recipe, where it comes from, layout and memory"
    )
    recipes.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="with --show: settings to change of it"
    )
    recipes.add_argument("--ranks", type=int, help="with --show: for so many GPUs (default: the fewest)")
    recipes.set_defaults(run=_recipes)

    train = commands.add_parser("train", help="train a recipe; run it again to continue")
    train.add_argument("recipe", help="name of a recipe, or a run's config.json")
    train.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings to change")
    train.add_argument(
        "--nproc", type=int, help="local ranks to start (default: 1; under torchrun or srun the ranks they started)"
    )
    train.set_defaults(run=_train)

    add_commands(commands)

    add_serving_parsers(commands)

    add_cluster_parsers(commands)

    doctor = commands.add_parser("doctor", help="versions, device, and what optional parts are active")
    doctor.set_defaults(run=_doctor)
    return parser


def _recipes(options: argparse.Namespace) -> int:
    if options.show is None:
        if options.overrides or options.ranks is not None:
            raise UserError("recipes: --ranks and settings are of a recipe; name it (--show NAME)")
        for name in RECIPES:
            print(f"{name:24s} {summary(name)}")
        return 0
    from internvl_megatron.recipe_report import report

    if options.ranks is not None and options.ranks < 1:
        raise UserError(f"--ranks {options.ranks}: at least one")
    print(report(options.show, options.ranks, options.overrides))
    return 0


def _train(options: argparse.Namespace) -> int:
    from internvl_megatron.launcher import launch
    from internvl_megatron.ranks import rank_from_environment

    info = rank_from_environment()
    num_ranks = info.world_size if info is not None else 1 if options.nproc is None else options.nproc
    config = named_config(options.recipe, num_ranks, options.overrides)
    check_start(config)
    choose_hardware_queues(config)
    if info is not None:
        if options.nproc is not None:
            raise UserError("--nproc starts ranks itself; under torchrun or srun leave it out")
        plan(config, info.world_size)
        from internvl_megatron.trainer import train_rank

        summary = _joined(train_rank, info, config)
        if info.rank != 0:
            return 0  # under srun one exit code is enough, and the others must not end the step before it
    else:
        if num_ranks < 1:
            raise UserError(f"--nproc {num_ranks}: start at least one rank")
        plan(config, num_ranks)  # a wrong layout is said at once, not by every rank
        summary = launch(TRAIN_RANK, num_ranks, config, device=config.device)[0]
    loss = "" if summary.loss is None else f", loss {summary.loss:.4f}"
    held_out = "" if summary.eval_loss is None else f", held-out loss {summary.eval_loss:.4f}"
    print(f"{config.name}: step {summary.step} of {config.num_steps}{loss}{held_out}; see {config.folder}")
    return 0 if summary.stop_signal is None else exit_code(summary.stop_signal)


def _joined(train_rank: Callable[..., RunSummary], info: RankInfo, config: RunConfig) -> RunSummary:
    """Run as one rank of a world somebody else made; a failure ends this process at once.

    Its process groups must not be taken down in order: that would wait for ranks that are gone.
    """
    try:
        return train_rank(info, config)
    except BaseException as error:
        is_user_error = isinstance(error, UserError)
        text = f"{error}\n" if is_user_error else traceback.format_exc()
        sys.stderr.write(f"internvl-megatron: rank {info.rank}: {text}")
        sys.stderr.flush()
        os._exit(_code_of(error))


def _code_of(error: BaseException) -> int:
    if isinstance(error, TrainingError):
        return EXIT_TRAINING_ERROR
    return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILED


def _doctor(_options: argparse.Namespace) -> int:
    from internvl_megatron.doctor import report

    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
