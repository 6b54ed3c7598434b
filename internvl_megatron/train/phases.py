"""When the phases of a step ran on this rank, without making the device wait for the host."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from internvl_megatron.device import Device, Mark


@dataclass(frozen=True)
class Span:
    """One stretch of a phase."""

    name: str
    start_seconds: float
    """On the clock that all processes of a machine share, on a CPU; since the step began, on a GPU."""
    end_seconds: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_seconds - self.start_seconds


class PhaseClock:
    """Marks beginnings and ends as the step goes; looks at them when it is over."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._marks: list[tuple[str, Mark, Mark]] = []
        self._open: list[tuple[str, Mark]] = []

    def clear(self) -> None:
        """Begin a step."""
        self._marks.clear()
        self._open.clear()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs in the block belongs to this phase; a phase inside another interrupts it."""
        self._close()
        self._open.append((name, self._device.mark()))
        yield
        self._close()
        self._open.pop()
        if self._open:
            self._open[-1] = self._open[-1][0], self._device.mark()

    def _close(self) -> None:
        """End the stretch that is running."""
        if self._open:
            self._marks.append((*self._open[-1], self._device.mark()))

    def spans(self) -> list[Span]:
        """All stretches in the order they ended; waits for the device."""
        if not self._marks:
            return []
        first = self._marks[0][1]
        seconds = self._device.seconds_since
        return [Span(name, seconds(first, start), seconds(first, end)) for name, start, end in self._marks]


def total_seconds(spans: list[Span]) -> dict[str, float]:
    """Seconds of every phase, its stretches added up."""
    totals: dict[str, float] = {}
    for span in spans:
        totals[span.name] = totals.get(span.name, 0.0) + span.seconds
    return totals
