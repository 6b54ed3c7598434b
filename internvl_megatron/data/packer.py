"""Packing a stream of samples into rows under a token and a tile budget: what the algorithms have in common."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(slots=True)
class Pack[T]:
    """Items collected for one row."""

    items: list[T] = field(default_factory=list)
    tokens: int = 0
    tiles: int = 0

    def add(self, item: T, tokens: int, tiles: int) -> None:
        """Put an item behind the others."""
        self.items.append(item)
        self.tokens += tokens
        self.tiles += tiles


class Packer[T](Protocol):
    """One stream's packing. An item is whatever the caller makes rows of; only its tokens and tiles count here.

    Two packers of the same kind that hold the same items in the same groups go on alike: that is their whole state.
    """

    def add(self, item: T, tokens: int, tiles: int) -> list[Pack[T]]:
        """Add an item (within both budgets by itself); return the packs that are finished by it, none or several."""
        ...

    def flush(self) -> list[Pack[T]]:
        """Take out everything that is held, as packs."""
        ...

    def held(self) -> list[list[T]]:
        """The items waiting, in the groups and the order that `hold` needs to go on alike."""
        ...

    def hold(self, groups: Iterable[Iterable[tuple[T, int, int]]]) -> None:
        """Hold these items, (item, tokens, tiles) each, in the groups that `held` gave, and no others."""
        ...


def pack_of[T](items: Iterable[tuple[T, int, int]]) -> Pack[T]:
    """A pack of items, (item, tokens, tiles) each."""
    pack = Pack[T]()
    for item, tokens, tiles in items:
        pack.add(item, tokens, tiles)
    return pack


def check_fits(tokens: int, tiles: int, budget: tuple[int, int]) -> None:
    """Assert that an item fits a row, (tokens, tiles), by itself."""
    assert 0 < tokens <= budget[0], f"{tokens} tokens do not fit {budget[0]}"
    assert 0 <= tiles <= budget[1], f"{tiles} tiles do not fit {budget[1]}"


@dataclass(frozen=True)
class Fill:
    """How full some rows are: shares from 0 to 1 of what they could hold."""

    num_rows: int
    tokens: float
    tiles: float

    @property
    def binding(self) -> float:
        """Of the budget that binds: no packer could have made fewer than this share of the rows."""
        return max(self.tokens, self.tiles)


def fill_of(packs: Sequence[Pack], tokens_per_row: int, tiles_per_row: int) -> Fill:
    """How full packs are; nothing counts as full rows."""
    tokens, tiles = (sum(getattr(pack, name) for pack in packs) for name in ("tokens", "tiles"))
    budgets = len(packs) * tokens_per_row, len(packs) * tiles_per_row
    shares = [used / budget if budget else 1.0 for used, budget in zip((tokens, tiles), budgets, strict=True)]
    return Fill(len(packs), *shares)
