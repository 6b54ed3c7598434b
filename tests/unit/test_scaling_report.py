"""The scaling report: what it judges again is what was searched, and its figures show all of a step."""

from dataclasses import asdict

import pytest

pytest.importorskip("matplotlib", reason="figures need matplotlib (pip install 'internvl_megatron[demo]')")

from matplotlib.patches import Rectangle

from internvl_megatron.scaling.drawn_rows import drawn_workload
from internvl_megatron.scaling.gpus import GPUS
from internvl_megatron.scaling.planner import Search, search
from tools.judged_layouts import fastest
from tools.plan import planned_config
from tools.scaling_report import parts_figure, table

NUM_GPUS = 16
CONFIG = planned_config("8b", NUM_GPUS, 16384, 128, "none")
WORKLOAD = drawn_workload(16384, CONFIG.data.tiles_per_row, 0.5)


@pytest.fixture(scope="module")
def found() -> Search:
    return search(CONFIG, NUM_GPUS, GPUS["h100-80g"], WORKLOAD)


def test_judged_again_the_best_is_the_best(found: Search) -> None:
    judged = fastest(found, NUM_GPUS, WORKLOAD)
    assert judged is not None
    assert judged[1] == found.choices[0].time


def test_formats_and_gpus_change_what_they_should(found: Search) -> None:
    best = found.choices[0].time
    fp8 = fastest(found, NUM_GPUS, WORKLOAD, fp8__language="current")
    a100 = fastest(found, NUM_GPUS, WORKLOAD, GPUS["a100-80g"])
    assert fp8 is not None
    assert a100 is not None
    assert fp8[1].language < best.language
    assert fp8[1].vision == pytest.approx(best.vision, rel=0.5), "the encoder stays in bf16"
    assert a100[1].total > 2 * best.total
    assert fastest(found, NUM_GPUS, WORKLOAD, data__tokens_per_row=2**24) is None, "nothing holds such a row"


def test_bars_are_whole(found: Search) -> None:
    times = {choice.layout: choice.time for choice in found.choices[:3]}
    axes = parts_figure(times).axes[0]
    ends: dict[float, float] = {}
    for bar in axes.patches:
        assert isinstance(bar, Rectangle)
        ends[bar.get_y()] = max(ends.get(bar.get_y(), 0.0), bar.get_x() + bar.get_width())
    assert list(ends.values()) == pytest.approx([1.0] * 3)
    shown = sum(any(asdict(time)[part] for time in times.values()) for part in asdict(times[found.choices[0].layout]))
    assert len(axes.containers) == shown


def test_tables_are_markdown() -> None:
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
