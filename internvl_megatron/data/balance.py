"""Which replica trains on which row of a step, so that all have about the same work: a pure function of row costs.

In integers throughout: all leaders compute it for themselves, on machines that may round differently, and must agree.
Shapes: R replicas, M rows of each in a step, P pairs of replicas.
"""

import numpy as np

ACCEPTED_PER_MILLE = 1
"""How far the largest total may be above the mean without any row being moved for it."""


def assign_rows(costs: np.ndarray, num_replicas: int) -> np.ndarray:
    """Replica of every row: each gets the same number of rows, and the largest total cost becomes small.

    Slot m * R + r starts at replica r. Then pairs of replicas swap a row each, as long as that makes the larger of
    their totals smaller: the heaviest with the lightest, the next with the next, all at once; where the heaviest gains
    nothing from the lightest, with whom it gains most. Replicas that are near the mean keep their rows, and all do if
    the largest total stays what it was: rows of equal cost never move.

    The largest total ends within `ACCEPTED_PER_MILLE` of the mean, or where no swap makes it smaller. It then exceeds
    any other total by no more than a row of its own exceeds some row there: by no more than the largest cost less the
    smallest. So it is less than twice the least possible, and in practice within a few percent of it.

    Args:
        costs: int64 [M * R] by slot, not negative; the total of a replica fits in int64.
        num_replicas: R.

    Returns:
        int64 [M * R]: replica of each slot.
    """
    own = np.arange(len(costs)) % num_replicas
    slots = np.arange(len(costs)).reshape(-1, num_replicas).T.copy()  # [R, M]: slots of each replica, by rising cost
    held = costs.astype(np.int64)[slots]  # [R, M]: their costs
    _sort(slots, held, np.arange(num_replicas))
    totals = held.sum(axis=1)
    largest_before = totals.max()
    accepted = sum(totals.tolist()) * (1000 + ACCEPTED_PER_MILLE) // (1000 * num_replicas)
    while totals.max() > accepted:
        order = np.argsort(totals, kind="stable")
        heavy, light = order[::-1][: num_replicas // 2], order[: num_replicas // 2]
        larger, of_heavy, of_light = _best_swaps(held, totals, heavy, light)
        chosen = (larger < totals[heavy]) & (totals[heavy] > accepted)
        if not chosen[0]:
            heavy, light = np.repeat(order[-1:], num_replicas - 1), order[:-1]
            larger, of_heavy, of_light = _best_swaps(held, totals, heavy, light)
            if larger.min() >= totals[order[-1]]:
                break
            chosen = np.arange(len(light)) == larger.argmin()
        one, other = (heavy[chosen], of_heavy[chosen]), (light[chosen], of_light[chosen])
        for table in (slots, held):
            table[one], table[other] = table[other], table[one]
        changed = np.concatenate([one[0], other[0]])
        _sort(slots, held, changed)
        totals[changed] = held[changed].sum(axis=1)
    if totals.max() == largest_before:  # of several largest, not all became smaller
        return own
    replicas = np.empty_like(own)
    replicas[slots] = np.arange(num_replicas)[:, None]
    return replicas


def imbalance(costs: np.ndarray, replicas: np.ndarray, num_replicas: int) -> float:
    """Largest total cost of a replica over the mean: 1 = all have the same work to do.

    Args:
        costs: int64 [M * R] by slot.
        replicas: int64 [M * R], replica of each slot.
        num_replicas: R.
    """
    totals = np.bincount(replicas, weights=costs, minlength=num_replicas)
    return float(totals.max() / totals.mean()) if totals.any() else 1.0


def _best_swaps(
    held: np.ndarray, totals: np.ndarray, heavy: np.ndarray, light: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best swap of one row for one row in each pair of replicas.

    Args:
        held: int64 [R, M], costs of each replica's rows, rising.
        totals: int64 [R], their sums.
        heavy: int64 [P], one replica of each pair; `light`: the other.

    Returns:
        int64 [P] each: the larger of the two totals after the swap, and which row of either is swapped.
    """
    offered, wanted, num_rows = held[heavy], held[light], held.shape[1]
    # What a row goes for should be cheaper by half of the difference; the two next to that price are tried.
    price = offered - ((totals[heavy] - totals[light]) // 2)[:, None]
    above = _counts_below(wanted, price)
    taken = np.stack([np.maximum(above - 1, 0), np.minimum(above, num_rows - 1)])  # [2, P, M]
    moved = offered - np.take_along_axis(wanted[None], taken, axis=2)
    larger = np.maximum(totals[heavy][:, None] - moved, totals[light][:, None] + moved)
    by_pair = larger.transpose(1, 0, 2).reshape(len(heavy), -1)
    best, pairs = by_pair.argmin(axis=1), np.arange(len(heavy))
    side, of_heavy = np.divmod(best, num_rows)
    return by_pair[pairs, best], of_heavy, taken[side, pairs, of_heavy]


def _counts_below(rising: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """How many of the rising numbers of a line are below each bound of that line: [P, M], [P, M] -> [P, M]."""
    num_columns = rising.shape[1]
    counts = np.zeros_like(bounds)
    step = 1 << num_columns.bit_length()
    while step := step // 2:
        more = counts + step
        last = np.take_along_axis(rising, np.minimum(more, num_columns) - 1, axis=1)
        counts = np.where((more <= num_columns) & (last < bounds), more, counts)
    return counts


def _sort(slots: np.ndarray, held: np.ndarray, replicas: np.ndarray) -> None:
    """Put the rows of some replicas in the order of their costs."""
    order = np.argsort(held[replicas], axis=1, kind="stable")
    for table in (slots, held):
        table[replicas] = np.take_along_axis(table[replicas], order, axis=1)
