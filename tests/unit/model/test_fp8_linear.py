"""The three products of a linear layer against products of operands rounded by hand."""

from typing import Any

import pytest
import torch

from internvl_megatron.model.fp8_format import rounded
from internvl_megatron.model.fp8_history import AmaxHistories
from internvl_megatron.model.fp8_linear import Fp8Linear


def _layer(recipe: Any, histories: AmaxHistories | None = None) -> tuple[Fp8Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    layer = Fp8Linear(64, 128, recipe=recipe)
    if histories is not None:
        layer.rounding.amax = histories.of("layer")
    values = torch.randn(3, 32, 64) * torch.logspace(-3, 3, 64)
    gradient = torch.randn(3, 32, 128) * torch.logspace(-6, 0, 96).reshape(3, 32, 1)
    return layer, values.requires_grad_(), gradient


@pytest.mark.parametrize("recipe", ["current", "blockwise", "mxfp8"])
def test_products_see_rounded_operands(recipe: Any) -> None:
    layer, values, gradient = _layer(recipe)
    output = layer(values)
    output.backward(gradient)
    rows, flat, weight = values.detach().flatten(0, 1), gradient.flatten(0, 1), layer.weight.detach()
    product = rounded(rows, recipe, "input", 1) @ rounded(weight, recipe, "weight", 1).t()
    torch.testing.assert_close(output.detach().flatten(0, 1), product + layer.bias.detach(), rtol=1e-6, atol=1e-5)
    of_values = rounded(flat, recipe, "gradient", 1) @ rounded(weight, recipe, "weight", 0)
    torch.testing.assert_close(values.grad, of_values.view_as(values), rtol=1e-6, atol=1e-7)
    of_weight = rounded(flat, recipe, "gradient", 0).t() @ rounded(rows, recipe, "input", 0)
    torch.testing.assert_close(layer.weight.grad, of_weight, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, flat.sum(0))
    along_features = rounded(flat, recipe, "gradient", 1).t() @ rounded(rows, recipe, "input", 1)
    assert torch.equal(along_features, of_weight) == (recipe == "current"), "blocks lie along the summed dimension"


def test_without_rounding_it_is_torch_s_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("internvl_megatron.model.fp8_linear.rounded", lambda values, *_: values)
    layer, values, gradient = _layer("current")
    plain = torch.nn.Linear(64, 128)
    plain.load_state_dict(layer.state_dict())
    other = values.detach().clone().requires_grad_()
    layer(values).backward(gradient)
    plain(other).backward(gradient)
    torch.testing.assert_close(values.grad, other.grad)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)


def test_frozen_weights_get_no_gradient() -> None:
    layer, values, gradient = _layer("mxfp8")
    layer.requires_grad_(False)
    layer(values).backward(gradient)
    assert layer.weight.grad is None
    assert values.grad is not None


def test_a_nan_reaches_the_gradients() -> None:
    for recipe in ("current", "blockwise", "mxfp8"):
        layer, values, gradient = _layer(recipe)
        gradient[0, 0, 0] = float("nan")
        layer(values).backward(gradient)
        assert layer.weight.grad is not None
        assert layer.weight.grad.isnan().any()


def _note(histories: AmaxHistories, values: float, gradient: float) -> None:
    histories.of("layer").note("input", torch.tensor([[values, -values / 2]]))
    histories.of("layer").note("gradient", torch.tensor([[gradient]]))


@pytest.fixture
def end_step(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Without other ranks there is nothing to agree on."""
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_args, **_kwargs: None)
    return lambda histories: histories.end_step(None)


def test_the_largest_of_the_last_steps_decides(end_step: Any) -> None:
    histories = AmaxHistories(["layer"], 2, torch.device("cpu"))
    layer = histories.of("layer")
    assert float(layer.scaling_for("input")) == 0
    seen = []
    for step_values in ([3.0, 8.0, 1.0], [2.0], [1.0], [1.5]):
        for values in step_values:
            _note(histories, values, gradient=0.5)
        end_step(histories)
        seen.append((float(layer.scaling_for("input")), float(layer.scaling_for("weight"))))
    assert seen == [(8.0, 0.0), (8.0, 0.0), (2.0, 0.0), (1.5, 0.0)]
    assert float(layer.scaling_for("gradient")) == 0.5


def test_zeros_and_infinities_leave_the_history_as_it_is(end_step: Any) -> None:
    histories = AmaxHistories(["layer"], 3, torch.device("cpu"))
    for values in (4.0, 0.0, float("inf"), float("nan"), 2.0):
        _note(histories, values, gradient=1.0)
        end_step(histories)
    assert histories.past[0, :, 0].tolist() == [2.0, 4.0, 0.0]
    assert histories.past[0, :, 2].tolist() == [1.0, 1.0, 1.0]


def test_an_evaluation_leaves_no_trace(end_step: Any) -> None:
    histories = AmaxHistories(["layer"], 3, torch.device("cpu"))
    layer, values, gradient = _layer("delayed", histories)
    layer.eval()
    layer(values)
    end_step(histories)
    assert (histories.past == 0).all()
    layer.train()
    layer(values).backward(gradient)
    end_step(histories)
    expected = [float(tensor.detach().abs().max()) for tensor in (values, layer.weight, gradient)]
    assert histories.past[0, 0].tolist() == pytest.approx(expected)
