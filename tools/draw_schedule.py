"""The pipeline of a recipe's step as a timeline, from predicted durations: what each rank does when, and how long it waits.

    python -m tools.draw_schedule RECIPE [section.field=value ...] --gpus N [--gpu KIND] [--output FILE.png]

The language model's passes alone: with windows, those of one; the encoder is not drawn.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from internvl_megatron.config.overrides import apply_overrides
from internvl_megatron.config.plan import RunPlan, plan
from internvl_megatron.config.recipes import find_recipe
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.errors import UserError
from internvl_megatron.scaling.drawn_rows import drawn_workload
from internvl_megatron.scaling.gpus import GPUS, GpuKind, find_gpu
from internvl_megatron.scaling.interleaved_time import Timeline, timeline
from internvl_megatron.scaling.predicted_step import Workload, predicted_stages
from tools.timeline_picture import Bar, draw_timeline

COLOURS = {"forward": "tab:blue", "backward": "tab:orange"}


def predicted_timeline(config: RunConfig, made: RunPlan, workload: Workload, gpu: GpuKind) -> Timeline:
    """Of one window of a replica. A rank's work is shared out over its chunks as their layers are."""
    layout, layers = made.layout, np.array(made.stage_layers)
    num_rows = min(config.parallel.vision_window_rows or made.rows_per_replica, made.rows_per_replica)
    of_ranks = np.array([stage.passes for stage in predicted_stages(config, made, workload, gpu)])
    ranks = np.arange(len(layers)) % layout.pipeline_size
    shares = layers / np.bincount(ranks, weights=layers)[ranks]
    forward, backward = (np.repeat((of_ranks[ranks, kind] * shares)[:, None], num_rows, axis=1) for kind in (0, 1))
    return timeline(forward, backward, layout.pipeline_size)


def bars(found: Timeline) -> list[list[Bar]]:
    """What each rank does; later chunks are paler."""
    drawn = []
    for spans in found.ranks:
        num_chunks = 1 + max(span.work.chunk for span in spans)
        drawn.append([Bar(work.kind, start, end, 1 - 0.7 * work.chunk / num_chunks) for work, start, end in spans])
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate, print, draw; exit status 0, or 2 if the user can mend what is wrong."""
    parser = argparse.ArgumentParser(description="Timeline of a pipeline.")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--gpu", default="h100-80g", help=", ".join(GPUS))
    parser.add_argument("--image-share", type=float, default=0.5)
    parser.add_argument("--output", type=Path, help="picture to write")
    options = parser.parse_intermixed_args(arguments)
    try:
        given = ["data.meta=given later", "data.tokenizer=given later", *options.overrides]
        config = apply_overrides(find_recipe(options.recipe, options.gpus), given)
        made, gpu = plan(config, options.gpus), find_gpu(options.gpu)
        workload = drawn_workload(config.data.tokens_per_row, config.data.tiles_per_row, options.image_share)
    except UserError as error:
        print(f"draw_schedule: {error}", file=sys.stderr)
        return 2
    found = predicted_timeline(config, made, workload, gpu)
    held = ", ".join(f"{rows:.2f}" for rows in found.most_rows_under_way)
    print(
        f"{config.name}, {made.layout}, {gpu.name}: {found.makespan:.3f} s, of which ranks wait {found.idle_share:.1%}"
    )
    print(f"rows under way at most, by pipeline rank: {held}")
    if options.output is not None:
        title = f"{config.name}, {made.layout}"
        draw_timeline(bars(found), COLOURS, options.output, title, "seconds", "pipeline rank")
        print(f"{options.output} is written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
