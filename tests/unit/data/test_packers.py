"""First fit against a plain rewriting of InternVL's algorithm, best fit against what it promises; saved ones go on alike."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest

from internvl_megatron.data.best_fit import BestFitPacker
from internvl_megatron.data.first_fit import FirstFitPacker
from internvl_megatron.data.packer import Pack, fill_of
from internvl_megatron.data.subset_sums import SubsetSums, SumGrid


def upstream_steps(items, max_tokens, max_tiles, max_buffer):
    """InternVL's `PackedDataset` on (name, tokens, tiles): what each item makes it emit, and at last what is left.

    Written from the description of its steps; buffers are lists of items, everything is counted anew each time.
    """

    def tokens(buffer):
        return sum(item[1] for item in buffer)

    def tiles(buffer):
        return sum(item[2] for item in buffer)

    buffers = []
    for item in items:
        emitted = []
        found = None
        for place, buffer in enumerate(buffers):
            if tiles(buffer) + item[2] <= max_tiles and tokens(buffer) + item[1] <= max_tokens:
                found = place
                break
        merged = [item] if found is None else [*buffers.pop(found), item]
        if tokens(merged) == max_tokens:
            emitted.append(merged)
        else:
            place = len(buffers)
            for other, buffer in enumerate(buffers):
                if tiles(buffer) < tiles(merged):
                    place = other
                    break
            buffers.insert(place, merged)
        while buffers and tiles(buffers[0]) == max_tiles:
            emitted.append(buffers.pop(0))
        while len(buffers) > max_buffer:
            emitted.append(buffers.pop(0))
        yield emitted, [list(buffer) for buffer in buffers]


def random_items(rng, count, max_tokens, max_tiles):
    """Sizes of all kinds: skewed, exact fits of either budget, without tiles, many alike."""
    power = rng.choice([0.4, 1, 2])
    tokens = np.ceil(max_tokens * rng.random(count) ** (1 / power)).astype(int).clip(1, max_tokens)
    tiles = rng.integers(0, max_tiles + 1, count) * (rng.random(count) < rng.choice([0.0, 0.5, 1.0]))
    tokens[rng.random(count) < 0.05] = max_tokens
    tiles[rng.random(count) < 0.05] = max_tiles
    tokens[rng.random(count) < 0.2] = max(1, max_tokens // 4)
    return [(name, int(t), int(i)) for name, (t, i) in enumerate(zip(tokens, tiles, strict=True))]


@pytest.mark.parametrize("seed", range(60))
def test_first_fit_emits_what_upstream_emits_after_each_sample(seed):
    rng = np.random.default_rng(seed)
    max_tokens, max_tiles = int(rng.integers(4, 80)), int(rng.integers(0, 16))
    max_buffer = int(rng.choice([0, 1, 3, 20]))
    items = random_items(rng, 250, max_tokens, max_tiles)
    packer, held = FirstFitPacker(max_tokens, max_tiles, max_buffer), []
    for item, (emitted, held) in zip(items, upstream_steps(items, max_tokens, max_tiles, max_buffer), strict=True):
        packs = packer.add(item, item[1], item[2])
        assert [pack.items for pack in packs] == emitted
        assert packer.held() == held
        for pack in packs:
            assert (pack.tokens, pack.tiles) == tuple(sum(item[i] for item in pack.items) for i in (1, 2))
    assert [pack.items for pack in packer.flush()] == held
    assert packer.held() == [] == packer.flush()


def test_first_fit_by_hand():
    """Rows of 10 tokens and 4 tiles, two may wait."""
    packer = FirstFitPacker(10, 4, 2)

    def add(name, tokens, tiles):
        return ["".join(pack.items) for pack in packer.add(name, tokens, tiles)]

    assert add("a", 6, 1) == [] and packer.held() == [["a"]]
    assert add("b", 6, 2) == [] and packer.held() == [["b"], ["a"]]  # more tiles: in front
    assert add("c", 4, 0) == ["bc"]  # full of tokens
    assert add("d", 6, 1) == [] and packer.held() == [["a"], ["d"]]  # as many tiles: behind
    assert add("e", 3, 1) == [] and packer.held() == [["a", "e"], ["d"]]  # the first with room
    assert add("f", 3, 1) == [] and packer.held() == [["a", "e"], ["d", "f"]]  # changed last: behind its equal
    assert add("g", 1, 2) == ["aeg"]  # full of tiles
    assert add("h", 9, 0) == [] and packer.held() == [["d", "f"], ["h"]]
    assert add("i", 5, 0) == ["df"]  # a third one waits: most tiles leave
    assert packer.held() == [["h"], ["i"]]


PACKERS = {
    "first_fit": lambda tokens, tiles: FirstFitPacker(tokens, tiles, 5),
    "best_fit": lambda tokens, tiles: BestFitPacker(tokens, tiles, 12),
}


@pytest.fixture(params=PACKERS)
def make_packer(request):
    return PACKERS[request.param]


BUDGETS = [(64, 12), (64, 0), (7, 3), (1, 1), (1000, 2)]


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_item_once_within_the_budgets(make_packer, budget):
    for seed in range(8):
        items = random_items(np.random.default_rng(seed), 300, *budget)
        packer = make_packer(*budget)
        packs = [pack for item in items for pack in packer.add(item, item[1], item[2])]
        packs += packer.flush()
        assert packer.held() in ([], [[]])
        assert sorted(item for pack in packs for item in pack.items) == items
        for pack in packs:
            assert pack.items
            assert pack.tokens == sum(item[1] for item in pack.items) <= budget[0]
            assert pack.tiles == sum(item[2] for item in pack.items) <= budget[1]


@pytest.mark.parametrize("budget", BUDGETS[:2])
def test_what_is_held_is_the_whole_state(make_packer, budget):
    """Saved after any item and restored from its groups alone, a packer emits what the first one emits."""
    items = random_items(np.random.default_rng(1), 120, *budget)
    packer, emitted, saved = make_packer(*budget), [], []
    for item in items:
        saved.append([[list(held) for held in group] for group in packer.held()])
        emitted.append([pack.items for pack in packer.add(item, item[1], item[2])])
    last = [pack.items for pack in packer.flush()]
    for step, groups in enumerate(saved):
        restored = make_packer(*budget)
        restored.add("of another life", 1, 0)
        restored.hold(((tuple(item), item[1], item[2]) for item in group) for group in groups)
        rest = [[pack.items for pack in restored.add(item, item[1], item[2])] for item in items[step:]]
        assert rest == emitted[step:]
        assert [pack.items for pack in restored.flush()] == last


def test_an_item_over_a_budget_is_a_mistake_of_ours(make_packer):
    for tokens, tiles in ((11, 0), (0, 0), (5, 3), (5, -1)):
        with pytest.raises(AssertionError, match="do not fit"):
            make_packer(10, 2).add("x", tokens, tiles)


@pytest.mark.parametrize("seed", range(20))
def test_no_sample_waits_longer_than_there_were_samples_before_it(seed):
    """Best fit: a sample that comes as the n-th of those that wait is in one of the next n rows."""
    rng = np.random.default_rng(seed)
    budget = int(rng.integers(8, 200)), int(rng.integers(0, 12))
    packer = BestFitPacker(*budget, int(rng.integers(1, 30)))
    latest, num_rows = {}, 0
    items = random_items(rng, 400, *budget)
    for item in items:
        latest[item] = num_rows + len(packer.held()[0]) + 1
        for pack in packer.add(item, item[1], item[2]):
            num_rows += 1
            assert all(num_rows <= latest.pop(item) for item in pack.items)
    for pack in packer.flush():
        num_rows += 1
        assert all(num_rows <= latest.pop(item) for item in pack.items)
    assert not latest


def test_the_pool_is_bounded():
    """By its samples, or by two rows' tokens where samples are short."""
    for tokens, pool in ((3, 8), (500, 8), (999, 1), (30, 50)):
        packer = BestFitPacker(1000, 0, pool)
        for name in range(2000):
            packer.add(name, tokens, 0)
            held = len(packer.held()[0])
            assert held <= max(pool, -(-2000 // tokens))


@pytest.mark.parametrize("length", [7, 100, 1000])
def test_short_samples_fill_rows_although_few_wait(length):
    rng = np.random.default_rng(0)
    packer = BestFitPacker(16384, 48, 4)
    lengths = rng.integers(1, length + 1, 16384 * 8 // length)
    packs = [pack for name, tokens in enumerate(lengths) for pack in packer.add(name, int(tokens), 0)]
    assert len(packs) > 1 and fill_of(packs, 16384, 48).tokens > 0.999


def test_the_last_quarter_of_a_row_is_filled_as_well_as_can_be():
    """Behind an oldest sample that leaves a quarter or less: no subset of the others holds more tokens."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        oldest, others = int(rng.integers(75, 100)), rng.integers(2, 26, 9).tolist()
        packer = BestFitPacker(100, 0, 10)
        for name, tokens in enumerate([oldest, *others]):
            packer.add((name, tokens), tokens, 0)
        first = packer.flush()[0]
        subsets = itertools.chain.from_iterable(itertools.combinations(others, size) for size in range(10))
        assert first.items[0] == (0, oldest)
        assert first.tokens == oldest + max(total for subset in subsets if (total := sum(subset)) <= 100 - oldest)


def test_rows_fill_the_budget_that_binds():
    """Tiles bind: 2 tiles of 10 a row and tokens to spare, with text between them."""
    rng = np.random.default_rng(0)
    packer, packs = BestFitPacker(1000, 10, 32), []
    for name in range(3000):
        tiles = int(rng.integers(0, 5))
        packs += packer.add(name, 20 * tiles + int(rng.integers(1, 40)), tiles)
    fill = fill_of(packs, 1000, 10)
    assert fill.binding == fill.tiles > 0.99 and fill.tokens < 0.5


def test_subset_sums_are_those_of_all_subsets():
    for seed in range(100):
        rng = np.random.default_rng(seed)
        grid = SumGrid(int(rng.integers(1, 30)), int(rng.integers(0, 6)))
        room = int(rng.integers(1, grid.max_tokens + 1)), int(rng.integers(0, grid.max_tiles + 1))
        samples = [(int(rng.integers(1, room[0] + 1)), int(rng.integers(0, room[1] + 1))) for _ in range(8)]
        reached = {}
        for subset in itertools.chain.from_iterable(itertools.combinations(range(8), n) for n in range(9)):
            pair = tuple(sum(samples[index][i] for index in subset) for i in (0, 1))
            if pair[0] <= room[0] and pair[1] <= room[1]:
                reached.setdefault(pair, []).append(list(subset))
        sums = SubsetSums(grid, samples, *room)
        assert sums.most_tokens() == {
            tiles: max(t for t, i in reached if i == tiles) for tiles in sorted({i for _, i in reached})
        }
        for (tokens, tiles), subsets in reached.items():
            # Early samples first: the lexicographically first subset, where one that goes on comes before one that ends.
            chosen = sums.subset(tokens, tiles)
            assert chosen == min(subsets, key=lambda subset: [index not in subset for index in range(8)])
        missing = next((t, i) for t in range(room[0] + 1) for i in range(room[1] + 2) if (t, i) not in reached)
        if missing[1] <= room[1]:
            with pytest.raises(AssertionError, match="no sum of a subset"):
                sums.subset(*missing)


def test_fill_counts_the_budget_that_binds():
    packs = [Pack(["a"], 60, 1), Pack(["b", "c"], 100, 4)]
    fill = fill_of(packs, 100, 10)
    assert (fill.num_rows, fill.tokens, fill.tiles, fill.binding) == (2, 0.8, 0.25, 0.8)
    assert fill_of(packs, 1000, 4).binding == 5 / 8
    assert fill_of([], 100, 10).binding == fill_of(packs, 100, 0).tiles == 1


def test_speed():
    """Ten times less than what is measured: a search that grew by accident would still show."""
    rng = np.random.default_rng(0)
    sizes = [(int(n), int(t)) for n, t in zip(rng.integers(3400, 4000, 1500), rng.integers(0, 14, 1500), strict=True)]
    packer, begin = BestFitPacker(16384, 48, 64), time.process_time()
    rows = Counter(len(pack.items) for size in sizes for pack in packer.add(size, *size))
    assert rows.total() > 300
    assert len(sizes) / (time.process_time() - begin) > 500
