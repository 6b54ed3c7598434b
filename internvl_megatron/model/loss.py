"""Next-token loss as a weighted sum; nothing here divides.

InternVL3 (paper sec. 2.2) weights a token of a sample with l supervised tokens by 1/sqrt(l). The weights come with the
data; the global weight they are divided by is known on the host before the forward pass (`Step`).
"""

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor


def weighted_sum(losses: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over tokens of weight times loss, a scalar; and its terms [n], which have no gradient."""
    terms = losses * weights
    return terms.sum(), terms.detach()


def cross_entropies(logits: Tensor, targets: Tensor, tensor_group: torch.distributed.ProcessGroup) -> Tensor:
    """Cross entropy of every position, fp32 [n].

    Args:
        logits: [n, 1, V'], this rank's part of the vocabulary, of the positions that predict something.
        targets: int64 [n], the token each of them predicts; anything below 0 is read as token 0 and needs weight 0.
        tensor_group: group over which the vocabulary is split.
    """
    return vocab_parallel_cross_entropy(logits.float(), targets.clamp(min=0)[:, None], tp_group=tensor_group)[:, 0]
