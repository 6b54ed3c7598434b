"""Output layer and weighted cross entropy as one operation that never holds the logits of a whole row.

Positions go through chunk by chunk: logits of a chunk, what they add to the loss, and at once the gradients up to the factor
that backward will bring. So the logits are computed once, as in Liger Kernel's fused linear cross entropy
(arXiv 2410.10989), here with the vocabulary split over tensor-parallel ranks.

Shapes: n positions with a target, c of them in a chunk, D hidden size, V' this rank's part of the padded vocabulary, P
tensor-parallel ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from internvl_megatron.device import add_product

LOWEST = torch.finfo(torch.float32).min
"""In place of minus infinity, so that ranks with nothing but padding have a largest logit to subtract."""


def chunked_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    tensor_group: dist.ProcessGroup,
    num_real_columns: int,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Sum over positions of weight times cross entropy, an fp32 scalar; and its terms, fp32 [n], which have no gradient.

    The same as the output layer followed by `cross_entropies` and `weighted_sum`, in value and gradient. Collective over the
    tensor-parallel ranks, which have the same n; the gradient of the hidden states is summed over them.

    Args:
        hidden: [n, D], the same on all tensor-parallel ranks; n > 0.
        weight: [V', D], this rank's rows of the output layer.
        targets: int64 [n], the token each position predicts; anything below 0 is read as token 0 and needs weight 0.
        weights: fp32 [n]; they get no gradient.
        tensor_group: group over which the vocabulary is split.
        num_real_columns: rows of `weight` that stand for tokens; those after them are padding.
        chunk_tokens: positions whose logits exist at the same time.
    """
    if not torch.is_grad_enabled():  # which an autograd function's forward cannot see
        hidden, weight = hidden.detach(), weight.detach()
    found = _ChunkedLinearLoss.apply(hidden, weight, targets, weights, tensor_group, num_real_columns, chunk_tokens)
    assert isinstance(found, tuple), "autograd functions return what their forward returns"
    return found


class _ChunkedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        tensor_group: dist.ProcessGroup,
        num_real_columns: int,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        """The loss and its terms; keeps the gradients it would have if the loss were all there is."""
        hidden_learns, weight_learns, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if hidden_learns else None
        # Chunks add up in fp32, as one matrix product over all positions would.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if weight_learns else None
        local_targets = targets.clamp(min=0) - tensor_group.rank() * len(weight)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        terms = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for first in range(0, len(hidden), chunk_tokens):
            chunk = slice(first, first + chunk_tokens)
            logits = (hidden[chunk] @ weight.t()).float()
            logits[:, num_real_columns:] = LOWEST
            entropy = _CrossEntropy(logits, local_targets[chunk], tensor_group)
            loss += entropy.losses @ weights[chunk]
            torch.mul(entropy.losses, weights[chunk], out=terms[chunk])
            if grad_hidden is None and grad_weight is None:
                continue
            grad_logits = entropy.gradient(weights[chunk], hidden.dtype)
            del entropy, logits
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                add_product(grad_weight, grad_logits.t(), hidden[chunk])
        # Not among autograd's saved tensors: what moves those to the host would move these there and back at once.
        ctx.gradients = grad_hidden, grad_weight
        ctx.tensor_group, ctx.weight_dtype = tensor_group, weight.dtype
        ctx.mark_non_differentiable(terms)
        return loss, terms

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradients that forward has kept, times that of the loss."""
        assert ctx.gradients is not None, "the gradients of a loss are there once; compute the loss again"
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        summed = None
        if grad_hidden is not None:
            grad_hidden.mul_(grad_outputs[0])
            if ctx.tensor_group.size() > 1:
                summed = dist.all_reduce(grad_hidden, group=ctx.tensor_group, async_op=True)
        if grad_weight is not None:
            in_fp32, grad_weight = grad_weight, torch.empty_like(grad_weight, dtype=ctx.weight_dtype)
            torch.mul(in_fp32, grad_outputs[0], out=grad_weight)
        if summed is not None:
            summed.wait()
        return grad_hidden, grad_weight, *(None,) * 5


class _CrossEntropy:
    """Of some positions over the whole vocabulary, with as few passes over their logits as there can be."""

    def __init__(self, logits: Tensor, local_targets: Tensor, tensor_group: dist.ProcessGroup) -> None:
        """Find the losses; collective over the tensor-parallel ranks.

        Args:
            logits: fp32 [c, V'], which are overwritten.
            local_targets: int64 [c], counted from this rank's first column; outside of [0, V') they are on other ranks.
            tensor_group: group over which the vocabulary is split.
        """
        self._is_here = (local_targets >= 0) & (local_targets < logits.shape[1])
        self._columns = local_targets.clamp(0, logits.shape[1] - 1)[:, None]
        largest = logits.amax(dim=1)
        target = logits.gather(1, self._columns)[:, 0] * self._is_here
        self._exponentials = logits.sub_(largest[:, None]).exp_()
        # One message a chunk: each rank's sums are relative to its own largest logit.
        parts = gather_parts(torch.stack([largest, self._exponentials.sum(dim=1), target]), tensor_group)
        largest_of_all = parts[:, 0].amax(dim=0)
        total = (parts[:, 1] * (parts[:, 0] - largest_of_all).exp()).sum(dim=0)
        self._factors = (largest - largest_of_all).exp() / total
        self.losses = total.log() - (parts[:, 2].sum(dim=0) - largest_of_all)
        """fp32 [c]."""

    def gradient(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """Of the losses' sum by these weights [c], with regard to the logits: [c, V']; in fp32 it takes the logits' place."""
        at_target = self._exponentials.gather(1, self._columns)[:, 0] * self._factors - self._is_here.float()
        in_place = dtype == self._exponentials.dtype
        gradient = self._exponentials if in_place else torch.empty_like(self._exponentials, dtype=dtype)
        torch.mul(self._exponentials, (self._factors * weights)[:, None], out=gradient)
        return gradient.scatter_(1, self._columns, (at_target * weights).to(dtype)[:, None])


def gather_parts(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The parts of all ranks, [P, ...]."""
    parts = part.new_empty(group.size(), *part.shape)
    dist.all_gather(list(parts), part, group=group)
    return parts
