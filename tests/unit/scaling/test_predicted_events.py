"""Steps as events beside the prediction in closed form, and what encoder ranks do to them."""

import pytest

from internvl_megatron.config.plan import plan
from internvl_megatron.scaling.event_time import run
from internvl_megatron.scaling.gpus import GPUS
from internvl_megatron.scaling.predicted_events import (
    StepEvents,
    disaggregated_events,
    pipeline_passes,
    step_events,
)
from internvl_megatron.scaling.predicted_step import predict_step
from tests.unit.scaling.test_predicted_step import ONE_WINDOW, REPLICATED, ROWS, config_of

H100 = GPUS["h100-80g"]
INTERLEAVED = ("parallel.virtual_size=5", "parallel.vision_window_rows=16")


def step(*overrides: str, num_ranks: int = 256) -> StepEvents:
    """Of the 78B's pre-training."""
    config = config_of("internvl3_78b_pretrain", num_ranks, *overrides)
    return step_events(config, plan(config, num_ranks), ROWS, H100)


def divided(num_encoders: int, num_language: int = 256, *overrides: str) -> StepEvents:
    """The same with encoder ranks."""
    config = config_of("internvl3_78b_pretrain", num_language, *REPLICATED, *overrides)
    return disaggregated_events(config, plan(config, num_language), num_encoders, ROWS, H100)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ONE_WINDOW,
        INTERLEAVED,
        (*INTERLEAVED, "parallel.stage_layers=4,4,4,4,4,4,4,4,4,4,4,4,4,4,4,4,4,4,5,3"),
        REPLICATED,
        (*REPLICATED, "parallel.vision_in_bubbles=false"),
        (*REPLICATED, "parallel.vision_placement=first_stage"),
        ("parallel.tensor_size=8", "parallel.pipeline_size=1", "parallel.stage_layers=null"),
    ],
    ids=lambda overrides: " ".join(overrides)[-60:],
)
def test_the_prediction_says_what_the_events_do(overrides: tuple[str, ...]) -> None:
    """The closed form is what layouts are searched by; it leaves out how stages that differ wait for each other."""
    config = config_of("internvl3_78b_pretrain", 256, *overrides)
    made = plan(config, 256)
    time, found = predict_step(config, made, ROWS, H100), step_events(config, made, ROWS, H100)
    assert found.total == pytest.approx(time.total, rel=0.04)
    assert len(found.timeline.ranks) == made.layout.pipeline_size
    assert sum(found.timeline.num_gpus) == 256


def test_decoupled_pauses_are_shorter_than_phases_and_the_first_stage_is_busiest() -> None:
    bubbles = step(*REPLICATED)
    apart = step(*REPLICATED, "parallel.vision_in_bubbles=false")
    first = step(*REPLICATED, "parallel.vision_placement=first_stage", "parallel.stage_layers=20,20,20,20")
    assert bubbles.total < apart.total < first.total
    assert bubbles.timeline.bubble_share < apart.timeline.bubble_share < first.timeline.bubble_share
    assert first.timeline.imbalance > 0.2 > bubbles.timeline.imbalance
    busy = first.timeline.busy_seconds
    assert busy[0] == max(busy)


def test_messages_between_stages_are_events() -> None:
    found = step(*ONE_WINDOW).timeline
    rows, stages = len({span.work.row for span in found.ranks[0] if span.work.kind == "forward"}), len(found.ranks)
    between = [message for message in found.messages if message.work.kind in ("forward", "backward")]
    assert len([message for message in between if message.work.kind == "forward"]) == rows * (stages - 1)
    assert 0 < found.exposed_share < 0.05
    assert 0 < step(*ONE_WINDOW).sent_inside_share < 0.3


def test_enough_encoder_ranks_leave_the_time_of_text_alone() -> None:
    config = config_of("internvl3_78b_pretrain", 256, *REPLICATED)
    made = plan(config, 256)
    text = run(pipeline_passes(config, made, ROWS, H100).tasks()).makespan
    makespans = [divided(number).timeline.makespan for number in (8, 32, 128, 1024, 8192)]
    assert makespans == sorted(makespans, reverse=True)
    assert makespans[0] > 1.5 * text
    assert text < makespans[-1] < 1.03 * text


def test_encoder_ranks_count_as_gpus() -> None:
    found = divided(64)
    assert found.timeline.num_gpus == [64, 64, 64, 64, 64]
    assert found.timeline.ranks[-1][0].work.kind == "encode"
    idle = divided(1024).timeline
    assert idle.bubble_share > 0.7, "most encoder ranks have nothing to do"


def test_encoder_ranks_go_with_chunks() -> None:
    found = divided(64, 256, "parallel.virtual_size=5")
    assert found.timeline.makespan < divided(64).timeline.makespan
