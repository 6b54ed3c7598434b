"""Linear layers whose products see what FP8 hardware would: operands are rounded to FP8, multiplied in the run's dtype.

Names, sharding, initialisation and checkpoints are those of the layers they derive from. Shapes: M rows (tokens), K inputs and
N outputs of this rank's part of the weight [N, K].
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from internvl_megatron.model.fp8_format import Kind, Recipe, rounded
from internvl_megatron.model.fp8_history import LayerAmax


class Rounding:
    """How a layer's operands are rounded."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe: Recipe = recipe
        self.amax: LayerAmax | None = None
        """Of `delayed`; given to the layer when the whole model is known."""

    def __call__(self, values: Tensor, kind: Kind, summed_dim: Any) -> Tensor:
        """An operand [R, C] of a product that sums over one of its dimensions."""
        if self.recipe != "delayed":
            return rounded(values, self.recipe, kind, summed_dim)
        assert self.amax is not None, "a layer with delayed scaling was given no history"
        return rounded(values, self.recipe, kind, summed_dim, self.amax.scaling_for(kind))

    def note(self, kind: Kind, values: Tensor) -> None:
        """Look at an operand before it is rounded."""
        if self.amax is not None:
            self.amax.note(kind, values)


class _Product(torch.autograd.Function):
    """x w^T and its two gradients, each from operands rounded for the product they are in.

    Where scales belong to blocks, a tensor is rounded anew along the dimension that the product sums over: the weight's
    gradient sums over tokens. Where a tensor has one scale the values are the same in all products.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, rounding: Rounding, training: bool) -> Tensor:
        """[.., K] and [N, K] to [.., N]; an evaluation (not `training`) leaves no trace in the histories."""
        ctx.save_for_backward(values, weight)
        ctx.rounding = rounding
        rows = values.flatten(0, -2)
        if training:
            rounding.note("input", rows)
            rounding.note("weight", weight)
        output = rounding(rows, "input", 1) @ rounding(weight, "weight", 1).t()
        return output.unflatten(0, values.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """[.., N] to [.., K] and [N, K]."""
        values, weight = ctx.saved_tensors
        rounding: Rounding = ctx.rounding
        gradient = gradients[0].flatten(0, -2)
        rounding.note("gradient", gradient)
        of_values = of_weight = None
        if ctx.needs_input_grad[0]:
            of_values = rounding(gradient, "gradient", 1) @ rounding(weight, "weight", 0)
            of_values = of_values.view_as(values)
        if ctx.needs_input_grad[1]:
            of_weight = rounding(gradient, "gradient", 0).t() @ rounding(values.flatten(0, -2), "input", 0)
        return of_values, of_weight, None, None


class Fp8ColumnParallelLinear(ColumnParallelLinear):
    """Split along its outputs; N is this rank's part, M the whole sequence also under sequence parallelism."""

    def __init__(self, *args: Any, recipe: Recipe, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rounding = Rounding(recipe)

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        del args
        return _local_product(self, input, weight, kwargs)


class Fp8RowParallelLinear(RowParallelLinear):
    """Split along its inputs; K is this rank's part. What the ranks have is summed in the run's dtype."""

    def __init__(self, *args: Any, recipe: Recipe, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rounding = Rounding(recipe)

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        del args
        return _local_product(self, input, weight, kwargs)


class Fp8Linear(torch.nn.Linear):
    """A linear layer with bias that is whole on every rank: the projector's."""

    def __init__(self, *args: Any, recipe: Recipe, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rounding = Rounding(recipe)

    def forward(self, input: Tensor) -> Tensor:
        """[.., K] to [.., N]."""
        output: Any = _Product.apply(input, self.weight, self.rounding, self.training)
        return output + self.bias


def _local_product(layer: Any, values: Tensor, weight: Tensor, settings: dict[str, Any]) -> Tensor:
    """What Megatron Core's own product does around the multiplication, by the settings its layers hand over."""
    group = settings["tp_group"]
    if settings["sequence_parallel"]:
        values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=True, group=group)
    elif settings["allreduce_dgrad"]:
        values = copy_to_tensor_model_parallel_region(values, group=group)
    output: Any = _Product.apply(values, weight, layer.rounding, layer.training)
    return output if settings["bias"] is None else output + settings["bias"]
