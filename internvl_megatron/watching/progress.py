"""How far a run is, for people: a bar where there is a terminal, lines in the log where there is none."""

import logging
import time
from collections.abc import Callable

from tqdm import tqdm

from internvl_megatron.watching.metrics import StepMetrics

log = logging.getLogger(__name__)


class Progress:
    """Of a run, on the rank that reports."""

    def __init__(self, num_steps: int, first_step: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """Begin to show it.

        Args:
            num_steps: of the run.
            first_step: steps it has taken before.
            clock: seconds.
        """
        # disable=None: only where there is a terminal
        self._bar = tqdm(total=num_steps, initial=first_step, disable=None, unit="step", smoothing=0.1)
        self._num_steps, self._clock = num_steps, clock
        self._start: tuple[int, float] = first_step, clock()
        self._first_step = first_step

    def advance(self, step: int, loss: float) -> None:
        """A step has been taken, the run's `step`-th."""
        if step == self._first_step + 1:  # which takes longer than the others
            self._start = step, self._clock()
        self._bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self._bar.update()

    def report(self, metrics: StepMetrics) -> None:
        """Log a step, if there is no bar."""
        if self._bar.disable:
            log.info("%s", self.line(metrics))

    def line(self, metrics: StepMetrics) -> str:
        """What the log says of a step."""
        held_out = "" if metrics.eval_loss is None else f", held-out loss {metrics.eval_loss:.4f}"
        refused = "" if metrics.updated else ", NOT UPDATED"
        return (
            f"step {metrics.step}/{self._num_steps}: loss {metrics.loss:.4f}{held_out}, lr {metrics.learning_rate:.3g}, "
            f"grad norm {metrics.grad_norm:.3g}{refused}, {metrics.tokens_per_second:,.0f} tokens/s, "
            f"{metrics.step_seconds:.3g} s, {tqdm.format_interval(self.seconds_left(metrics))} left"
        )

    def seconds_left(self, metrics: StepMetrics) -> float:
        """At the pace so far, evaluations and checkpoints included; at first that of the one step there was."""
        first, since = self._start
        taken = metrics.step - first
        seconds = (self._clock() - since) / taken if taken > 0 else metrics.step_seconds
        return seconds * (self._num_steps - metrics.step)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
