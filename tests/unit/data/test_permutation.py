"""Orders that are computed place by place: bijections, about uniform, different for different keys, the same for ever."""

import math
from collections import Counter
from itertools import pairwise, permutations

import pytest

from internvl_megatron.data.permutation import NUM_KEYS, TABLE_SIZE, Permutation
from internvl_megatron.data.seeds import Purpose, name_key, words


def order(size, *key):
    return Permutation(size, words(NUM_KEYS, 0, Purpose.SHUFFLE, *key))


def chi_square(counts, cells, expected):
    return sum((counts[cell] - expected) ** 2 / expected for cell in cells)


def limit(num_cells):
    """Exceeded by chance once in about 30,000 times (four standard deviations)."""
    freedom = num_cells - 1
    return freedom + 4 * math.sqrt(2 * freedom)


SIZES = [1, 2, 3, 5, 7, 11, 13, 97, 251, *(2**k + d for k in (2, 3, 8, 9, 12) for d in (-1, 0, 1)), 1009, 65537]


@pytest.mark.parametrize("size", SIZES)
def test_every_number_comes_once(size):
    made = order(size, size)
    assert sorted(made(place) for place in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_orders_of_a_few_are_equally_likely(size):
    cells = list(permutations(range(size)))
    counts = Counter(tuple(map(order(size, 1, epoch), range(size))) for epoch in range(40 * len(cells)))
    assert chi_square(counts, cells, 40) < limit(len(cells))


@pytest.mark.parametrize("size", [10, TABLE_SIZE + 1, 300])
def test_any_two_places_hold_any_two_numbers(size):
    """By tenths of the range; neighbouring places, whose halves differ in one bit, and distant ones."""
    counts = {distance: Counter() for distance in (1, size // 2)}
    num_orders = 4000
    for epoch in range(num_orders):
        made = order(size, 2, epoch)
        for distance, counter in counts.items():
            counter[made(0) * 5 // size, made(distance) * 5 // size] += 1
    in_cell = [len([n for n in range(size) if n * 5 // size == cell]) for cell in range(5)]
    for counter in counts.values():
        total = 0.0
        for one in range(5):
            for other in range(5):
                pairs = in_cell[one] * (in_cell[other] - (one == other))
                expected = num_orders * pairs / (size * (size - 1))
                total += (counter[one, other] - expected) ** 2 / expected
        assert total < limit(25)


def test_a_long_order_has_no_trend():
    """Ascents are half of all neighbours, with a variance of (n + 1) / 12; a place says nothing of what it holds."""
    size = 50_000_000
    made = order(size, 3)
    values = [made(place) for place in range(20_000)]
    ascents = sum(one < other for one, other in pairwise(values))
    assert abs(ascents - 10_000) < 4 * math.sqrt(20_000 / 12)
    counts = Counter(value * 100 // size for value in values)
    assert chi_square(counts, range(100), 200) < limit(100)
    assert len(set(values)) == len(values)


def test_keys_give_different_orders():
    orders = {tuple(map(order(1000, *key), range(20))) for key in [(0, 0), (0, 1), (1, 0), (name_key("a"), 0)]}
    assert len(orders) == 4
    for number in range(NUM_KEYS):  # every key matters
        keys = words(NUM_KEYS, 0, Purpose.SHUFFLE, 0, 0)
        keys[number] ^= 2**40
        assert tuple(map(Permutation(1000, keys), range(20))) not in orders


def test_golden_values():
    """A run that goes on with a later version must see the same order: these never change."""
    assert words(3, 7, Purpose.SHUFFLE, 5, 1) == GOLDEN_WORDS
    assert name_key("coco/東京") == GOLDEN_NAME
    for size, expected in GOLDEN.items():
        made = Permutation(size, words(NUM_KEYS, 7, Purpose.SHUFFLE, name_key("coco"), 1))
        assert [made(place) for place in range(min(size, 8))] == expected, size


GOLDEN_WORDS = [7724227757738880442, 5776252522693436780, 6470711102881794048]
GOLDEN_NAME = 10272282234999916313
GOLDEN = {
    1: [0],
    2: [0, 1],
    7: [3, 2, 4, 5, 6, 0, 1],
    256: [29, 194, 221, 150, 114, 182, 161, 241],
    257: [4, 13, 21, 66, 250, 229, 61, 222],
    1000: [139, 623, 85, 201, 979, 371, 146, 900],
    67108865: [9022972, 20884954, 48734929, 59330503, 44706631, 11966699, 40550173, 5710192],
    10**12: [784847627394, 950181489445, 876922051315, 121080346877, 492651740514, 589736988102, 924125875533, 594641715471],
}  # fmt: skip
