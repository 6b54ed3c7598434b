"""Packing with a pool of waiting samples: rows begin with the oldest and end with those that fill them best.

Nearly all rows become full to the last token where the token budget binds (`docs/packing.md` has figures).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from internvl_megatron.data.packer import Pack, check_fits, pack_of
from internvl_megatron.data.subset_sums import SubsetSums, SumGrid

RESERVED_TOKENS = 4096
"""The last tokens of a row (a quarter, if that is less) are filled by an exact search. More costs time, and gains little."""
MIN_CANDIDATES = 64
"""Samples among which the search chooses, at least: the oldest that fit ..."""
MIN_CANDIDATE_FACTOR = 4
"""... and, so that many short ones can fill the row, at least those with so many times the tokens that are missing."""
TRIES = 8
"""Rows tried with different second samples, of which the best is taken."""
GOOD_WASTE = 0.005
"""A row that wastes less is taken at once."""
TILE_SLACK = 0.2
"""Of the tile budget: how far a row's tiles may be from their share while it is filled in order."""


@dataclass(slots=True)
class _Draft:
    """A row being filled: places in the pool, and the room left."""

    chosen: list[int]
    tokens: int
    tiles: int

    def take(self, place: int, tokens: int, tiles: int) -> None:
        self.chosen.append(place)
        self.tokens -= tokens
        self.tiles -= tiles


@dataclass(frozen=True, slots=True)
class _Waste:
    """What a row loses by the room it leaves: about its share of the budget that binds, which is seen in the pool.

    Where both budgets nearly bind, both count. Only sums, products and quotients, which every machine rounds alike.
    """

    per_token: float
    per_tile: float
    spare_tiles: float
    """Tiles that a row with the pool's mixture does without."""
    per_tile_aside: float
    """Of rows that are equally full the one with the pool's own mixture, so that what stays in the pool keeps it."""

    @classmethod
    def in_pool(cls, token_rows: float, tile_rows: float, budget: tuple[int, int]) -> "_Waste":
        """For a pool whose tokens fill so many rows, and its tiles so many."""
        most = max(token_rows, tile_rows)
        by_tokens, by_tiles = _eighth_power(token_rows / most), _eighth_power(tile_rows / most)
        tiles = max(1, budget[1])
        return cls(by_tokens / budget[0], by_tiles / tiles, (1 - tile_rows / most) * budget[1], 1e-4 / tiles)

    def of(self, tokens: int, tiles: int) -> float:
        """Waste of a row that leaves these tokens and tiles unused."""
        missing = tiles - self.spare_tiles
        return self.per_token * tokens + self.per_tile * max(0.0, missing) + self.per_tile_aside * abs(missing)


