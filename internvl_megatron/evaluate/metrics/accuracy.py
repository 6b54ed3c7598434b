"""Shares of right answers, in all and by what the questions are labelled with."""

from collections import defaultdict
from collections.abc import Iterable, Mapping


def percent(values: Iterable[float]) -> float:
    """Mean of values from 0 to 1, times 100; at least one."""
    listed = list(values)
    return 100 * sum(listed) / len(listed)


def percent_by_label(answers: Iterable[tuple[Mapping[str, str], float]]) -> dict[str, float]:
    """Percent of the answers with each value of each label, as {"label/value": percent}, sorted."""
    values: dict[str, list[float]] = defaultdict(list)
    for labels, value in answers:
        for label, name in labels.items():
            values[f"{label}/{name}"].append(value)
    return {name: percent(values[name]) for name in sorted(values)}
