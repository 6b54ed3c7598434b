"""List a run's checkpoints, and compare their files with the checksums taken when they were written.

    python -m tools.check_checkpoints RUN [--sizes]

Exit code: 0, all are intact; 1, some are damaged (a line each, with the files); 2, there is nothing to look at. Nothing is changed.
A run itself looks at the checkpoint it continues from (`checkpoint.verify`).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from internvl_megatron.checkpoint import folders
from internvl_megatron.checkpoint.file_sums import find_damage, read_sums
from internvl_megatron.errors import CheckpointError

EXIT_INTACT, EXIT_DAMAGED, EXIT_USER_ERROR = 0, 1, 2


def describe(folder: Path) -> str:
    """What a checkpoint is, in a line."""
    info = folders.read_info(folder)
    sums = read_sums(folder, info)
    state = "no optimizer state"
    if info.optimizer_state:
        state = f"optimizer of {info.optimizer_layout}" if info.optimizer_layout else "layout-free optimizer"
    size = (
        f"{sum(entry.num_bytes for entry in sums.values()) / 1e9:.2f} GB in {len(sums)} files"
        if sums
        else "no checksums"
    )
    return f"step {info.step}, {info.num_tokens} tokens, {size}, written as {info.layout}, {state}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Find damaged checkpoints.")
    parser.add_argument("run", type=Path, help="folder of a run, or of one checkpoint")
    parser.add_argument("--sizes", action="store_true", help="compare how long files are, not what is in them")
    options = parser.parse_args(arguments)
    found = folders.finished(options.run / folders.CHECKPOINTS)
    if (options.run / folders.MARKER).is_file():
        found = [options.run]
    if not found:
        print(
            f"check_checkpoints: {options.run}: no finished checkpoint (RUN/{folders.CHECKPOINTS}/step-NNNNNNNN)",
            file=sys.stderr,
        )
        return EXIT_USER_ERROR
    is_damaged = False
    for folder in found:
        try:
            damage = find_damage(folder, contents=not options.sizes)
            text = "; ".join(damage) or describe(folder)
        except CheckpointError as error:
            damage = [text] = [str(error)]
        is_damaged |= bool(damage)
        print(f"{'DAMAGED' if damage else 'intact '}  {folder.name}: {text}")
    return EXIT_DAMAGED if is_damaged else EXIT_INTACT


if __name__ == "__main__":
    sys.exit(main())