class BestFitPacker[T]:
    """Up to `pool_samples` samples wait, more only if they would not fill two rows.

    Each row holds the sample that has waited longest. So a sample that comes as the n-th of those that wait is in one of the
    next n rows.
    """

    def __init__(self, tokens_per_row: int, tiles_per_row: int, pool_samples: int) -> None:
        """Budgets of one row, and how many samples may wait."""
        self._budget = tokens_per_row, tiles_per_row
        self._pool_samples = pool_samples
        self._pool: list[tuple[T, int, int]] = []  # (item, tokens, tiles), oldest first
        self._pool_tokens = 0
        self._pool_tiles = 0
        reserved = min(RESERVED_TOKENS, -(-tokens_per_row // 4))
        # Half as many again as in proportion: rows that lack tiles get them at the end.
        self._grid = SumGrid(reserved, min(tiles_per_row, -(-3 * tiles_per_row * reserved // (2 * tokens_per_row))))

    def add(self, item: T, tokens: int, tiles: int) -> list[Pack[T]]:
        """Add an item; see `Packer`. While more than `pool_samples` wait, and two rows at least, a row is finished."""
        check_fits(tokens, tiles, self._budget)
        self._pool.append((item, tokens, tiles))
        self._pool_tokens += tokens
        self._pool_tiles += tiles
        finished = []
        while len(self._pool) > self._pool_samples and max(self._demand()) >= 2:
            finished.append(self._build())
        return finished

    def flush(self) -> list[Pack[T]]:
        """Make rows of all that wait."""
        packs = []
        while self._pool:
            packs.append(self._build())
        return packs

    def held(self) -> list[list[T]]:
        """One group: the items that wait, oldest first."""
        return [[item for item, _, _ in self._pool]]

    def hold(self, groups: Iterable[Iterable[tuple[T, int, int]]]) -> None:
        """Go on with these items; see `Packer`."""
        self._pool = [sample for group in groups for sample in group]
        self._pool_tokens = sum(tokens for _, tokens, _ in self._pool)
        self._pool_tiles = sum(tiles for _, _, tiles in self._pool)

    def _demand(self) -> tuple[float, float]:
        """Rows that the tokens in the pool fill, and those that its tiles fill."""
        tokens_per_row, tiles_per_row = self._budget
        return self._pool_tokens / tokens_per_row, self._pool_tiles / tiles_per_row if tiles_per_row else 0.0

    def _build(self) -> Pack[T]:
        """Take the best row of some tries out of the pool."""
        best, least = [0], float("inf")
        room_waste = _Waste.in_pool(*self._demand(), self._budget)
        for start in range(1, min(2 * TRIES, len(self._pool) + 1), 2):
            draft, waste = self._draft([*range(start, len(self._pool)), *range(1, start)], room_waste)
            if waste < least:
                best, least = draft.chosen, waste
            if least < GOOD_WASTE:
                break
        taken = set(best)
        pack = pack_of(self._pool[place] for place in best)
        self._pool = [sample for place, sample in enumerate(self._pool) if place not in taken]
        self._pool_tokens -= pack.tokens
        self._pool_tiles -= pack.tiles
        return pack

    def _draft(self, order: Sequence[int], waste: _Waste) -> tuple[_Draft, float]:
        """A row of the oldest sample and of others, taken in this order as far as they fit, and its waste."""
        _, tokens, tiles = self._pool[0]
        draft = _Draft([0], self._budget[0] - tokens, self._budget[1] - tiles)
        self._fill_in_order(draft, order)
        return draft, self._complete(draft, order, waste)

    def _fill_in_order(self, draft: _Draft, order: Sequence[int]) -> None:
        """Take samples until a room is left that the search can fill.

        First only those that leave enough for it to choose from and keep tiles in proportion to tokens; if that ends too
        early, any that fit.
        """
        tokens_per_row, tiles_per_row = self._budget
        least_left, slack = self._grid.max_tokens // 4, TILE_SLACK * tiles_per_row
        tiles_per_token = self._pool_tiles / self._pool_tokens
        passed = []
        for place in order:
            if draft.tokens <= self._grid.max_tokens:
                return
            _, tokens, tiles = self._pool[place]
            surplus = tiles_per_row - draft.tiles - (tokens_per_row - draft.tokens) * tiles_per_token
            changed = abs(surplus + tiles - tokens * tiles_per_token)
            if draft.tokens - tokens < least_left or tiles > draft.tiles or changed > max(slack, abs(surplus)):
                passed.append(place)
            else:
                draft.take(place, tokens, tiles)
        for place in passed:
            if draft.tokens <= self._grid.max_tokens:
                return
            _, tokens, tiles = self._pool[place]
            if tokens <= draft.tokens and tiles <= draft.tiles:
                draft.take(place, tokens, tiles)

    def _complete(self, draft: _Draft, order: Sequence[int], waste: _Waste) -> float:
        """Fill the room left as well as can be; return the waste."""
        if not 0 < draft.tokens <= self._grid.max_tokens:
            return waste.of(draft.tokens, draft.tiles)
        candidates = self._candidates(draft, order)
        room = min(draft.tiles, self._grid.max_tiles)
        sums = SubsetSums(self._grid, [self._pool[place][1:] for place in candidates], draft.tokens, room)
        ends = [
            (waste.of(draft.tokens - tokens, draft.tiles - tiles), tiles, tokens)
            for tiles, tokens in sums.most_tokens().items()
        ]
        least, tiles, tokens = min(ends)
        for index in sums.subset(tokens, tiles):
            place = candidates[index]
            draft.take(place, *self._pool[place][1:])
        return least

    def _candidates(self, draft: _Draft, order: Sequence[int]) -> list[int]:
        """Samples that the search may choose from, see `MIN_CANDIDATES`."""
        chosen, wanted = set(draft.chosen), MIN_CANDIDATE_FACTOR * draft.tokens
        most_tokens, most_tiles = draft.tokens, min(draft.tiles, self._grid.max_tiles)
        candidates: list[int] = []
        for place in order:
            _, tokens, tiles = self._pool[place]
            if tokens > most_tokens or tiles > most_tiles or place in chosen:
                continue
            candidates.append(place)
            wanted -= tokens
            if wanted <= 0 and len(candidates) >= MIN_CANDIDATES:
                break
        return candidates


def _eighth_power(value: float) -> float:
    square = value * value
    return square * square * square * square
