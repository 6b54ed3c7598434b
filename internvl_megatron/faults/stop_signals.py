"""Signals that ask a rank to stop: the first one after its step, a second one at once.

SLURM sends SIGTERM (preemption, time limit) or what `--signal` names, often SIGUSR1; a terminal sends SIGINT. One request may
arrive twice, from the system and passed on by a launcher: what comes within two seconds counts as one.
"""

import os
import signal
import time

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_REQUEST_SECONDS = 2.0

EXIT_INTERRUPTED = 130
"""A person stopped the run, with Ctrl-C."""
EXIT_STALLED = 124
"""The run got nowhere and its watchdog ended it (the code of timeout(1))."""
EXIT_TRAINING_ERROR = 3
"""Training met what it may not go on after (`TrainingError`): no setting or file is wrong, but somebody has to look first."""
EXIT_REQUEUE = 75
"""The system stopped the run, which has saved: start the same command again (EX_TEMPFAIL of sysexits.h)."""


def exit_code(number: int) -> int:
    """Exit code of a run that has saved and ended because of a signal."""
    return EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_REQUEUE


class StopSignals:
    """Listens from its construction on. A signal that is ignored already stays so: another process decides about it."""

    def __init__(self) -> None:
        self.received: int | None = None
        """The first signal; None = go on."""
        self._when = 0.0
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._when = number, now
        elif now - self._when > SAME_REQUEST_SECONDS:
            os._exit(128 + number)
