"""All pairs (tokens, tiles) that subsets of some samples add up to, found exactly: one bit of a large number for each pair."""

from collections.abc import Sequence


class SumGrid:
    """How pairs up to (`max_tokens`, `max_tiles`) are laid out as bits: a line for each number of tiles.

    Adding a sample to all sums is one shift. Between lines are as many bits as a shift can carry over; a mask clears them.
    """

    def __init__(self, max_tokens: int, max_tiles: int) -> None:
        """Largest sums that can be asked for."""
        self.max_tokens = max_tokens
        self.max_tiles = max_tiles
        self.line = (1 << (max_tokens + 1)) - 1
        self.mask = sum(self.line << self.bit(0, tiles) for tiles in range(max_tiles + 1))

    def bit(self, tokens: int, tiles: int) -> int:
        """Place of a pair."""
        return tokens + (2 * self.max_tokens + 1) * tiles


class SubsetSums:
    """Sums of subsets of given samples that stay within a room."""

    def __init__(self, grid: SumGrid, samples: Sequence[tuple[int, int]], tokens: int, tiles: int) -> None:
        """Find all sums.

        Args:
            grid: holds the room.
            samples: (tokens, tiles) of each, each within the room.
            tokens: room; at most the grid's.
            tiles: room; at most the grid's.
        """
        assert tokens <= grid.max_tokens and tiles <= grid.max_tiles, f"room of {tokens} tokens and {tiles} tiles"
        self._grid = grid
        self._samples = samples
        self._tiles = tiles
        # Sums begin where the full room lies at the end of the grid: the mask then keeps them within the room.
        self._first = grid.max_tokens - tokens, grid.max_tiles - tiles
        self._sums = [1 << grid.bit(*self._first)]  # with the last n samples
        for sample in reversed(samples):
            sums = self._sums[-1]
            self._sums.append((sums | (sums << grid.bit(*sample))) & grid.mask)

    def most_tokens(self) -> dict[int, int]:
        """Largest sum of tokens for each sum of tiles that is reached, by rising tiles."""
        found = {}
        for tiles in range(self._tiles + 1):
            line = (self._sums[-1] >> self._grid.bit(0, self._first[1] + tiles)) & self._grid.line
            if line:
                found[tiles] = line.bit_length() - 1 - self._first[0]
        return found

    def subset(self, tokens: int, tiles: int) -> list[int]:
        """Indices of samples that add up to a sum that is reached: the first sample if that is possible, and so on."""
        at = self._grid.bit(self._first[0] + tokens, self._first[1] + tiles)
        chosen = []
        for index, sample in enumerate(self._samples):
            without = self._sums[len(self._samples) - index - 1]
            before = at - self._grid.bit(*sample)
            if before >= 0 and (without >> before) & 1:
                chosen.append(index)
                at = before
        assert at == self._grid.bit(*self._first), f"{tokens} tokens and {tiles} tiles are no sum of a subset"
        return chosen
