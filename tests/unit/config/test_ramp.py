"""A growing global batch: which rows each step has, against counting; and what plan refuses."""

import pytest

from internvl_megatron.config.overrides import apply_overrides
from internvl_megatron.config.plan import plan
from internvl_megatron.config.ramp import rows_of_step
from internvl_megatron.config.recipes import demo_digits
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.errors import ConfigError

PLAIN = ["rows_per_step=32", "eval_rows=32"]


def ramp(start: int, increment: int, steps: int, *more: str) -> RunConfig:
    fields = (f"ramp.start_rows={start}", f"ramp.increment_rows={increment}", f"ramp.ramp_steps={steps}")
    return apply_overrides(demo_digits(), [*PLAIN, *fields, *more])


def test_without_a_ramp_every_step_has_all_rows() -> None:
    config = apply_overrides(demo_digits(), PLAIN)
    assert [rows_of_step(config, step) for step in range(3)] == [range(32), range(32, 64), range(64, 96)]


def test_a_ramp_grows_at_equal_distances() -> None:
    config = ramp(8, 8, 6)
    assert [len(rows_of_step(config, step)) for step in range(8)] == [8, 8, 16, 16, 24, 24, 32, 32]


@pytest.mark.parametrize(("start", "increment", "steps"), [(8, 8, 3), (8, 8, 7), (4, 4, 100), (16, 16, 1), (2, 30, 5)])
def test_steps_take_one_row_after_the_other(start: int, increment: int, steps: int) -> None:
    config = ramp(start, increment, steps)
    sizes, following = [], 0
    for step in range(steps + 3):
        rows = rows_of_step(config, step)
        assert rows.start == following, "no row is left out or taken twice"
        following = rows.stop
        sizes.append(len(rows))
    assert sizes[0] == start and sizes[steps:] == [32] * 3
    assert sizes[:steps] == [
        start + increment * (step * ((32 - start) // increment) // steps) for step in range(steps)
    ]
    assert set(sizes) == set(range(start, 33, increment)), "every size has its steps"


def test_a_ramp_changes_nothing_else_of_the_plan() -> None:
    assert plan(ramp(8, 8, 6), 8) == plan(apply_overrides(demo_digits(), PLAIN), 8)


@pytest.mark.parametrize(
    ("config", "world_size", "message"),
    [
        (ramp(8, 8, 6, "ramp.ramp_steps=null"), 4, r"ramp\.ramp_steps: a growing global batch needs all of"),
        (ramp(8, 8, 6, "ramp.start_rows=null"), 4, r"ramp\.start_rows: a growing global batch needs all of"),
        (ramp(8, 7, 6), 4, "ramp.start_rows=8 does not reach rows_per_step=32 in steps of ramp.increment_rows=7"),
        (ramp(32, 8, 6), 4, "must be a multiple of the increment, above 0"),
        (ramp(40, 8, 6), 4, "must be a multiple of the increment, above 0"),
        (ramp(4, 4, 10), 32, "ramp.start_rows=4 must be a multiple of the 8 replicas"),
        (ramp(4, 4, 10), 32, "ramp.increment_rows=4 must be a multiple of the 8 replicas"),
        (ramp(8, 8, 2), 4, "ramp.ramp_steps=2 is too few for 3 increments"),
        (ramp(8, 8, 0), 4, "ramp.ramp_steps=0 must be greater than 0"),
        (ramp(8, 8, 6, "fp8.language=delayed"), 4, "fp8.language=delayed: .*set fp8.language=current"),
        (
            ramp(2, 2, 30, "parallel.virtual_size=2", "parallel.stage_layers=1,1,1,1"),
            8,
            "ramp.start_rows=2 is 1 rows of a replica, which must be a multiple of 2",
        ),
    ],
)
def test_plan_refuses_ramps_that_cannot_work(config: RunConfig, world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(config, world_size)


def test_emulated_delayed_scaling_counts_steps_and_may_grow() -> None:
    assert plan(ramp(8, 8, 6, "fp8.language=delayed", "fp8.backend=emulated"), 4)
