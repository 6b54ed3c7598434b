"""A training step of one rank of a large run, without the memory and without the other ranks: exact bytes, FLOPs, messages.

    python -m tools.dry_run RECIPE --world-size N [--rank R] [--set section.field=value ...] [--output FILE.json]

The trainer's own model, optimizers, schedules and messages run at full size as one rank of a fake world (`fake_step.py`), on rows drawn as
`scaling/drawn_rows.py` says. Layers are torch's and attention is a CPU's fused kernel; with `--layers transformer_engine` they are stand-ins
that keep for backward passes what Transformer Engine's modules do, which is modelled (`modelled_layers.py`), not seen. Weights, gradients,
optimizer state and messages are the same for both.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from internvl_megatron.config.overrides import apply_overrides
from internvl_megatron.config.plan import RunPlan, plan
from internvl_megatron.config.recipes import find_recipe
from internvl_megatron.config.schema import ParallelConfig, RunConfig
from internvl_megatron.data.files import write_whole
from internvl_megatron.data.rows import Row
from internvl_megatron.data.step_rows import DecodedTiles, assign_images
from internvl_megatron.errors import UserError
from internvl_megatron.launcher import launch
from internvl_megatron.scaling.drawn_rows import TILE_TOKENS, chance_of_image, draw_rows
from internvl_megatron.scaling.saved_tensors import LayerKind, SavedBytes, layer_shape, saved_bytes
from tools.image_text_rows import small_row

SEED = 1
GIVEN = ["data.meta=given later", "data.tokenizer=given later", "checkpoint.load=given later", "device=cpu"]
GIVEN += ["parallel.prepare_ahead=false"]  # what a second thread does is not seen
GIGA = 1e9
LAYERS: dict[LayerKind, str] = {
    "torch": "torch's layers",
    "transformer_engine": "layers that keep what Transformer Engine's do (modelled)",
}


class BlackTiles:
    """Rows of one step of one replica with black images; has what `Step` asks of `StepRows`."""

    def __init__(
        self,
        rows: list[Row],
        slots: Sequence[int],
        tile_pixels: int,
        rank_in_replica: int,
        replica_size: int,
        fewest_rows: int,
    ) -> None:
        self.rows = rows
        self.slots = list(slots)
        self.image_owner = assign_images(rows, replica_size)
        self._tile_pixels = tile_pixels
        self._rank, self._replica_size = rank_in_replica, replica_size
        self._fewest_rows = fewest_rows

    def fewer(self) -> "BlackTiles":
        """The first rows alone, for a step that nobody looks at."""
        few = self._fewest_rows
        return BlackTiles(self.rows[:few], self.slots[:few], self._tile_pixels, self._rank, self._replica_size, few)

    def tiles(self) -> DecodedTiles:
        """The tiles this rank decodes; all are the same zero in memory."""
        mine = [
            (row, image)
            for row, owners in enumerate(self.image_owner)
            for image, owner in enumerate(owners)
            if owner == self._rank
        ]
        black, shape = np.zeros((), dtype=np.uint8), (3, self._tile_pixels, self._tile_pixels)
        numbers = {(row, image): self.rows[row].images[image].num_tiles for row, image in mine}
        return DecodedTiles({key: np.broadcast_to(black, (number, *shape)) for key, number in numbers.items()})


@dataclass(frozen=True)
class DrawnRows:
    """Rows of a step by replica, for `fake_step.dry_run`."""

    config: RunConfig
    made: RunPlan
    image_share: float

    def __call__(self, replica: int, rank: int) -> BlackTiles:
        """As a rank of the replica has them: row g of the step is replica g modulo their number's."""
        layout = self.made.layout
        rows = _drawn(self.config, self.image_share)
        members = layout.replica_ranks(replica)
        return BlackTiles(
            rows[replica :: layout.data_size],
            range(replica, len(rows), layout.data_size),
            self.config.model.vision.tile_pixels,
            members.index(rank),
            len(members),
            fewest_rows=layout.pipeline_size if layout.virtual_size > 1 else 1,
        )


@cache
def _drawn(config: RunConfig, image_share: float) -> list[Row]:
    """All rows of a step."""
    tokens = _tokens_drawn(config)
    drawn = draw_rows(image_share, config.rows_per_step, tokens, config.data.tiles_per_row, SEED)
    return [small_row(samples, config.model, tokens, seed) for seed, samples in enumerate(drawn)]


def _tokens_drawn(config: RunConfig) -> int:
    """Of a row, at 256 tokens a tile."""
    return config.data.tokens_per_row * TILE_TOKENS // config.model.vision.tokens_per_tile


