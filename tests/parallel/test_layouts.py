"""The decoupled step under every layout equals transformers' model and plain PyTorch in one process.

Also steps with little or nothing in them, steps that go wrong, and draws that must not depend on the layout. In one file because
what a layout trains is trained once for all of them.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.parallel.conftest import TrainedBy
from tests.parallel.scenarios import LAYOUTS_OF, SCENARIOS, SLOW_LAYOUTS, SLOW_SCENARIOS
from tests.support.comparison import expect_equal, expect_same_training
from tests.support.layouts import LAYOUTS
from tests.support.training import Tensors, Trained, merge

pytestmark = pytest.mark.parallel

Reference = Callable[[str, str], Trained]


def case(*names: str) -> Any:
    """Parameters of a test: layouts and scenarios."""
    is_slow = not (SLOW_LAYOUTS | SLOW_SCENARIOS).isdisjoint(names)
    return pytest.param(*names, marks=[pytest.mark.slow] if is_slow else [])


COMPARABLE = [
    case(layout, scenario)
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


@pytest.mark.parametrize("layout", map(case, LAYOUTS_OF["text"]))
def test_a_step_without_images_never_calls_the_vision_tower(trained: TrainedBy, layout: str) -> None:
    assert all(found.vision_calls == [[], []] for found in trained(layout, "text"))


@pytest.mark.parametrize("layout", [case(name) for name in LAYOUTS_OF["one_tile"] if "first stage" not in name])
def test_one_rank_encodes_a_lone_tile_and_all_ranks_run_the_same_chunks(trained: TrainedBy, layout: str) -> None:
    # A rank without tiles encodes one black dummy: the sizes are the same, the gradients of test_training_* tell them apart.
    assert all(found.vision_calls == [[1], [1]] for found in trained(layout, "one_tile"))


@pytest.mark.parametrize("layout", [case(name) for name in LAYOUTS_OF["300m"] if " " not in name or "uneven" in name])
def test_tiles_are_shared_out_evenly(trained: TrainedBy, layout: str) -> None:
    calls = [found.vision_calls[0] for found in trained(layout, "300m")]
    if "PP" not in layout or "VPP" in layout:  # in the pauses of a pipeline ranks encode different rows
        assert len({len(chunks) for chunks in calls}) == 1, f"every rank runs the same number of chunks: {calls}"
    assert max(map(sum, calls)) - min(map(sum, calls)) <= 1, f"loads differ by one tile at most: {calls}"
    assert all(tiles <= 2 for chunks in calls for tiles in chunks), f"chunks hold two tiles at most: {calls}"


@pytest.mark.parametrize("layout", LAYOUTS_OF["no_targets"])
def test_without_targets_the_loss_is_zero_and_nothing_changes(
    trained: TrainedBy, weights: dict[str, Tensors], layout: str
) -> None:
    ranks = trained(layout, "no_targets")
    for found in ranks:
        assert (found.losses, found.grad_norms, found.updated) == ([0.0, 0.0], [0.0, 0.0], [False, False])
    expect_equal(merge([found.parameters for found in ranks], LAYOUTS[layout].layout), weights["300m"])


OVERFLOWS = [
    (layout, scenario)
    for scenario in ("language_overflow", "vision_overflow", "adamw_overflow")
    for layout in LAYOUTS_OF[scenario]
]


@pytest.mark.parametrize(("layout", "scenario"), OVERFLOWS)
def test_a_gradient_that_is_not_finite_on_one_rank_updates_neither_side(
    trained: TrainedBy, weights: dict[str, Tensors], layout: str, scenario: str
) -> None:
    ranks = trained(layout, scenario)
    for found in ranks:
        assert not math.isfinite(found.grad_norms[0]), "every rank sees the overflow of the last"
        assert found.updated == [False, True], "the step is left out and the next one is not"
    after = merge([found.after_first_step for found in ranks], LAYOUTS[layout].layout)
    expect_equal(after, weights["300m"])


@pytest.mark.parametrize("layout", LAYOUTS_OF["broken_image"])
def test_broken_images_are_counted_on_every_rank(trained: TrainedBy, layout: str) -> None:
    for found in trained(layout, "broken_image"):
        assert found.failed_images == [2, 1], "two rows have a first image in step 0, one of them in step 1"


@pytest.mark.parametrize("layout", LAYOUTS_OF["no_overlap"])
def test_overlapped_communication_changes_nothing(trained: TrainedBy, layout: str) -> None:
    for one, other in zip(trained(layout, "adamw"), trained(layout, "no_overlap"), strict=True):
        np.testing.assert_allclose(one.losses, other.losses, rtol=1e-6)
        np.testing.assert_allclose(one.grad_norms, other.grad_norms, rtol=1e-6)
        for name, tensor in other.parameters.items():
            np.testing.assert_allclose(one.parameters[name], tensor, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("ahead", "alone"), [("300m", "nothing_ahead"), case("window", "window_nothing_ahead")])
def test_preparing_windows_ahead_changes_no_bit(trained: TrainedBy, ahead: str, alone: str) -> None:
    for one, other in zip(trained("TP2xPP2", ahead), trained("TP2xPP2", alone), strict=True):
        assert one.losses == other.losses
        assert one.grad_norms == other.grad_norms
        expect_equal(one.parameters, other.parameters)


@pytest.mark.parametrize("layout", LAYOUTS_OF["drop_path"])
def test_drop_path_draws_do_not_depend_on_the_layout(trained: TrainedBy, layout: str) -> None:
    for found in trained(layout, "drop_path"):
        np.testing.assert_allclose(found.losses, trained("1", "drop_path")[0].losses, rtol=1e-5)


@pytest.mark.parametrize("scenario", map(case, ("drop_path_otherwise", "drop_path_by_layer")))
def test_drop_path_draws_do_not_depend_on_windows_chunks_and_recomputation(trained: TrainedBy, scenario: str) -> None:
    for found in trained("TP2xPP2", scenario):
        np.testing.assert_allclose(found.losses, trained("1", "drop_path")[0].losses, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS_OF["drop_path_off"])
def test_evaluation_has_no_drop_path(trained: TrainedBy, reference: Reference, layout: str) -> None:
    wanted = reference(layout, "drop_path_off").evaluation  # transformers' model has no drop path at all
    for found in trained(layout, "drop_path_off"):
        np.testing.assert_allclose(found.evaluation, wanted, rtol=1e-5)


def test_drop_path_drops(trained: TrainedBy) -> None:
    assert abs(trained("1", "drop_path")[0].losses[0] - trained("1", "300m")[0].losses[0]) > 1e-4


@pytest.mark.parametrize("layout", LAYOUTS_OF["bf16"])
def test_bf16_stays_near_fp32(trained: TrainedBy, layout: str) -> None:
    wanted = trained("1", "adamw")[0]
    for found in trained(layout, "bf16"):
        assert found.losses != wanted.losses, "bf16 was not used"
        np.testing.assert_allclose(found.losses, wanted.losses, rtol=0.01)
        np.testing.assert_allclose(found.grad_norms, wanted.grad_norms, rtol=0.05)
