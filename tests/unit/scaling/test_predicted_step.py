"""Whole steps: own measurements, and what a change of the configuration must do to the time."""

from dataclasses import replace

import pytest

from internvl_megatron.config.overrides import apply_overrides
from internvl_megatron.config.plan import plan
from internvl_megatron.config.recipes import find_recipe
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.scaling.gpus import GPUS
from internvl_megatron.scaling.predicted_step import StepTime, Workload, predict_step
from tools.calibrate import own_runs

ROWS = Workload(tokens_per_row=32000, pairs_per_row=32768 * 4000, supervised_per_row=9000, tiles_per_row=62)
ONE_WINDOW = ("parallel.vision_window_rows=null",)
REPLICATED = (*ONE_WINDOW, "parallel.vision_sharding=replicated", "parallel.vision_shard_ranks=null")


def config_of(name: str, num_ranks: int, *overrides: str) -> RunConfig:
    """A recipe as it would be run."""
    return apply_overrides(find_recipe(name, num_ranks), ["data.meta=m", "data.tokenizer=t", *overrides])


def predicted(*overrides: str, num_ranks: int = 256, rows: Workload = ROWS, gpu: str = "h100-80g") -> StepTime:
    """Of the 78B's pre-training."""
    config = config_of("internvl3_78b_pretrain", num_ranks, *overrides)
    return predict_step(config, plan(config, num_ranks), rows, GPUS[gpu])


@pytest.mark.parametrize(("name", "record", "workload", "case"), own_runs(), ids=lambda value: str(value)[:20])
def test_steps_measured_on_one_gpu(name: str, record: dict, workload: Workload, case) -> None:
    """The factors are fitted to the language model's time in bf16 and FP8 (current) and to the vision side's in bf16."""
    config = case.config("auto")
    time = predict_step(config, plan(config, 1), workload, GPUS["h200-141g"])
    assert time.total == pytest.approx(record["step_seconds"], rel=0.06)
    assert time.language == pytest.approx(record["phase_seconds"]["decode"], rel=0.07)
    assert time.update == pytest.approx(record["phase_seconds"]["update"], rel=0.05)
    assert (time.pauses, time.language_messages, time.vision_messages, time.data_parallel) == (0, 0, 0, 0)


def test_windows_each_fill_and_empty_the_pipeline() -> None:
    """256 ranks have eight replicas of 64 rows: 16 windows of four rows."""
    assert predicted("parallel.vision_window_rows=4").pauses == pytest.approx(16 * predicted(*ONE_WINDOW).pauses)


def test_encoding_in_pauses_hides_it() -> None:
    """The pauses go, the encoding still takes its time: what is done in a pause is counted once."""
    apart = predicted(*REPLICATED, "parallel.vision_in_bubbles=false")
    filled = predicted(*REPLICATED)
    assert filled.vision == apart.vision
    assert filled.language == apart.language
    assert 0 <= filled.pauses < apart.pauses
    assert apart.total - filled.total == pytest.approx(apart.pauses - filled.pauses)


def test_no_step_is_shorter_than_the_busiest_rank_s_work() -> None:
    filled = predicted(*REPLICATED)
    assert filled.total > filled.language + filled.language_messages + filled.vision


def test_text_alone_has_no_vision_side() -> None:
    time = predicted(rows=replace(ROWS, tiles_per_row=0))
    assert (time.vision, time.vision_messages) == (0, 0)


def test_twice_the_gpus_with_twice_the_rows_take_about_as_long() -> None:
    one, two = predicted(num_ranks=256), predicted("rows_per_step=1024", num_ranks=512)
    assert two.total == pytest.approx(one.total, rel=0.01)
    assert two.data_parallel > one.data_parallel
    assert two.update < one.update


def test_gpus_rank_by_their_speed() -> None:
    times = [predicted(gpu=name).total for name in ("a100-80g", "h100-80g", "h200-141g", "b200-180g")]
    assert times == sorted(times, reverse=True)


def test_replicas_that_trade_no_rows_wait() -> None:
    rows = replace(ROWS, pairs_spread=0.5)
    assert predicted(rows=rows).imbalance == 0
    assert predicted("data.balance_rows=false", rows=rows).imbalance > 0


def test_an_encoder_in_the_first_stage_makes_it_the_busiest() -> None:
    """All ranks' encoders in pauses against the first stage's: the decoupled schedule is what this project is for."""
    shared = ("parallel.vision_sharding=replicated", "parallel.vision_shard_ranks=null", *ONE_WINDOW)
    decoupled = predicted(*shared)
    first = predicted(*shared, "parallel.vision_placement=first_stage")
    even = predicted(*shared, "parallel.vision_placement=first_stage", "parallel.stage_layers=20,20,20,20")
    assert decoupled.total < first.total < even.total
    assert (first.vision, first.vision_messages) == (0, 0)
    assert even.language == pytest.approx(decoupled.language + decoupled.vision * 4, rel=0.35)
