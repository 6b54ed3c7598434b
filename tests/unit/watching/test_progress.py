"""What the log says of a run where there is no terminal, and when it says that the run will end."""

import logging
from dataclasses import replace

import pytest

from internvl_megatron.watching.progress import Progress
from tests.unit.watching.test_metrics import ONE


def test_time_left_follows_the_pace_since_the_first_step():
    now = [100.0]
    progress = Progress(num_steps=50, first_step=10, clock=lambda: now[0])
    now[0] = 140.0  # the first step takes 40 s, the others 2 s and 4 s in turn
    progress.advance(11, 2.0)
    assert progress.seconds_left(replace(ONE, step=11, step_seconds=30.0)) == 39 * 30.0, "all there is to go by"
    for step, seconds in ((12, 2), (13, 4), (14, 2), (15, 4)):
        now[0] += seconds
        progress.advance(step, 2.0)
    assert progress.seconds_left(replace(ONE, step=15)) == pytest.approx(35 * 3.0)
    now[0] += 35 * 3.0
    assert progress.seconds_left(replace(ONE, step=50)) == 0
    progress.close()


def test_a_line_has_what_one_wants_to_see(caplog):
    progress = Progress(num_steps=4000, first_step=0, clock=lambda: 0.0)
    with caplog.at_level(logging.INFO):
        progress.advance(1, 2.5)
        progress.report(replace(ONE, step=1, loss=2.5, step_seconds=1.5, eval_loss=3.25, updated=False))
    (line,) = caplog.messages
    assert line == (
        "step 1/4000: loss 2.5000, held-out loss 3.2500, lr 0.001, grad norm 1.25, NOT UPDATED, 4,000 tokens/s, 1.5 s, "
        "1:39:58 left"
    )
    progress.close()
