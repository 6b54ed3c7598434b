"""The decoupled step under every layout equals transformers' model and plain PyTorch in one process."""

from collections.abc import Callable

import numpy as np
import pytest

from tests.parallel.conftest import TrainedBy
from tests.parallel.scenarios import LAYOUTS_OF, SCENARIOS
from tests.support.layouts import LAYOUTS
from tests.support.training import Tensors, Trained, merge

pytestmark = pytest.mark.parallel

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
"""Of a tensor's norm."""
FLOOR = 1e-6
"""Of the norm over all tensors: some gradients are zero in truth and rounding noise in practice (key biases)."""

Reference = Callable[[str, str], Trained]

COMPARABLE = [
    (layout, scenario)
    for scenario, layouts in LAYOUTS_OF.items()
    if SCENARIOS[scenario].drop_path_rate == 0 and scenario != "bf16"
    for layout in layouts
]


def expect_close(found: Tensors, wanted: Tensors, what: str) -> None:
    """Compare tensor by tensor, in units of the tensor's norm and never finer than the floor."""
    assert found.keys() == wanted.keys(), f"{what}: {sorted(found.keys() ^ wanted.keys())} are on one side only"
    floor = FLOOR * np.sqrt(sum(np.square(tensor, dtype=np.float64).sum() for tensor in wanted.values()))
    wrong = {
        name: float(np.linalg.norm(found[name] - tensor) / (np.linalg.norm(tensor) + 1e-30))
        for name, tensor in wanted.items()
        if not np.linalg.norm(found[name] - tensor) <= GRADIENT_TOLERANCE * np.linalg.norm(tensor) + floor
    }
    assert not wrong, f"{what}: relative errors {wrong}"


def change(trained: Tensors, start: Tensors) -> Tensors:
    return {name: trained[name] - start[name] for name in trained}


@pytest.mark.parametrize(("layout", "scenario"), COMPARABLE)
def test_training_equals_plain_pytorch(
    trained: TrainedBy, reference: Reference, weights: dict[str, Tensors], layout: str, scenario: str
) -> None:
    ranks, wanted = trained(layout, scenario), reference(layout, scenario)
    start = weights[SCENARIOS[scenario].family]
    for found in ranks:
        np.testing.assert_allclose(found.losses, wanted.losses, rtol=LOSS_TOLERANCE, err_msg="losses")
        assert found.updated == wanted.updated, "the same steps change the model"
        np.testing.assert_allclose(found.evaluation, wanted.evaluation, rtol=LOSS_TOLERANCE, err_msg="evaluation")
    finite = [step for step, updated in enumerate(wanted.updated) if updated]
    for found in ranks:
        norms = [found.grad_norms[step] for step in finite]
        expected = [wanted.grad_norms[step] for step in finite]
        np.testing.assert_allclose(norms, expected, rtol=GRADIENT_TOLERANCE, err_msg="gradient norms")
    shape = LAYOUTS[layout].layout
    if wanted.updated[0] and ranks[0].gradients:
        expect_close(
            merge([found.gradients for found in ranks], shape), wanted.gradients, "gradients of the first step"
        )
    parameters = merge([found.parameters for found in ranks], shape)
    expect_close(change(parameters, start), change(wanted.parameters, start), "change of the parameters")


def test_the_scenarios_clip(reference: Reference) -> None:
    assert min(reference("1", "300m").grad_norms) > 1.0, "gradients are clipped to 1: the joint norm is tested by it"


@pytest.mark.parametrize("layout", LAYOUTS_OF["micro_batch"])
def test_normalisation_changes_the_loss(trained: TrainedBy, layout: str) -> None:
    jointly, by_micro_step = trained(layout, "300m")[0].losses[0], trained(layout, "micro_batch")[0].losses[0]
    assert abs(jointly - by_micro_step) > 1e-4, "rows of unequal weight: the two rules cannot agree"
