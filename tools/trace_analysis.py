"""Where the time of a profiler's trace goes: by kernel, by kind of work, by phase, and how long nothing ran.

With a GPU in the trace its kernels count, and a kernel belongs to the phase in which the host launched it. Without one, operators
on the CPU count, each for the time that no operator inside it took. Kernels side by side on several streams count each; time in
which nothing ran is what none of them covers.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tools.kernel_categories import CATEGORIES, category_of

PHASE_PREFIX = "phase:"
WHOLE = "profiled steps"
"""Name of the annotation around all that is looked at."""
OUTSIDE = "outside of phases"
DEVICE_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
MICROSECONDS = 1e6


@dataclass(frozen=True)
class Work:
    """One kernel, or one operator's own time; times in microseconds of the trace's clock."""

    name: str
    start: float
    end: float
    own: float
    """That counts for it."""
    launched: float
    """When the host asked for it."""


def analyse(events: Sequence[dict[str, Any]], num_steps: int) -> dict[str, Any]:
    """Seconds of a step of what a trace holds.

    Args:
        events: `traceEvents` of a Chrome trace by torch's profiler, with annotations `WHOLE` and `PHASE_PREFIX`.
        num_steps: how many the trace holds.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    annotations = [event for event in complete if event.get("cat") == "user_annotation"]
    (whole,) = [event for event in annotations if event["name"] == WHOLE]
    begin, end = whole["ts"], whole["ts"] + whole["dur"]
    of_device = any(event.get("cat") in DEVICE_EVENTS for event in complete)
    work = [item for item in (_kernels if of_device else _operators)(complete) if begin <= item.launched <= end]
    phase_at = _Phases([event for event in annotations if event["name"].startswith(PHASE_PREFIX)])
    by_category: dict[str, float] = dict.fromkeys(CATEGORIES, 0.0)
    by_phase: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    by_name: dict[str, list[float]] = defaultdict(list)
    for item in work:
        category = category_of(item.name)
        by_category[category] += item.own
        by_phase[phase_at(item.launched)][category] += item.own
        by_name[item.name].append(item.own)
    unit = MICROSECONDS * num_steps
    wall = max([end, *(item.end for item in work)]) - begin
    return {
        "of": "GPU kernels" if of_device else "CPU operators",
        "step_seconds": wall / unit,
        "idle_seconds": (wall - _covered((item.start, item.end) for item in work)) / unit,
        "seconds_by_category": {name: value / unit for name, value in by_category.items()},
        "seconds_by_phase": {
            phase: {name: value / unit for name, value in sorted(parts.items(), key=lambda part: -part[1])}
            for phase, parts in by_phase.items()
        },
        "kernels": [
            {
                "name": name,
                "category": category_of(name),
                "calls": len(times) / num_steps,
                "seconds": sum(times) / unit,
            }
            for name, times in sorted(by_name.items(), key=lambda entry: -sum(entry[1]))
        ],
    }


def _kernels(events: Iterable[dict[str, Any]]) -> list[Work]:
    events = list(events)
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
    }
    return [
        Work(
            name=event["name"],
            start=event["ts"],
            end=event["ts"] + event["dur"],
            own=event["dur"],
            launched=launched.get(event.get("args", {}).get("correlation"), event["ts"]),
        )
        for event in events
        if event.get("cat") in DEVICE_EVENTS
    ]


def _operators(events: Iterable[dict[str, Any]]) -> list[Work]:
    """Operators of every thread; what is inside another does not count for that."""
    threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "cpu_op":
            threads[event["tid"]].append(event)
    work = []
    for own_events in threads.values():
        own_events.sort(key=lambda event: (event["ts"], -event["dur"]))
        inside: list[float] = [0.0] * len(own_events)
        stack: list[int] = []
        for number, event in enumerate(own_events):
            while stack and own_events[stack[-1]]["ts"] + own_events[stack[-1]]["dur"] <= event["ts"]:
                stack.pop()
            if stack:
                inside[stack[-1]] += event["dur"]
            stack.append(number)
        work += [
            Work(
                event["name"], event["ts"], event["ts"] + event["dur"], max(0.0, event["dur"] - children), event["ts"]
            )
            for event, children in zip(own_events, inside, strict=True)
        ]
    return work


class _Phases:
    """Which phase a moment belongs to: of phases inside each other the one that began last."""

    def __init__(self, annotations: Sequence[dict[str, Any]]) -> None:
        spans = [(event["ts"], event["ts"] + event["dur"], event["name"]) for event in annotations]
        self._moments = sorted({moment for start, end, _ in spans for moment in (start, end)})
        self._names = [self._innermost(moment, spans) for moment in self._moments]

    def __call__(self, moment: float) -> str:
        place = bisect_right(self._moments, moment) - 1
        return OUTSIDE if place < 0 else self._names[place]

    @staticmethod
    def _innermost(moment: float, spans: list[tuple[float, float, str]]) -> str:
        around = [(start, name) for start, end, name in spans if start <= moment < end]
        return max(around)[1].removeprefix(PHASE_PREFIX) if around else OUTSIDE


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        if end > reached:
            total += end - max(start, reached)
            reached = end
    return total


def table(result: dict[str, Any], num_kernels: int) -> str:
    """As Markdown: categories by phase, then the kernels that take longest."""
    whole, phases = result["step_seconds"], result["seconds_by_phase"]
    lines = [f"| milliseconds of a step ({result['of']}) | all | share | {' | '.join(phases)} |"]
    lines.append("| --- " * (3 + len(phases)) + "|")
    for category, seconds in sorted(result["seconds_by_category"].items(), key=lambda entry: -entry[1]):
        if seconds:
            cells = [f"{1e3 * parts.get(category, 0.0):.2f}" for parts in phases.values()]
            lines.append(f"| {category} | {1e3 * seconds:.2f} | {seconds / whole:.1%} | {' | '.join(cells)} |")
    idle = result["idle_seconds"]
    lines.append(f"| nothing ran | {1e3 * idle:.2f} | {idle / whole:.1%} |" + " |" * len(phases))
    lines += ["", "| kernel | kind | calls | ms of a step |", "| --- | --- | --- | --- |"]
    lines += [
        f"| `{kernel['name'][:90]}` | {kernel['category']} | {kernel['calls']:g} | {1e3 * kernel['seconds']:.3f} |"
        for kernel in result["kernels"][:num_kernels]
    ]
    return "\n".join(lines)
