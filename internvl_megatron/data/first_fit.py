"""InternVL's packing algorithm (`PackedDataset` without `allow_overflow`): each sample goes to the first row with room."""

from collections.abc import Iterable

from internvl_megatron.data.packer import Pack, check_fits, pack_of


class FirstFitPacker[T]:
    """Unfinished packs sorted by tiles, most first; equal ones in the order in which they last changed.

    A text-only item has no tiles (upstream runs a dummy tile for it, which takes part of the tile budget; here the vision
    encoder can do without). Whoever wants upstream's rows gives such items one tile.
    """

    def __init__(self, tokens_per_row: int, tiles_per_row: int, max_open_packs: int) -> None:
        """Budgets of one row, and how many unfinished packs may wait (upstream: `max_buffer_size`)."""
        self._budget = tokens_per_row, tiles_per_row
        self._max_open_packs = max_open_packs
        self._open: list[Pack[T]] = []

    def add(self, item: T, tokens: int, tiles: int) -> list[Pack[T]]:
        """Add an item; see `Packer`.

        Finished is a pack that is full of tokens or tiles, and, while too many are open, the one with most tiles.
        """
        check_fits(tokens, tiles, self._budget)
        pack = self._take_fitting(tokens, tiles)
        pack.add(item, tokens, tiles)
        finished: list[Pack[T]] = []
        (finished if pack.tokens == self._budget[0] else self._open).append(pack)
        # Stable: the pack just changed, now the last, comes behind its equals.
        self._open.sort(key=lambda pack: -pack.tiles)
        while self._open and (self._open[0].tiles == self._budget[1] or len(self._open) > self._max_open_packs):
            finished.append(self._open.pop(0))
        return finished

    def flush(self) -> list[Pack[T]]:
        """Take out all unfinished packs."""
        packs, self._open = self._open, []
        return packs

    def held(self) -> list[list[T]]:
        """The items of each unfinished pack."""
        return [list(pack.items) for pack in self._open]

    def hold(self, groups: Iterable[Iterable[tuple[T, int, int]]]) -> None:
        """Go on with these unfinished packs; see `Packer`."""
        self._open = [pack_of(group) for group in groups]

    def _take_fitting(self, tokens: int, tiles: int) -> Pack[T]:
        """Take out the first pack with room, or start one."""
        for index, pack in enumerate(self._open):
            if pack.tiles + tiles <= self._budget[1] and pack.tokens + tokens <= self._budget[0]:
                return self._open.pop(index)
        return Pack()
