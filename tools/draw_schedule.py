"""A recipe's step as a timeline, from predicted durations: what each pipeline rank does when, what is sent, and how long ranks wait.

    python -m tools.draw_schedule RECIPE [section.field=value ...] --gpus N [--encoder-ranks E] [--gpu KIND] [--output FILE.png]

The schedule is the configuration's: the encoder in the pauses of all ranks, in phases of its own, or in the first stage
(`parallel.vision_placement=first_stage`); with `--encoder-ranks`, on GPUs of its own, which the trainer cannot do. With fewer rows
(`rows_per_step`) the picture is easier to read.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from internvl_megatron.config.overrides import apply_overrides
from internvl_megatron.config.plan import RunPlan, plan
from internvl_megatron.config.recipes import find_recipe
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.errors import UserError
from internvl_megatron.scaling.drawn_rows import drawn_workload
from internvl_megatron.scaling.event_time import Timeline
from internvl_megatron.scaling.gpus import GPUS, GpuKind, find_gpu
from internvl_megatron.scaling.predicted_events import StepEvents, disaggregated_events, step_events
from internvl_megatron.scaling.predicted_step import Workload
from tools.timeline_picture import Bar, Line, draw_timeline

COLOURS = {
    "encode": "tab:green",
    "forward": "tab:blue",
    "backward": "tab:orange",
    "backprop": "tab:olive",
    "exposed message": "tab:red",
}


def simulated(config: RunConfig, made: RunPlan, num_encoders: int, workload: Workload, gpu: GpuKind) -> StepEvents:
    """A step with the configuration's schedule, or with encoder ranks beside those of the plan."""
    if num_encoders:
        return disaggregated_events(config, made, num_encoders, workload, gpu)
    return step_events(config, made, workload, gpu)


def bars(found: Timeline) -> list[list[Bar]]:
    """What each rank does, and messages it waits for; later chunks of the language model are paler."""
    drawn = []
    for spans, waits in zip(found.ranks, found.exposed, strict=True):
        num_chunks = 1 + max((span.work.chunk for span in spans), default=0)
        work = [Bar(work.kind, start, end, 1 - 0.7 * work.chunk / num_chunks) for work, start, end in spans]
        drawn.append([*work, *(Bar("exposed message", *wait) for wait in waits)])
    return drawn


def lines(found: Timeline) -> list[Line]:
    """Messages."""
    return [Line(message.sender, message.start, message.receiver, message.end) for message in found.messages]


def told(step: StepEvents, num_encoders: int) -> str:
    """What ranks wait for, and how unequal they are."""
    found = step.timeline
    held = ", ".join(f"{rows:.2f}" for rows in found.most_rows_under_way)
    busy = ", ".join(f"{seconds / found.makespan:.0%}" for seconds in found.busy_seconds)
    of_encoders = f" (last: the {num_encoders} encoder ranks)" if num_encoders else ""
    return "\n".join([
        f"pipeline {found.makespan:.3f} s, step {step.total:.3f} s; of the GPUs' time in the pipeline:",
        f"  bubbles {found.bubble_share:.1%}, exposed messages between ranks {found.exposed_share:.1%}, inside stages "
        f"{step.sent_inside_share:.1%}; the busiest rank is {found.imbalance:.1%} above the mean",
        f"  {len(found.messages)} messages between ranks, {sum(end - start for *_, start, end in found.messages):.3f} s in all",
        f"work by pipeline rank{of_encoders}: {busy}",
        f"rows under way at most: {held}",
    ])  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate, print, draw; exit status 0, or 2 if the user can mend what is wrong."""
    parser = argparse.ArgumentParser(description="Timeline of a step.")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--gpus", type=int, required=True, help="all of them")
    parser.add_argument("--encoder-ranks", type=int, default=0, help="of the GPUs, those that encode and nothing else")
    parser.add_argument("--gpu", default="h100-80g", help=", ".join(GPUS))
    parser.add_argument("--image-share", type=float, default=0.5)
    parser.add_argument("--output", type=Path, help="picture to write")
    options = parser.parse_intermixed_args(arguments)
    num_encoders, num_language = options.encoder_ranks, options.gpus - options.encoder_ranks
    try:
        if num_encoders < 0 or num_language < 1:
            raise UserError(f"--encoder-ranks={num_encoders} must be from 0 to below --gpus={options.gpus}")
        given = ["data.meta=given later", "data.tokenizer=given later", *options.overrides]
        config = apply_overrides(find_recipe(options.recipe, options.gpus), given)
        made, gpu = plan(config, num_language), find_gpu(options.gpu)
        if config.parallel.vision_placement == "colocated":
            raise UserError("parallel.vision_placement=colocated is not timed; leave it out")
        if num_encoders and (config.parallel.vision_sharding == "sharded" or made.vision_layout.first_stage_only):
            raise UserError(
                "--encoder-ranks: every encoder rank has the whole encoder; set parallel.vision_sharding=replicated, "
                "parallel.vision_shard_ranks=null and leave parallel.vision_placement out"
            )
        workload = drawn_workload(config.data.tokens_per_row, config.data.tiles_per_row, options.image_share)
        step = simulated(config, made, num_encoders, workload, gpu)
    except UserError as error:
        print(f"draw_schedule: {error}", file=sys.stderr)
        return 2
    title = f"{config.name}, {made.layout}" + (f" and {num_encoders} encoder ranks" if num_encoders else "")
    print(f"{title}, {gpu.name}\n{told(step, num_encoders)}")
    if options.output is not None:
        draw_timeline(
            bars(step.timeline), COLOURS, options.output, title, "seconds", "pipeline rank", lines(step.timeline)
        )
        print(f"{options.output} is written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
