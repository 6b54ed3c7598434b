"""Cross entropy of every position by itself, for losses that are not a weighted sum known beforehand.

As `chunked_loss`, positions go through chunk by chunk and the logits of a whole row never exist. There backward only needs a
factor; here it brings one for every position, which the weight's gradient, a sum over positions, could not take up
afterwards: backward computes the logits again. What the whole vocabulary says of a position, the logarithm of its sum, is
kept, so backward sends no messages but the sum of the hidden states' gradients.

Shapes as in `chunked_loss`.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from internvl_megatron.device import add_product
from internvl_megatron.model.chunked_loss import LOWEST, gather_parts


def chunked_token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    tensor_group: dist.ProcessGroup,
    num_real_columns: int,
    chunk_tokens: int,
) -> Tensor:
    """Cross entropy of every position, fp32 [n].

    Collective over the tensor-parallel ranks, which have the same n; the gradient of the hidden states is summed over them.

    Args:
        hidden: [n, D], the same on all tensor-parallel ranks; n > 0.
        weight: [V', D], this rank's rows of the output layer.
        targets: int64 [n], the token each position predicts; anything below 0 is read as token 0.
        tensor_group: group over which the vocabulary is split.
        num_real_columns: rows of `weight` that stand for tokens; those after them are padding.
        chunk_tokens: positions whose logits exist at the same time.
    """
    losses = _ChunkedTokenLosses.apply(hidden, weight, targets, tensor_group, num_real_columns, chunk_tokens)
    assert isinstance(losses, Tensor), "autograd functions return what their forward returns"
    return losses


class _ChunkedTokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        tensor_group: dist.ProcessGroup,
        num_real_columns: int,
        chunk_tokens: int,
    ) -> Tensor:
        """The losses."""
        local_targets = targets.clamp(min=0) - tensor_group.rank() * len(weight)
        is_here = (local_targets >= 0) & (local_targets < len(weight))
        columns = local_targets.clamp(0, len(weight) - 1)
        log_sums = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        losses = torch.empty_like(log_sums)
        for first in range(0, len(hidden), chunk_tokens):
            chunk = slice(first, first + chunk_tokens)
            logits = _logits(hidden[chunk], weight, num_real_columns)
            target = logits.gather(1, columns[chunk, None])[:, 0] * is_here[chunk]
            # Ranks with nothing but padding add e^LOWEST, which is 0 beside any other.
            parts = gather_parts(torch.stack([logits.logsumexp(dim=1), target]), tensor_group)
            log_sums[chunk] = parts[:, 0].logsumexp(dim=0)
            losses[chunk] = log_sums[chunk] - parts[:, 1].sum(dim=0)
        ctx.save_for_backward(hidden, weight, columns, is_here, log_sums)
        ctx.tensor_group, ctx.num_real_columns, ctx.chunk_tokens = tensor_group, num_real_columns, chunk_tokens
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Softmax minus one at the target, times what comes back to the position."""
        hidden, weight, columns, is_here, log_sums = ctx.saved_tensors
        hidden_learns, weight_learns, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if hidden_learns else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if weight_learns else None
        for first in range(0, len(hidden), ctx.chunk_tokens):
            chunk = slice(first, first + ctx.chunk_tokens)
            grad_logits = _logits(hidden[chunk], weight, ctx.num_real_columns).sub_(log_sums[chunk, None]).exp_()
            grad_logits.scatter_add_(1, columns[chunk, None], -is_here[chunk, None].float())
            grad_logits = grad_logits.mul_(grad_outputs[0][chunk, None]).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                add_product(grad_weight, grad_logits.t(), hidden[chunk])
        if grad_hidden is not None and ctx.tensor_group.size() > 1:
            dist.all_reduce(grad_hidden, group=ctx.tensor_group)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), *(None,) * 4


def _logits(hidden: Tensor, weight: Tensor, num_real_columns: int) -> Tensor:
    """fp32 [c, V'], padding far below all others."""
    logits = (hidden @ weight.t()).float()
    logits[:, num_real_columns:] = LOWEST
    return logits
