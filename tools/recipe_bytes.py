"""Build every recipe as ranks of the worlds it is made for, and say what these hold: parameters, gradients, optimizer state.

    python -m tools.recipe_bytes [NAME ...] [--ranks N] [--output FILE.md]

Model and optimizers are the real ones at their full size, on a fake world without memory (`fake_world.py`), as the first rank of every
pipeline stage. Rows of recipes that hold the same are written as one.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from internvl_megatron.config.plan import RunPlan, plan
from internvl_megatron.config.recipe_settings import LAYOUTS
from internvl_megatron.config.recipes import RELEASED, find_recipe
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.data.files import write_whole
from internvl_megatron.errors import UserError
from internvl_megatron.launcher import launch
from tools.fake_world import BuiltBytes, built_bytes

HEAD = ("recipes", "ranks", "layout", "stage", "parameters", "weights", "gradients", "AdamW", "together")


@dataclass(frozen=True)
class Case:
    """A recipe on a number of ranks."""

    name: str
    num_ranks: int

    @property
    def config(self) -> RunConfig:
        """Ready to be built on a CPU."""
        recipe = find_recipe(self.name, self.num_ranks)
        return replace(
            recipe,
            device="cpu",
            data=replace(recipe.data, meta="given later", tokenizer="given later"),
            checkpoint=replace(recipe.checkpoint, load="given later"),
        )

    @property
    def plan(self) -> RunPlan:
        """Raises ConfigError if the recipe does not go on so many ranks."""
        return plan(self.config, self.num_ranks)

    def first_rank(self, stage: int) -> int:
        """Of a pipeline stage."""
        return self.plan.layout.rank(0, 0, stage)

    def build(self, stage: int) -> BuiltBytes:
        """What the first rank of a stage holds."""
        return launch(built_bytes, 1, self.config, self.num_ranks, self.first_rank(stage), device="cpu")[0]


def all_cases() -> list[Case]:
    """Every recipe of a released size, on all numbers of ranks that a layout is stated for."""
    return [Case(name, num_ranks) for name, (_, size) in RELEASED.items() for num_ranks in LAYOUTS[size]]


def table(cases: Sequence[Case]) -> str:
    """As Markdown, by size, number of ranks and stage."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for case in cases:
        layout = case.plan.layout
        for stage in range(layout.pipeline_size):
            built = case.build(stage)
            sizes = (built.weights, built.gradients, built.optimizer)
            figures = (
                str(case.num_ranks),
                str(layout),
                f"{stage + 1} of {layout.pipeline_size}",
                f"{built.parameters / 1e9:.3f} B",
                *(f"{size / 1e9:.2f} GB" for size in (*sizes, sum(sizes))),
            )
            size = RELEASED[case.name][1]
            rows.setdefault((size, *figures), []).append(RELEASED[case.name][0])
            print(f"{case.name} on {case.num_ranks}: {', '.join(figures[1:])}", file=sys.stderr)
    lines = [HEAD, ("---",) * len(HEAD)]
    lines += [(f"{size} {', '.join(stages)}", *figures) for (size, *figures), stages in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build and print; exit status 0, or 2 if the user can mend what is wrong."""
    parser = argparse.ArgumentParser(description="What ranks of the recipes hold.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes of released sizes (default: all)")
    parser.add_argument("--ranks", type=int, help="on so many (default: all that a layout is stated for)")
    parser.add_argument("--output", type=Path, help="Markdown to write")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in RELEASED]:
        parser.error(f"{unknown[0]!r} is no recipe of a released size; they are {', '.join(RELEASED)}")
    cases = [case for case in all_cases() if not options.names or case.name in options.names]
    if options.ranks is not None:
        cases = [Case(name, options.ranks) for name in dict.fromkeys(case.name for case in cases)]
    try:
        text = table(cases)
    except UserError as error:
        print(f"recipe_bytes: {error}", file=sys.stderr)
        return 2
    if options.output is not None:
        write_whole(options.output, text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
