"""A random order of any number of things, of which every place can be computed by itself: nothing is stored or saved.

A Feistel network permutes the numbers of as many bits as are needed; a number outside the range is permuted again until it
is inside ("cycle walking": Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002). Halves of few bits have too few
functions for all orders to be about equally likely, so short orders are tables.
"""

from collections.abc import Sequence

NUM_KEYS = 16
"""Two for each of eight rounds. Four are hard to tell from a random order if halves are long (Luby and Rackoff, 1988)."""
TABLE_SIZE = 256
"""Orders up to this length are tables."""
_MASK = 2**64 - 1
# Multipliers of splitmix64 (Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, 2014).
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Permutation:
    """A bijection of range(size) that its keys determine, the same for ever."""

    __slots__ = ("_high_mask", "_keys", "_low_bits", "_low_mask", "_table", "size")

    def __init__(self, size: int, keys: Sequence[int]) -> None:
        """`NUM_KEYS` random keys below 2^64; size up to 2^64."""
        assert 0 < size <= 2**64, f"no order of {size} things"
        assert len(keys) == NUM_KEYS, f"{len(keys)} keys, {NUM_KEYS} are needed"
        self.size = size
        bits = (size - 1).bit_length()
        self._low_bits = (bits + 1) // 2
        self._low_mask = (1 << self._low_bits) - 1
        self._high_mask = (1 << (bits - self._low_bits)) - 1
        self._keys = tuple(zip(*(keys[first::4] for first in range(4)), strict=True))
        self._table = sorted(range(size), key=lambda at: _mixed(at, keys)) if size <= TABLE_SIZE else None

    def __call__(self, place: int) -> int:
        """What is at a place of the order. Fewer than two tries are needed on average."""
        assert 0 <= place < self.size, f"place {place} of {self.size}"
        if self._table is not None:
            return self._table[place]
        low_bits, low_mask, high_mask = self._low_bits, self._low_mask, self._high_mask
        while True:
            high, low = place >> low_bits, place & low_mask
            for factor, term, other_factor, other_term in self._keys:
                mixed = high * factor + term & _MASK
                low ^= ((mixed ^ mixed >> 32) * _FIRST >> 32) & low_mask
                mixed = low * other_factor + other_term & _MASK
                high ^= ((mixed ^ mixed >> 32) * _FIRST >> 32) & high_mask
            place = high << low_bits | low
            if place < self.size:
                return place


def _mixed(number: int, keys: Sequence[int]) -> int:
    """A number below 2^64 that looks random, by which short orders are sorted."""
    for key in keys[:4]:
        number = (number ^ key) * _FIRST & _MASK
        number = (number ^ number >> 27) * _SECOND & _MASK
        number ^= number >> 31
    return number
