"""The comparison of ways to run the encoder: valid layouts on the same GPUs, and the best of each by its events."""

import pytest

from internvl_megatron.config.plan import plan
from internvl_megatron.scaling.drawn_rows import drawn_workload
from internvl_megatron.scaling.gpus import GPUS
from internvl_megatron.scaling.memory import USED_SHARE, first_stage_bytes
from internvl_megatron.scaling.planner import Search, search
from tools.judged_layouts import lighter_first, ranked_first_stage
from tools.plan import planned_config
from tools.schedule_comparison import HEAD, WAYS, Way, cells, compared

H100, NUM_GPUS = GPUS["h100-80g"], 32
CONFIG = planned_config("8b", NUM_GPUS, 16384, 128, "none")
WORKLOAD = drawn_workload(16384, CONFIG.data.tiles_per_row, 0.5)


@pytest.fixture(scope="module")
def found() -> Search:
    return search(CONFIG, NUM_GPUS, H100, WORKLOAD)


def test_layouts_of_the_first_stage_are_such_that_train_takes_them_and_fit(found: Search) -> None:
    judged = ranked_first_stage(found, NUM_GPUS, WORKLOAD)
    times = [time.total for _, time in judged]
    assert times == sorted(times)
    assert times[0] > found.choices[0].time.total
    for config, time in judged:
        made = plan(config, NUM_GPUS)
        assert made.vision_layout.first_stage_only
        assert made.layout.pipeline_size > 1
        assert time.vision == 0
        assert first_stage_bytes(config, made) <= USED_SHARE * H100.memory_bytes
    assert any(config.parallel.virtual_size > 1 for config, _ in judged)
    without = ranked_first_stage(found, NUM_GPUS, WORKLOAD, has_pipeline=False)
    assert {config.parallel.pipeline_size for config, _ in without} == {1}


def test_the_first_rank_s_layers_make_room_for_its_encoder() -> None:
    layers = lighter_first(80, 4, 5, 12.0)
    assert sum(layers) == 80
    of_ranks = [sum(layers[rank::4]) for rank in range(4)]
    assert of_ranks == [11, 23, 23, 23]
    assert min(lighter_first(32, 4, 8, 100.0)) == 1
    assert lighter_first(32, 4, 2, 0.0) == (4,) * 8


def test_all_ways_use_all_gpus_and_are_put_in_one_table(found: Search) -> None:
    ways = compared(CONFIG, found, NUM_GPUS, WORKLOAD)
    assert tuple(ways) == WAYS
    best = ways["decoupled"]
    assert best is not None
    for name, way in ways.items():
        assert way is not None
        assert sum(way.step.timeline.num_gpus) == NUM_GPUS
        assert way.memory_bytes <= USED_SHARE * H100.memory_bytes
        assert way.rows_per_second <= best.rows_per_second
        line = cells(name, way, best, 1000.0)
        assert len(line) == len(HEAD)
        assert line[2] == str(way.num_encoding)
    assert isinstance(ways["disaggregated"], Way)
    assert ways["disaggregated"].num_encoding < NUM_GPUS / 2
    assert len(cells("first stage", None, best, 1.0)) == len(HEAD)
