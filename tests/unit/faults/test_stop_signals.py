"""The first signal asks, the second one ends; one request may come twice."""

import signal
import subprocess
import sys

import pytest

from internvl_megatron.faults.stop_signals import EXIT_INTERRUPTED, EXIT_REQUEUE, exit_code

PROGRAM = """
import os, signal, sys, time
from internvl_megatron.faults import stop_signals
stop_signals.SAME_REQUEST_SECONDS = 0.2
{before}
signals = stop_signals.StopSignals()
for pause in {pauses}:
    time.sleep(pause)
    os.kill(os.getpid(), {number})
time.sleep(0.05)
print(signals.received)
"""


def _run(number: int, pauses: list[float], before: str = "") -> tuple[int, str]:
    code = PROGRAM.format(before=before, pauses=pauses, number=int(number))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout.strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_the_first_asks_and_a_later_one_ends_at_once(number: signal.Signals) -> None:
    assert _run(number, [0]) == (0, str(int(number)))
    assert _run(number, [0, 0.4]) == (128 + number, "")


def test_one_request_that_comes_twice_is_one() -> None:
    assert _run(signal.SIGTERM, [0, 0]) == (0, str(int(signal.SIGTERM)))


def test_what_the_launcher_decides_is_left_to_it() -> None:
    ignored = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
    assert _run(signal.SIGINT, [0, 0.4], ignored) == (0, "None")


def test_only_what_the_system_stopped_is_put_back_into_the_queue() -> None:
    assert (exit_code(signal.SIGTERM), exit_code(signal.SIGUSR1)) == (EXIT_REQUEUE, EXIT_REQUEUE) == (75, 75)
    assert exit_code(signal.SIGINT) == EXIT_INTERRUPTED == 130
