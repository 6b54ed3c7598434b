"""Rows shared out among replicas: all of them once, evenly, near the best there is, and few of them moved."""

from itertools import combinations

import numpy as np
import pytest

from internvl_megatron.data.balance import ACCEPTED_PER_MILLE, assign_rows, imbalance

COSTS = {
    "uniform": lambda rng, count: rng.integers(1, 10**6, count),
    "skewed": lambda rng, count: np.exp(rng.normal(11, 1.5, count)).astype(np.int64),
    "few_large": lambda rng, count: np.where(rng.random(count) < 0.15, 10**6, rng.integers(1, 10**5, count)),
    "many_equal": lambda rng, count: rng.integers(0, 5, count),
    "flops": lambda rng, count: 10**15 + rng.integers(0, 10**14, count),
}


def own_replicas(num_rows, num_replicas):
    return np.arange(num_rows) % num_replicas


def largest_total(costs, replicas):
    return max(int(costs[replicas == replica].sum()) for replica in np.unique(replicas))


def least_possible(costs, num_replicas):
    """Smallest largest total of all ways to give each replica the same number of rows."""
    rows_each, best = len(costs) // num_replicas, [sum(costs)]

    def share_out(left, largest):
        if largest >= best[0]:
            return
        if not left:
            best[0] = largest
            return
        first, *others = left
        for chosen in combinations(others, rows_each - 1):
            total = costs[first] + sum(costs[row] for row in chosen)
            share_out([row for row in others if row not in chosen], max(largest, total))

    share_out(list(range(len(costs))), 0)
    return best[0]


CASES = [(2, 1), (2, 3), (3, 7), (5, 4), (8, 16), (16, 2), (31, 5)]


@pytest.mark.parametrize("kind", COSTS)
@pytest.mark.parametrize(("num_replicas", "rows_each"), CASES)
def test_any_costs(kind, num_replicas, rows_each):
    for seed in range(10):
        costs = COSTS[kind](np.random.default_rng(seed), num_replicas * rows_each)
        kept = costs.copy()
        replicas = assign_rows(costs, num_replicas)
        assert (costs == kept).all(), "what was passed in is not changed"
        assert np.bincount(replicas, minlength=num_replicas).tolist() == [rows_each] * num_replicas
        assert (assign_rows(costs, num_replicas) == replicas).all()

        own = own_replicas(len(costs), num_replicas)
        before, after = largest_total(costs, own), largest_total(costs, replicas)
        assert after <= before
        assert after < before or (replicas == own).all(), "rows do not move for nothing"
        mean = costs.sum() / num_replicas
        spread = int(costs.max() - costs.min())
        assert after <= max(mean * (1 + ACCEPTED_PER_MILLE / 1000), mean + (1 - 1 / num_replicas) * spread)
        assert imbalance(costs, replicas, num_replicas) == pytest.approx(after / mean)


@pytest.mark.parametrize("kind", COSTS)
@pytest.mark.parametrize(("num_replicas", "rows_each"), [(2, 2), (2, 4), (3, 2), (3, 3), (4, 2), (5, 2)])
def test_near_the_best_there_is(kind, num_replicas, rows_each):
    """Proven: less than twice the best. Seen with these and other seeds: 1.001 times on average, 1.2 at the worst."""
    for seed in range(20):
        costs = COSTS[kind](np.random.default_rng(seed), num_replicas * rows_each)
        best = least_possible(costs.tolist(), num_replicas)
        assert largest_total(costs, assign_rows(costs, num_replicas)) <= 1.15 * best


@pytest.mark.parametrize(("num_replicas", "rows_each"), [(1, 5), (4, 1), (4, 6), (7, 3)])
def test_rows_that_cost_the_same_stay(num_replicas, rows_each):
    for cost in (0, 1, 3 * 10**15):
        costs = np.full(num_replicas * rows_each, cost)
        assert (assign_rows(costs, num_replicas) == own_replicas(len(costs), num_replicas)).all()
        assert imbalance(costs, own_replicas(len(costs), num_replicas), num_replicas) == 1.0


def test_one_row_each_cannot_be_balanced():
    assert assign_rows(np.array([5, 1, 9, 2]), 4).tolist() == [0, 1, 2, 3]


def test_replicas_near_the_mean_keep_their_rows():
    costs = np.array([100_000, 100_000, 100_000, 100_099])
    assert assign_rows(costs, 2).tolist() == [0, 1, 0, 1]


def test_one_swap_is_enough():
    """Replica 0 has 9 + 9, replica 1 has 1 + 1; replica 2 has the mean and is left alone."""
    assert assign_rows(np.array([9, 1, 5, 9, 1, 5]), 3).tolist() in ([0, 1, 2, 1, 0, 2], [1, 0, 2, 0, 1, 2])


def test_the_heaviest_looks_beyond_the_lightest():
    """Totals 21, 16 and 14: with the lightest it could only trade 10 for 0, with the other one 11 for 10."""
    costs = np.array([10, 10, 14, 11, 6, 0])
    replicas = assign_rows(costs, 3)
    assert largest_total(costs, replicas) == least_possible(costs.tolist(), 3) < 21


def test_most_rows_stay_where_they_are():
    costs = COSTS["flops"](np.random.default_rng(0), 128 * 32)
    own = own_replicas(len(costs), 128)
    replicas = assign_rows(costs, 128)
    assert imbalance(costs, own, 128) > 1.01
    assert imbalance(costs, replicas, 128) <= 1 + ACCEPTED_PER_MILLE / 1000
    assert (replicas != own).mean() < 0.1
