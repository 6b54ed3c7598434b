"""Encoder ranks: what is tried is valid and fits, and the best number of them is neither none nor most."""

import pytest

from internvl_megatron.scaling.disaggregated import ROWS_TOLERANCE, best_division, divisions
from internvl_megatron.scaling.drawn_rows import drawn_workload
from internvl_megatron.scaling.gpus import GPUS
from internvl_megatron.scaling.memory import USED_SHARE, encoder_bytes, language_bytes
from internvl_megatron.scaling.predicted_events import disaggregated_events
from tools.plan import planned_config

H100, NUM_GPUS = GPUS["h100-80g"], 32
CONFIG = planned_config("8b", NUM_GPUS, 16384, 128, "none")
WORKLOAD = drawn_workload(16384, CONFIG.data.tiles_per_row, 0.5)


def test_all_gpus_are_used_in_whole_machines_and_replicas() -> None:
    found = divisions(CONFIG, NUM_GPUS, WORKLOAD, H100)
    assert {division.num_encoders for division in found} == {8, 16}
    for division in found:
        layout = division.plan.layout
        assert layout.world_size + division.num_encoders == NUM_GPUS
        rows = division.config.rows_per_step
        assert division.plan.rows_per_replica * layout.data_size == rows
        assert abs(rows / CONFIG.rows_per_step - 1) <= ROWS_TOLERANCE
        assert (
            language_bytes(division.config, division.plan) <= division.memory_bytes <= USED_SHARE * H100.memory_bytes
        )
    rough = [division.rough_seconds for division in found]
    assert rough == sorted(rough)


def test_the_best_is_the_best_of_all_by_events() -> None:
    best = best_division(CONFIG, NUM_GPUS, WORKLOAD, H100)
    assert best is not None
    division, found = best
    assert division.num_encoders == 8
    for other in divisions(CONFIG, NUM_GPUS, WORKLOAD, H100)[::25]:
        events = disaggregated_events(other.config, other.plan, other.num_encoders, WORKLOAD, H100)
        row = events.total / other.config.rows_per_step
        assert found.total / division.config.rows_per_step <= row
        assert row == pytest.approx(other.rough_seconds, rel=0.06)


def test_no_division_fits_where_no_gpu_holds_the_encoder() -> None:
    large = planned_config("78b", NUM_GPUS, 16384, 128, "none")
    assert encoder_bytes(large, 8, 1) > 35e9
    assert best_division(large, 16, WORKLOAD, H100) is None
