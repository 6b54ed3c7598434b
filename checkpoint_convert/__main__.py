"""Command line of the converters: `python -m checkpoint_convert COMMAND`.

hf-to-megatron SRC DST                            a released checkpoint, either layout
hf-to-megatron --vision VIT --language LLM DST    a bare pair, to pre-train from
megatron-to-hf CKPT DST --layout L                weights or a run's checkpoint, to Hugging Face
check A B [--image I --prompt P]                  the same model? tensor by tensor, and logits
inspect PATH                                      what is it, and is it whole?
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from internvl_megatron.errors import UserError

if TYPE_CHECKING:
    from checkpoint_convert.conversion import Written

EXIT_DIFFERENT = 1
EXIT_USER_ERROR = 2
EXIT_FAILED = 3
EXIT_INTERRUPTED = 130
BYTES_PER_GB = 10**9
LARGEST_FILE_GB = 10**6
DEFAULT_SEED = 42
MOST_LINES = 20

DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 (`check` found differences), 2 (the user can mend it), 3 or 130."""
    from internvl_megatron.launcher import RankFailedError

    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except UserError as error:
        print(f"checkpoint_convert: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except RankFailedError as error:  # the rank that computes logits
        first = error.failures[0]
        print(f"checkpoint_convert: {first.text.strip() if first.is_user_error else error}", file=sys.stderr)
        return EXIT_USER_ERROR if first.is_user_error else EXIT_FAILED
    except KeyboardInterrupt:
        print("checkpoint_convert: interrupted; the same command continues where it stopped", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    from checkpoint_convert.mapping import Layout

    parser = argparse.ArgumentParser(
        prog="python -m checkpoint_convert", description="Hugging Face <-> Megatron weights."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    importing = commands.add_parser(
        "hf-to-megatron",
        help="to weights that any layout can start from",
        usage="%(prog)s [--file-gb GB] SRC DST\n       %(prog)s [options] --vision VIT --language LLM DST",
    )
    importing.add_argument(
        "folders", nargs="+", type=Path, metavar="SRC DST", help="checkpoint and target; target alone with a pair"
    )
    importing.add_argument("--vision", type=Path, metavar="DIR", help="a bare InternViT, joined with --language")
    importing.add_argument("--language", type=Path, metavar="DIR", help="a bare Qwen2.5 or InternLM3 base model")
    importing.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="its tokenizer (default: in the language model's folder)"
    )
    importing.add_argument("--tile-pixels", type=int, help="side of a tile (default: the encoder's own)")
    importing.add_argument("--seed", type=int, help="of the fresh projector (default: 42)")
    _add_file_size(importing)
    importing.set_defaults(run=_hf_to_megatron)

    exporting = commands.add_parser("megatron-to-hf", help="to a Hugging Face checkpoint")
    exporting.add_argument(
        "checkpoint", type=Path, metavar="CKPT", help="converted weights, a run, or one of its checkpoints"
    )
    exporting.add_argument("target", type=Path, metavar="DST")
    exporting.add_argument("--layout", choices=get_args(Layout), required=True)
    exporting.add_argument("--dtype", choices=list(DTYPE_NAMES), help="number format (default: as it is)")
    exporting.add_argument(
        "--companions", type=Path, metavar="DIR", help="tokenizer and other files (default: what the source has)"
    )
    _add_file_size(exporting)
    exporting.set_defaults(run=_megatron_to_hf)

    check = commands.add_parser("check", help="whether two checkpoints hold the same model")
    check.add_argument("one", type=Path, metavar="A")
    check.add_argument("other", type=Path, metavar="B")
    check.add_argument("--image", action="append", default=[], help="compare logits too, with this image")
    check.add_argument("--prompt", help="compare logits too, with this question")
    check.set_defaults(run=_check)

    inspect = commands.add_parser("inspect", help="what a folder holds, and whether it is whole")
    inspect.add_argument("path", type=Path, metavar="PATH")
    inspect.set_defaults(run=_inspect)
    return parser


def _add_file_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--file-gb", type=float, default=5.0, help="largest file in GB, one parameter at least (default: 5)"
    )


def _file_bytes(options: argparse.Namespace) -> int:
    if not 0 < options.file_gb < LARGEST_FILE_GB:
        raise UserError(f"--file-gb {options.file_gb}: must be greater than 0 and less than {LARGEST_FILE_GB}")
    return int(options.file_gb * BYTES_PER_GB)


def _hf_to_megatron(options: argparse.Namespace) -> int:
    from checkpoint_convert.base_pair import open_base_pair
    from checkpoint_convert.commands import to_megatron
    from checkpoint_convert.companions import has_tokenizer
    from checkpoint_convert.sources import open_source

    *sources, target = options.folders
    target = _target(target)
    if options.vision is None and options.language is None:
        if len(sources) != 1:
            raise UserError("hf-to-megatron: give SRC and DST, or a pair (--vision VIT --language LLM) and DST")
        if options.tokenizer is not None or options.tile_pixels is not None or options.seed is not None:
            raise UserError(
                "hf-to-megatron: --tokenizer, --tile-pixels and --seed are for a pair (--vision, --language)"
            )
        source = open_source(sources[0])
        if source.companions is None or not has_tokenizer(source.companions):
            print(
                "checkpoint_convert: no tokenizer beside it: data.tokenizer and exports will need one", file=sys.stderr
            )
        _report(to_megatron(source, target, _file_bytes(options)), target)
        return 0
    if options.vision is None or options.language is None or sources:
        raise UserError("hf-to-megatron: a pair is --vision VIT --language LLM and one folder, the target")
    pair = (options.vision, options.language, options.tokenizer)
    seed = DEFAULT_SEED if options.seed is None else options.seed
    with open_base_pair(*pair, seed, options.tile_pixels) as source:
        _report(to_megatron(source, target, _file_bytes(options)), target)
    return 0


def _megatron_to_hf(options: argparse.Namespace) -> int:
    import torch

    from checkpoint_convert.commands import to_huggingface
    from checkpoint_convert.sources import open_source

    target = _target(options.target)
    if options.companions is not None and not options.companions.is_dir():
        raise UserError(f"--companions {options.companions}: no such folder")
    dtype = None if options.dtype is None else getattr(torch, DTYPE_NAMES[options.dtype])
    written = to_huggingface(
        open_source(options.checkpoint),
        target,
        options.layout,
        dtype,
        options.companions,
        _file_bytes(options),
    )
    _report(written, target)
    return 0


def _target(path: Path) -> Path:
    """The folder to make, links followed.

    Raises:
        UserError: there can be no such folder.
    """
    try:
        resolved = path.resolve()
        taken = resolved.exists()
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r}: cannot be a folder ({error})") from error
    if not resolved.name or (taken and resolved == Path.cwd()):
        raise UserError(f"{path}: give the name of a new folder")
    return resolved


