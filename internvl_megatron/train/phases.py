"""When the phases of a step ran on this rank, without making the device wait for the host."""

from collections.abc import Callable, Iterator
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


@dataclass(frozen=True)
class Work:
    """What a rank did by itself."""

    seconds: float
    units: int
    """Things it was done to."""


class PhaseClock:
    """Marks beginnings and ends as the step goes; looks at them when it is over."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.on_progress: Callable[[str], None] = _nobody_listens
        """Hears the name of every phase that begins, and that one goes on; '' = none."""
        self._marks: list[tuple[str, Mark, Mark]] = []
        self._open: list[tuple[str, Mark]] = []
        self._work: list[tuple[str, int, Mark, Mark]] = []

    def clear(self) -> None:
        """Begin a step."""
        self._marks.clear()
        self._open.clear()
        self._work.clear()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs in the block belongs to this phase; a phase inside another interrupts it."""
        self._close()
        self._open.append((name, self._device.mark()))
        self.on_progress(name)
        yield
        self._close()
        self._open.pop()
        if self._open:
            self._open[-1] = self._open[-1][0], self._device.mark()

    def tick(self) -> None:
        """The phase that runs has got on."""
        self.on_progress(self._open[-1][0] if self._open else "")

    def _close(self) -> None:
        """End the stretch that is running."""
        if self._open:
            self._marks.append((*self._open[-1], self._device.mark()))

    @contextmanager
    def work(self, kind: str, units: int) -> Iterator[None]:
        """What is computed in the block, of some things, waits for no rank but those that compute it together."""
        begin = self._device.mark()
        yield
        self._work.append((kind, units, begin, self._device.mark()))

    def work_done(self) -> dict[str, Work]:
        """All of it by its kind; waits for the device."""
        done: dict[str, Work] = {}
        seconds = self._device.seconds_since
        for kind, units, begin, end in self._work:
            first = self._work[0][2]
            before = done.get(kind, Work(0.0, 0))
            taken = seconds(first, end) - seconds(first, begin)
            done[kind] = Work(before.seconds + taken, before.units + units)
        return done

    def spans(self) -> list[Span]:
        """All stretches in the order they ended; waits for the device."""
        if not self._marks:
            return []
        first = self._marks[0][1]
        seconds = self._device.seconds_since
        return [Span(name, seconds(first, start), seconds(first, end)) for name, start, end in self._marks]


def _nobody_listens(_name: str) -> None:
    pass


def total_seconds(spans: list[Span]) -> dict[str, float]:
    """Seconds of every phase, its stretches added up."""
    totals: dict[str, float] = {}
    for span in spans:
        totals[span.name] = totals.get(span.name, 0.0) + span.seconds
    return totals
