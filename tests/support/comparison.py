"""How training under a layout is compared with the reference."""

from collections.abc import Mapping

import numpy as np

from internvl_megatron.parallel.layout import Layout
from tests.support.training import Tensors, Trained, merge

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
"""Of a tensor's norm."""
FLOOR = 1e-6
"""Of the norm over all tensors: some gradients are zero in truth and rounding noise in practice (key biases)."""


def expect_same_training(ranks: list[Trained], wanted: Trained, start: Tensors, layout: Layout) -> None:
    """Losses, norms, gradients and what training has changed, of all ranks together, are those of the reference.

    Args:
        ranks: what every rank saw.
        wanted: the reference.
        start: full parameters before training.
        layout: of the ranks.
    """
    for found in ranks:
        np.testing.assert_allclose(found.losses, wanted.losses, rtol=LOSS_TOLERANCE, err_msg="losses")
        assert found.updated == wanted.updated, "the same steps change the model"
        np.testing.assert_allclose(found.evaluation, wanted.evaluation, rtol=LOSS_TOLERANCE, err_msg="evaluation")
    finite = [step for step, updated in enumerate(wanted.updated) if updated]
    for found in ranks:
        norms = [found.grad_norms[step] for step in finite]
        expected = [wanted.grad_norms[step] for step in finite]
        np.testing.assert_allclose(norms, expected, rtol=GRADIENT_TOLERANCE, err_msg="gradient norms")
    if wanted.updated[0] and ranks[0].gradients:
        expect_close(
            merge([found.gradients for found in ranks], layout), wanted.gradients, "gradients of the first step"
        )
    parameters = merge([found.parameters for found in ranks], layout)
    expect_close(_change(parameters, start), _change(wanted.parameters, start), "change of the parameters")


def expect_close(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], what: str) -> None:
    """Compare tensor by tensor, in units of the tensor's norm and never finer than the floor."""
    assert found.keys() == wanted.keys(), f"{what}: {sorted(found.keys() ^ wanted.keys())} are on one side only"
    floor = FLOOR * np.sqrt(sum(np.square(tensor, dtype=np.float64).sum() for tensor in wanted.values()))
    wrong = {
        name: float(np.linalg.norm(found[name] - tensor) / (np.linalg.norm(tensor) + 1e-30))
        for name, tensor in wanted.items()
        if not np.linalg.norm(found[name] - tensor) <= GRADIENT_TOLERANCE * np.linalg.norm(tensor) + floor
    }
    assert not wrong, f"{what}: relative errors {wrong}"


def expect_equal(found: Tensors, wanted: Tensors) -> None:
    """No bit differs."""
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def _change(trained: Tensors, start: Tensors) -> Tensors:
    return {name: trained[name] - start[name] for name in trained}
