"""The cost model's free number, fitted to published runs, and how far it is off on runs it has not seen.

One number for each release line and precision: the factor on all kernels (`Kernels.factor`). Everything else has a measured or
stated value. Two ways of leaving out: the row alone, and all rows of its model and kind, which is the harder one: rows that
differ in the number of GPUs only are nearly the same.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, median

from internvl_megatron.scaling.collective_time import Network
from internvl_megatron.scaling.kernel_time import Kernels
from internvl_megatron.scaling.language_time import data_parallel_seconds, pipeline_seconds, stage_times
from internvl_megatron.scaling.published_runs import PUBLISHED, PublishedRun

ENOUGH = 1e-5
"""Mean error, as a logarithm, at which the fit ends."""
MOST_ROUNDS = 12


@dataclass(frozen=True)
class Checked:
    """A published run and what is predicted for it by what the other runs say."""

    published: PublishedRun
    without_row: float
    """Seconds of a step, the factor fitted to all other rows of the line."""
    without_group: float | None
    """The same, without any row of the same model and kind; None where no other is left."""

    @property
    def row_error(self) -> float:
        """Of `without_row`, relative."""
        return self.without_row / self.published.step_seconds - 1

    @property
    def group_error(self) -> float | None:
        """Of `without_group`, relative."""
        return None if self.without_group is None else self.without_group / self.published.step_seconds - 1


def predicted_seconds(published: PublishedRun, factor: float) -> float:
    """Of a step of a published run."""
    habits = published.habits
    kernels = Kernels(published.gpu, published.precision, factor)
    network, run = Network(published.gpu), published.run
    stages = stage_times(run, kernels, network, habits)
    pipeline, _ = pipeline_seconds(run, stages)
    return pipeline + sum(data_parallel_seconds(run, stages, kernels, network, habits))


def fit_factor(log_errors: Callable[[float], Sequence[float]]) -> float:
    """The factor for which the errors, logarithms of predicted over measured, are 0 on average; they grow with it."""
    exponent = 0.0
    for _ in range(MOST_ROUNDS):
        error = mean(log_errors(math.exp(exponent)))
        if abs(error) < ENOUGH:
            break
        exponent -= error  # nearly all of a step is kernels: it grows as the factor does
    return math.exp(exponent)


def factor_of(runs: Sequence[PublishedRun]) -> float:
    """Fitted to some runs. Each model and kind counts as one, however many numbers of GPUs it was run on."""
    groups = [run.group for run in runs]
    weights = [len(runs) / groups.count(group) / len(set(groups)) for group in groups]

    def log_errors(factor: float) -> list[float]:
        return [
            weight * math.log(predicted_seconds(run, factor) / run.step_seconds)
            for run, weight in zip(runs, weights, strict=True)
        ]

    return fit_factor(log_errors)


def leave_one_out(runs: Sequence[PublishedRun]) -> list[Checked]:
    """Every run of a line and precision, predicted by the others."""
    checked = []
    for run in runs:
        others = [other for other in runs if other is not run]
        strangers = [other for other in others if other.group != run.group]
        of_others = predicted_seconds(run, factor_of(others))
        of_strangers = predicted_seconds(run, factor_of(strangers)) if strangers else None
        checked.append(Checked(run, of_others, of_strangers))
    return checked


def lines() -> dict[tuple[str, str], list[PublishedRun]]:
    """Published runs by release line and precision."""
    found: dict[tuple[str, str], list[PublishedRun]] = {}
    for run in PUBLISHED:
        found.setdefault((run.line, run.precision), []).append(run)
    return found


def errors_of(values: Sequence[float]) -> tuple[float, float]:
    """Median and largest absolute error."""
    sizes = [abs(value) for value in values]
    return median(sizes), max(sizes)