def _report(written: "Written", target: Path) -> None:
    if not written.num_bytes:
        print(f"{target}: is there, made by another process or an earlier run of the same command")
        return
    rate = written.num_bytes / max(written.seconds, 1e-9)
    shared = f"{written.num_files} of {written.total_files} files, "
    print(
        f"{target}: {shared if written.num_files < written.total_files else ''}{written.num_bytes / 1e9:.2f} GB in "
        f"{written.seconds:.1f} s ({rate / 1e6:.0f} MB/s)"
    )


def _check(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from checkpoint_convert.compare import compare
    from checkpoint_convert.sources import open_source

    one, other = open_source(options.one), open_source(options.other)
    asks = bool(options.image) or options.prompt is not None
    if asks:  # what can go wrong there is found before all tensors are read
        from checkpoint_convert.logits import check_inputs

        check_inputs(one, other, options.image)
    with tqdm(unit="parameter", disable=None) as progress:
        found = compare(one, other, progress.update)
    print(f"{found.num_equal} of {found.num_parameters} parameters are equal bit for bit")
    for setting in found.settings:
        print(f"  setting {setting}")
    if found.num_rounded:
        print(f"{found.num_rounded} are the same values, rounded to another number format")
    for difference in found.differences[:MOST_LINES]:
        print(f"  {difference.name}: {difference.reason}")
    if len(found.differences) > MOST_LINES:
        print(f"  and {len(found.differences) - MOST_LINES} more")
    same_logits = _check_logits(options) if asks else True
    return 0 if found.same and same_logits else EXIT_DIFFERENT


def _check_logits(options: argparse.Namespace) -> bool:
    from checkpoint_convert.logits import compare_logits

    question = "Describe the image." if options.prompt is None else options.prompt
    found = compare_logits(options.one, options.other, question, options.image)
    print(str(found))
    return found.agree


def _inspect(options: argparse.Namespace) -> int:
    from checkpoint_convert.inspection import inspect

    print(inspect(options.path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
