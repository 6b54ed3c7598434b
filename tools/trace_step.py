"""Trace one training step on all local ranks: a Chrome/Perfetto trace and a picture of the timeline.

    python -m tools.trace_step RECIPE [section.field=value ...] --nproc N [--warmup STEPS] [--output FOLDER]

Trains from the start in a folder that is removed, and keeps the phases of the last step. Open `trace.json` in
ui.perfetto.dev or chrome://tracing; `timeline.png` shows the same, a line per rank. On GPUs, whose ranks have no clock in
common, every rank's first mark is taken for the same moment.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from internvl_megatron.config.overrides import apply_overrides
from internvl_megatron.config.plan import plan
from internvl_megatron.config.recipes import find_recipe
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.launcher import launch
from internvl_megatron.parallel.layout import Layout
from internvl_megatron.ranks import RankInfo
from tools.timeline_picture import Bar, draw_timeline

COLOURS = {"plan": "0.6", "encode": "tab:green", "decode": "tab:blue", "backprop": "tab:olive", "update": "tab:red"}
MICROSECONDS = 1e6

Spans = list[tuple[str, float, float]]
"""Name, start and end in seconds."""


def trace_rank(info: RankInfo, config: RunConfig) -> Spans:
    """Body of a rank: take all steps, return the phases of the last."""
    import torch

    from internvl_megatron.device import open_device
    from internvl_megatron.logs import configure_logging
    from internvl_megatron.ranks import joined
    from internvl_megatron.trainer import Trainer

    configure_logging(info.rank)
    torch.set_num_threads(1)
    device = open_device(config.device, info.local_rank)
    with joined(info, device, config.parallel.collective_timeout_seconds):
        trainer = Trainer(info, config, device)
        try:
            results = [
                trainer.trainer_step.run(trainer.data.loader.next_step(), step) for step in range(config.num_steps)
            ]
        finally:
            trainer.close()
    return [(span.name, span.start_seconds, span.end_seconds) for span in results[-1].spans]


def chrome_trace(ranks: list[Spans], layout: Layout) -> dict[str, Any]:
    """The trace-event format: complete events, a thread per rank, times in microseconds from the first mark."""
    first = min(start for spans in ranks for _, start, _ in spans)
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(ranks):
        label = f"rank {rank} (stage {layout.stage(rank)}, replica {layout.replica(rank)})"
        events.append({"name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": {"name": label}})
        events += [
            {
                "name": name,
                "ph": "X",
                "pid": 0,
                "tid": rank,
                "ts": (start - first) * MICROSECONDS,
                "dur": (end - start) * MICROSECONDS,
            }
            for name, start, end in spans
        ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Trace and write both files."""
    parser = argparse.ArgumentParser(description="Trace one training step on all local ranks.")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--nproc", type=int, required=True, help="local ranks")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the traced one")
    parser.add_argument("--output", type=Path, default=Path("runs/trace"))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="trace-") as folder:
        config = replace(
            apply_overrides(find_recipe(options.recipe), options.overrides),
            folder=folder,
            num_steps=options.warmup + 1,
        )
        layout = plan(config, options.nproc).layout
        ranks = launch(trace_rank, options.nproc, config, device=config.device)
    trace = chrome_trace(ranks, layout)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "trace.json").write_text(json.dumps(trace))
    first = min(start for spans in ranks for _, start, _ in spans)
    bars = [[Bar(name, 1e3 * (start - first), 1e3 * (end - first)) for name, start, end in spans] for spans in ranks]
    title = f"{config.name}, {layout}"
    draw_timeline(bars, COLOURS, options.output / "timeline.png", title, "milliseconds", "rank")
    print(f"{options.output}: trace.json, timeline.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
