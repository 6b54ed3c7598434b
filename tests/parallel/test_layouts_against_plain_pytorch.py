"""The decoupled step under every layout equals transformers' model and plain PyTorch in one process."""

from collections.abc import Callable

import pytest

from tests.parallel.conftest import TrainedBy
from tests.parallel.scenarios import LAYOUTS_OF, SCENARIOS
from tests.support.comparison import expect_same_training
from tests.support.layouts import LAYOUTS
from tests.support.training import Tensors, Trained

pytestmark = pytest.mark.parallel

Reference = Callable[[str, str], Trained]

COMPARABLE = [
    (layout, scenario)
    for scenario, layouts in LAYOUTS_OF.items()
    if SCENARIOS[scenario].drop_path_rate == 0 and scenario != "bf16"
    for layout in layouts
]


@pytest.mark.parametrize(("layout", "scenario"), COMPARABLE)
def test_training_equals_plain_pytorch(
    trained: TrainedBy, reference: Reference, weights: dict[str, Tensors], layout: str, scenario: str
) -> None:
    start = weights[SCENARIOS[scenario].family]
    expect_same_training(trained(layout, scenario), reference(layout, scenario), start, LAYOUTS[layout].layout)


def test_the_scenarios_clip(reference: Reference) -> None:
    assert min(reference("1", "300m").grad_norms) > 1.0, "gradients are clipped to 1: the joint norm is tested by it"


@pytest.mark.parametrize("layout", LAYOUTS_OF["micro_batch"])
def test_normalisation_changes_the_loss(trained: TrainedBy, layout: str) -> None:
    jointly, by_micro_step = trained(layout, "300m")[0].losses[0], trained(layout, "micro_batch")[0].losses[0]
    assert abs(jointly - by_micro_step) > 1e-4, "rows of unequal weight: the two rules cannot agree"
