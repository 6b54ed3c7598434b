"""From samples to rows in the order in which steps take them: a packer chosen by name, and the window behind it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from internvl_megatron.config.schema import DataConfig
from internvl_megatron.data.best_fit import BestFitPacker
from internvl_megatron.data.first_fit import FirstFitPacker
from internvl_megatron.data.packer import Pack, Packer, pack_of


def make_packer(data: DataConfig) -> Packer[Any]:
    """The packer that `data.packing` names."""
    if data.packing == "first_fit":
        return FirstFitPacker(data.tokens_per_row, data.tiles_per_row, data.packing_buffer_rows)
    return BestFitPacker(data.tokens_per_row, data.tiles_per_row, data.packing_pool_samples)


class RowPacker[T]:
    """Packs one stream and hands out its rows window by window.

    All streams hand out the rows of a window in the same order of cost (the dearest second, say), drawn anew for each window.
    So rows that meet in a step cost about the same, whatever the number of replicas, and streams need not know of each other.
    """

    def __init__(
        self, packer: Packer[T], window_rows: int, order: Callable[[int], Sequence[int]], cost: Callable[[T], int]
    ) -> None:
        """Begin empty.

        Args:
            packer: as `make_packer` gives it.
            window_rows: rows of a window; 1 = rows go out as they are finished.
            order: of window n, counted from 0: its rows' places by rising cost, in the order in which they go out.
            cost: of an item; a row costs what its items cost together.
        """
        self._packer = packer
        self._window_rows = window_rows
        self._order = order
        self._cost = cost
        self._finished: list[Pack[T]] = []  # of the windows to come
        self._ready: list[Pack[T]] = []  # of this window, in their order
        self._num_windows = 0

    def add(self, item: T, tokens: int, tiles: int) -> None:
        """Add an item; see `Packer`."""
        self._finished += self._packer.add(item, tokens, tiles)

    def add_row(self, item: T, tokens: int, tiles: int) -> None:
        """Add an item that is a row by itself."""
        self._finished.append(pack_of([(item, tokens, tiles)]))

    def flush(self) -> list[Pack[T]]:
        """Take out everything that is held, as rows in any order."""
        packs = [*self._ready, *self._finished, *self._packer.flush()]
        self._ready, self._finished = [], []
        return packs

    def take(self) -> Pack[T] | None:
        """The next row; None if items must be added first."""
        if not self._ready and len(self._finished) >= self._window_rows:
            window, self._finished = self._finished[: self._window_rows], self._finished[self._window_rows :]
            window.sort(key=lambda pack: sum(map(self._cost, pack.items)))
            self._ready = [window[place] for place in self._order(self._num_windows)]
            self._num_windows += 1
        return self._ready.pop(0) if self._ready else None

    def state_dict(self, refer: Callable[[T], Any]) -> dict[str, Any]:
        """Everything that is held, with `refer(item)` in place of each item; JSON if that is."""
        return {
            "open": [[refer(item) for item in group] for group in self._packer.held()],
            "finished": [[refer(item) for item in pack.items] for pack in self._finished],
            "ready": [[refer(item) for item in pack.items] for pack in self._ready],
            "windows": self._num_windows,
        }

    def load_state_dict(self, state: dict[str, Any], restore: Callable[[Any], tuple[T, int, int]]) -> None:
        """Hold what was held when the state was saved; what follows is what followed it then.

        Args:
            state: of a packer with the same settings.
            restore: gives (item, tokens, tiles) for a reference.
        """

        def groups(name: str) -> Iterable[list[tuple[T, int, int]]]:
            return ([restore(reference) for reference in group] for group in state[name])

        self._packer.hold(groups("open"))
        self._finished = [pack_of(group) for group in groups("finished")]
        self._ready = [pack_of(group) for group in groups("ready")]
        self._num_windows = int(state["windows"])
