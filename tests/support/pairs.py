"""A small set of cases in which every two values that can go together do so once: most errors need no more than two."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product

Case = dict[str, str]
"""One value of every factor."""
Pair = tuple[str, str, str, str]
"""A factor, its value, another factor, its value."""


def all_cases(factors: Mapping[str, Sequence[str]], is_valid: Callable[[Case], bool]) -> list[Case]:
    """All combinations of the factors' values that are valid."""
    combined = (dict(zip(factors, values, strict=True)) for values in product(*factors.values()))
    return [case for case in combined if is_valid(case)]


def pairs_of(case: Case) -> set[Pair]:
    """The pairs of values in a case."""
    return {(*one, *other) for one, other in combinations(case.items(), 2)}


def covering(cases: Sequence[Case], cost: Callable[[Case], float]) -> list[Case]:
    """Some of the cases, with all pairs that any of them has; always the same ones.

    Greedy: always the case with most new pairs for its cost, the first of equals.
    """
    number = {pair: index for index, pair in enumerate(sorted(set().union(*map(pairs_of, cases))))}
    pairs = [sum(1 << number[pair] for pair in pairs_of(case)) for case in cases]
    costs = [cost(case) for case in cases]
    missing = (1 << len(number)) - 1
    chosen: list[Case] = []
    while missing:
        best = max(range(len(cases)), key=lambda index: (pairs[index] & missing).bit_count() / costs[index])
        chosen.append(cases[best])
        missing &= ~pairs[best]
    return chosen
