"""Steps that must not count: loss or gradient not finite, or a loss far above those before (arXiv 2204.02311, section 5.1).

What is decided follows from numbers that are the same on every rank, so all ranks decide the same without asking.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Literal

from internvl_megatron.config.schema import BadStepConfig

Kind = Literal["nonfinite", "spike"]
Action = Literal["skip", "rewind", "stop"]

SMALLEST_DEVIATION = 0.01
"""Of the mean loss: in a run that has come to rest no difference is a spike."""


@dataclass(frozen=True)
class BadStep:
    """What was wrong with a step, and what follows."""

    kind: Kind
    action: Action
    reason: str


class BadSteps:
    """Judges steps by those before. Between two steps `recent_losses` and the counts are all there is to save."""

    def __init__(self, config: BadStepConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.spike_window_steps)
        self._in_a_row = 0
        self.num_bad = 0
        """Since the run began; rewinding does not take them back."""
        self.num_rewinds = 0

    @property
    def recent_losses(self) -> list[float]:
        """Of good steps, the newest last."""
        return list(self._losses)

    def continue_from(self, recent_losses: Iterable[float]) -> None:
        """Go on after these losses."""
        self._losses.clear()
        self._losses.extend(recent_losses)

    def judge(self, loss: float, grad_norm: float) -> BadStep | None:
        """What to do about a step, before its update; None if it is good."""
        config = self._config
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return self._bad("nonfinite", config.on_nonfinite, f"loss {loss}, gradient norm {grad_norm}")
        if config.on_spike != "ignore" and len(self._losses) == config.spike_window_steps:
            mean = fmean(self._losses)
            deviation = max(pstdev(self._losses), SMALLEST_DEVIATION * abs(mean))
            if loss > mean + config.spike_factor * deviation:
                reason = f"loss {loss:.4f} after a mean of {mean:.4f} (standard deviation {deviation:.4f})"
                return self._bad("spike", config.on_spike, reason)
        self._in_a_row = 0
        self._losses.append(loss)
        return None

    def _bad(self, kind: Kind, action: Action, reason: str) -> BadStep:
        config = self._config
        self.num_bad += 1
        self._in_a_row += 1
        if self._in_a_row >= config.num_bad_steps:
            return BadStep(kind, "stop", f"{reason}; {self._in_a_row} bad steps in a row (bad_steps.num_bad_steps)")
        if action == "rewind":
            if self.num_rewinds >= config.num_rewinds:
                return BadStep(kind, "stop", f"{reason}; {self.num_rewinds} rewinds before (bad_steps.num_rewinds)")
            self.num_rewinds += 1
        return BadStep(kind, action, reason)
