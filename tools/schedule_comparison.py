"""Ways to run the encoder on the same GPUs, each in its best layout: a part of the scaling report.

Decoupled (all ranks encode), in the first stage (of a pipeline, or of layouts without one), and on encoder ranks. Layouts are
ranked by the cost model's closed form; of the best of each way the schedule is run event by event (`scaling.predicted_events`),
and the fastest by that is reported.
"""

from dataclasses import dataclass

from internvl_megatron.config.plan import plan
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.scaling.disaggregated import best_division
from internvl_megatron.scaling.memory import first_stage_bytes, rank_bytes
from internvl_megatron.scaling.planner import Search
from internvl_megatron.scaling.predicted_events import StepEvents, step_events
from internvl_megatron.scaling.predicted_step import Workload
from tools.judged_layouts import H100, Judged, ranked, ranked_first_stage

WAYS = ("decoupled", "first stage", "first stage, no pipeline", "disaggregated")
NUM_SIMULATED = 6
"""Layouts of each way whose schedule is run."""

HEAD = (
    "encoder",
    "layout of the language model",
    "GPUs that encode",
    "GB",
    "rows a step",
    "step s",
    "bubbles",
    "busiest over mean",
    "exposed messages between ranks",
    "tokens/s/GPU (decoupled over it)",
)
"""Of a table of `cells`."""


@dataclass(frozen=True)
class Way:
    """A way to run the encoder, in its best layout."""

    layout: str
    num_encoding: int
    """GPUs that encode."""
    memory_bytes: float
    rows_per_step: int
    step: StepEvents

    @property
    def rows_per_second(self) -> float:
        """What ways are compared by."""
        return self.rows_per_step / self.step.total


def compared(config: RunConfig, found: Search, num_gpus: int, workload: Workload) -> dict[str, Way | None]:
    """All ways by name; None where nothing fits.

    Args:
        config: what is trained.
        found: its layouts.
        num_gpus: of all ways.
        workload: rows.
    """
    best = best_division(config, num_gpus, workload, H100)
    divided = None
    if best is not None:
        division, step = best
        divided = Way(
            layout=str(division.plan.layout),
            num_encoding=division.num_encoders,
            memory_bytes=division.memory_bytes,
            rows_per_step=division.config.rows_per_step,
            step=step,
        )
    found_ways = (
        _best(ranked(found, num_gpus, workload), num_gpus, workload),
        _best(ranked_first_stage(found, num_gpus, workload), num_gpus, workload),
        _best(ranked_first_stage(found, num_gpus, workload, has_pipeline=False), num_gpus, workload),
        divided,
    )
    return dict(zip(WAYS, found_ways, strict=True))


def _best(judged: list[Judged], num_gpus: int, workload: Workload) -> Way | None:
    """By events."""
    ways = []
    for config, _ in judged[:NUM_SIMULATED]:
        made = plan(config, num_gpus)
        first = made.vision_layout.first_stage_only
        memory = first_stage_bytes(config, made) if first else rank_bytes(config, made).total
        encoding = num_gpus // made.layout.pipeline_size if first else num_gpus
        step = step_events(config, made, workload, H100)
        ways.append(Way(str(made.layout), encoding, memory, config.rows_per_step, step))
    return min(ways, key=lambda way: way.step.total, default=None)


def speed(way: Way | None, decoupled: Way, tokens_per_row: float) -> str:
    """Tokens/s of a GPU, and how many times as fast the decoupled schedule is."""
    if way is None:
        return ""
    num_gpus = sum(way.step.timeline.num_gpus)
    return f"{way.rows_per_second * tokens_per_row / num_gpus:.0f} ({decoupled.rows_per_second / way.rows_per_second:.2f})"


def cells(name: str, way: Way | None, decoupled: Way, tokens_per_row: float) -> list[str]:
    """Of a way, for a table with `HEAD`."""
    if way is None:
        return [name, "no layout fits", *[""] * (len(HEAD) - 2)]
    found = way.step.timeline
    return [
        name, way.layout, str(way.num_encoding), f"{way.memory_bytes / 1e9:.0f}", str(way.rows_per_step), f"{way.step.total:.2f}",
        f"{found.bubble_share:.1%}", f"{found.imbalance:.1%}", f"{found.exposed_share:.1%}",
        speed(way, decoupled, tokens_per_row),
    ]  # fmt: skip