def dry_config(recipe: str, num_ranks: int, overrides: Sequence[str], rows_per_replica: int | None) -> RunConfig:
    """A recipe made ready to run dry.

    Raises:
        UserError: it does not go on so many ranks, or its rows cannot be drawn.
    """
    config = apply_overrides(find_recipe(recipe, num_ranks), [*GIVEN, *overrides])
    parallel = config.parallel
    data_size = max(1, num_ranks // (parallel.tensor_size * parallel.pipeline_size * parallel.context_size))
    if rows_per_replica is None:
        plan(config, num_ranks)
        rows_per_replica = min(config.rows_per_step // data_size, enough_rows(parallel))
    config = replace(config, rows_per_step=rows_per_replica * data_size)
    plan(config, num_ranks)
    if config.loss.kind != "next_token":
        raise UserError(f"loss.kind={config.loss.kind}: rows of pairs are not drawn; set loss.kind=next_token")
    if not parallel.pad_rows and parallel.pipeline_size > 1:
        raise UserError(
            "parallel.pad_rows=false: lengths that stages tell each other are not answered; set it to true"
        )
    if parallel.context_ring_size > 1 or TILE_TOKENS % config.model.vision.tokens_per_tile:
        raise UserError("rows are drawn for no ring, and for tiles of 256 tokens or a divisor of it")
    if config.optimizer.name != "adamw":
        raise UserError(f"optimizer.name={config.optimizer.name}: what is held is counted for adamw")
    return config


def check_layers(config: RunConfig, layers: LayerKind) -> None:
    """Raise UserError for what is not modelled."""
    if layers == "torch":
        return
    problem = None
    if config.dtype != "bf16":
        problem = f"dtype={config.dtype}"
    if (config.fp8.vision, config.fp8.projector) != ("none", "none"):
        problem = f"fp8.vision={config.fp8.vision}, fp8.projector={config.fp8.projector}"
    if config.lora.language_rank is not None or config.lora.vision_rank is not None:
        problem = "lora"
    if problem is not None:
        raise UserError(
            f"{problem}: what Transformer Engine's layers keep is modelled in bf16, and in FP8 of the language model, without adapters; "
            "leave it out, or take --layers torch"
        )


def enough_rows(parallel: ParallelConfig) -> int:
    """Rows with which a rank's memory is fullest: two windows', for a sharded encoder's gradients stay from one to the next; or
    as many as fill a pipeline and its pauses."""
    rows = 2 * (parallel.vision_window_rows or parallel.pipeline_size)
    return -(-rows // parallel.pipeline_size) * parallel.pipeline_size if parallel.virtual_size > 1 else rows


def as_record(
    run: Any, config: RunConfig, made: RunPlan, rank: int, step_rows: int, layers: LayerKind
) -> dict[str, Any]:
    """All figures, for JSON; `step_rows`: of the recipe's step."""
    figures = run.figures
    return {
        "recipe": config.name,
        "world_size": made.layout.world_size,
        "layout": str(made.layout),
        "layers": LAYERS[layers],
        "rank": rank,
        "stage": made.layout.stage(rank),
        "rows_per_replica": figures.num_rows,
        "rows_per_replica_of_recipe": step_rows // made.layout.data_size,
        "tokens_per_row": config.data.tokens_per_row,
        "parameters": figures.held.parameters,
        "weights_bytes": figures.held.weights,
        "gradients_bytes": figures.held.gradients,
        "optimizer_bytes": figures.held.optimizer,
        "peak_bytes_beyond_these": figures.peak_bytes,
        "flops": figures.flops,
        "messages": [
            {**message._asdict(), **traffic._asdict()} for message, traffic in sorted(figures.messages.items())
        ],
        "seconds": run.seconds,
        "resident_bytes": run.resident_bytes,
        "kept_by_a_layer_for_a_row_bytes": {name: vars(kept) for name, kept in kept_by_layers(config).items()},
    }


def kept_by_layers(config: RunConfig) -> dict[str, SavedBytes]:
    """What a layer of the language model keeps of a row until its backward pass, by what it is made of."""
    shape = layer_shape(config)
    return {
        "torch": saved_bytes(shape, "torch"),
        "TE bf16, modelled": saved_bytes(shape, "transformer_engine"),
        "TE FP8, modelled": saved_bytes(shape, "transformer_engine", in_fp8=True),
    }


def kept_table(config: RunConfig) -> list[str]:
    """The same to read, in MB."""
    kept = kept_by_layers(config)
    modules = [*vars(next(iter(kept.values()))), "total"]
    return [
        f"{'MB a layer keeps of a row':<28}" + "".join(f"{name:>20}" for name in kept),
        *(
            f"  {module.replace('_', ' '):<26}"
            + "".join(f"{getattr(one, module) / 1e6:>20.1f}" for one in kept.values())
            for module in modules
        ),
    ]


def report(record: Mapping[str, Any], config: RunConfig, made: RunPlan) -> str:
    """The same to read."""
    stages = made.layout.pipeline_size
    under_way = min(stages - record["stage"], record["rows_per_replica"])
    times = record["rows_per_replica_of_recipe"] / record["rows_per_replica"]
    lines = [
        f"{record['recipe']} on {record['world_size']} ranks, {record['layout']}: rank {record['rank']}, "
        f"stage {record['stage'] + 1} of {stages}; {record['layers']}, {config.dtype}",
        f"a step of {record['rows_per_replica']} rows of {record['tokens_per_row']} tokens a replica, {under_way} under way at most"
        + (" and chunk" if made.layout.virtual_size > 1 else ""),
        f"the recipe's step has {record['rows_per_replica_of_recipe']} rows: {times:g} times the FLOPs and the messages of rows and tiles",
        "",
        f"parameters {record['parameters'] / GIGA:.3f} B",
        *(
            f"{name:<28}{record[f'{key}_bytes'] / GIGA:>10.3f} GB  {record[f'{key}_bytes']:>16,} bytes"
            for name, key in (("weights", "weights"), ("gradients", "gradients"), ("optimizer state", "optimizer"))
        ),
        f"{'peak of a step beyond these':<28}{record['peak_bytes_beyond_these'] / GIGA:>10.3f} GB  "
        f"{record['peak_bytes_beyond_these']:>16,} bytes",
        "",
        *kept_table(config),
        "",
        "TFLOP of the step, recomputation and all of causal attention counted",
        *(f"  {part:<26}{flops / 1e12:>12.3f}" for part, flops in sorted(record["flops"].items())),
        f"  {'together':<26}{sum(record['flops'].values()) / 1e12:>12.3f}",
        "",
        f"{'messages':<16}{'group':<24}{'ranks':>6}{'number':>9}{'bytes given':>20}",
        *(
            f"{one['kind']:<16}{one['group']:<24}{one['num_ranks']:>6}{one['num_messages']:>9}{one['num_bytes']:>20,}"
            for one in record["messages"]
        ),
        "",
        f"{record['seconds']:.1f} s of one core, {record['resident_bytes'] / GIGA:.2f} GB",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print; exit status 0, or 2 if the user can mend what is wrong."""
    parser = argparse.ArgumentParser(description="One step of one rank, without memory.")
    parser.add_argument("recipe")
    parser.add_argument("--world-size", type=int, required=True, help="ranks of the run")
    parser.add_argument("--rank", type=int, default=0, help="which of them to be (default: 0)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="section.field=value")
    parser.add_argument("--image-share", type=float, default=0.5, help="image tokens of all (default: %(default)s)")
    parser.add_argument(
        "--rows-per-replica",
        type=int,
        metavar="N",
        help="of the step (default: two windows', or twice the stages; at most the recipe's). More rows have the same peak, but for "
        "pixels; FLOPs and messages of rows and tiles grow with them, those of gradients and parameters do not",
    )
    parser.add_argument(
        "--layers",
        choices=LAYERS,
        default="torch",
        help="whose tensors are kept for backward passes; Transformer Engine's are modelled (default: torch)",
    )
    parser.add_argument("--output", type=Path, help="JSON to write")
    options = parser.parse_args(arguments)
    try:
        if options.world_size < 1:
            raise UserError(f"--world-size={options.world_size}: at least 1")
        if not 0 <= options.rank < options.world_size:
            raise UserError(f"--rank={options.rank}: from 0 to {options.world_size - 1}")
        if options.output is not None and not options.output.parent.is_dir():
            raise UserError(f"--output={options.output}: {options.output.parent} is no folder; make it first")
        if not 0 <= options.image_share < 0.95:
            raise UserError(f"--image-share={options.image_share}: from 0 to below 0.95")
        if options.rows_per_replica is not None and options.rows_per_replica < 1:
            raise UserError(f"--rows-per-replica={options.rows_per_replica}: at least 1")
        config = dry_config(options.recipe, options.world_size, options.set, options.rows_per_replica)
        check_layers(config, options.layers)
        chance_of_image(options.image_share, _tokens_drawn(config))  # says so if there is none
        made = plan(config, options.world_size)
        rows_of = DrawnRows(config, made, options.image_share)
        target = "tools.fake_step:dry_run"
        [[run]] = launch(target, 1, config, options.world_size, [options.rank], rows_of, options.layers, device="cpu")
    except UserError as error:
        print(f"dry_run: {error}", file=sys.stderr)
        return 2
    step_rows = apply_overrides(find_recipe(options.recipe, options.world_size), options.set).rows_per_step
    record = as_record(run, config, made, options.rank, step_rows, options.layers)
    if options.output is not None:
        write_whole(options.output, json.dumps(record, indent=1) + "\n")
    print(report(record, config, made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
