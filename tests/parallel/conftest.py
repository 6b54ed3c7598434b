"""Trains all scenarios of a layout in one go, the first time a test asks for one of them; those of slow tests apart."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from tests.parallel.scenarios import LAYOUTS_OF, SCENARIOS, SLOW_SCENARIOS
from tests.support.layouts import LAYOUTS
from tests.support.models import huggingface_model, small_model
from tests.support.reference import our_tensors, train_reference
from tests.support.training import Tensors, Trained, train_scenarios

TrainedBy = Callable[[str, str], list[Trained]]
"""(layout, scenario) to what every rank saw."""


@pytest.fixture(scope="session")
def weights() -> dict[str, Tensors]:
    """Starting parameters by family: those of the transformers model."""
    models = {family: small_model(family) for family in ("300m", "6b")}
    return {family: our_tensors(huggingface_model(model).state_dict(), model) for family, model in models.items()}


@pytest.fixture(scope="session")
def trained(run_ranks: Callable[..., list[Any]], weights: dict[str, Tensors]) -> TrainedBy:
    @cache
    def train_layout(layout: str, is_slow: bool) -> list[dict[str, Trained]]:
        ranks = LAYOUTS[layout]
        names = [name for name, layouts in LAYOUTS_OF.items() if layout in layouts]
        wanted = {name: SCENARIOS[name] for name in names if (name in SLOW_SCENARIOS) == is_slow}
        return run_ranks(train_scenarios, ranks.num_ranks, ranks, wanted, weights)

    return lambda layout, scenario: [results[scenario] for results in train_layout(layout, scenario in SLOW_SCENARIOS)]


@pytest.fixture(scope="session")
def reference() -> Callable[[str, str], Trained]:
    """(layout, scenario) to what plain PyTorch in one process makes of it."""

    @cache
    def train(scenario: str, num_replicas: int) -> Trained:
        layout = next(ranks for ranks in LAYOUTS.values() if ranks.layout.data_size == num_replicas)
        return train_reference(SCENARIOS[scenario], layout)

    return lambda layout, scenario: train(scenario, LAYOUTS[layout].layout.data_size)
