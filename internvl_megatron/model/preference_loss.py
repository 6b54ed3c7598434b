"""Mixed Preference Optimization over pairs of a chosen and a rejected answer (MPO, arXiv 2411.10442; InternVL3 paper, sec. 2.3).

    L = w_p * preference + w_q * quality + w_g * generation

preference: DPO's sigmoid loss. quality: BCO's, which judges every answer by itself against a shift, the mean reward so far.
generation: cross entropy of the chosen answer. An answer's reward is beta times how much likelier the policy finds it than
the reference model does; log-probabilities are sums over an answer's tokens, not means.

Shapes: p pairs.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Rewards:
    """Rewards [p] of the chosen and of the rejected answers."""

    chosen: Tensor
    rejected: Tensor


def implicit_rewards(logprobs: Tensor, reference: Tensor, beta: float) -> Rewards:
    """Rewards of answers that take turns: chosen, rejected, chosen, ...

    Args:
        logprobs: [2p], of the policy.
        reference: [2p], of the reference model.
        beta: how far a factor of e between the two is worth moving.
    """
    pairs = (beta * (logprobs - reference)).view(-1, 2)
    return Rewards(pairs[:, 0], pairs[:, 1])


def preference_losses(rewards: Rewards) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7), [p]: minus log sigmoid of the chosen answer's lead."""
    return -F.logsigmoid(rewards.chosen - rewards.rejected)


def quality_losses(rewards: Rewards, shift: float) -> Tensor:
    """BCO (arXiv 2404.04656; trl's `bco_pair`), [p]: the chosen reward should be above the shift, the rejected one below."""
    return -F.logsigmoid(rewards.chosen - shift) - F.logsigmoid(shift - rewards.rejected)


@dataclass(frozen=True)
class RunningMean:
    """Mean of all numbers so far, each with the same weight; trl's `RunningMoments.mean`.

    The numbers are the means of each pair's two rewards. In trl a rank's micro-batch adds one, the mean of all its rewards. A
    packed row holds as many pairs as happen to fit, so here every pair counts as a micro-batch of one, as in InternVL3's
    runs (256 pairs on 256 GPUs): the mean does not depend on how a global batch is packed or shared out.
    """

    total: float = 0.0
    count: int = 0

    @property
    def value(self) -> float:
        """0 before the first number."""
        return self.total / self.count if self.count else 0.0

    def including(self, total: float, count: int) -> "RunningMean":
        """With so many numbers more that add up to `total`."""
        return RunningMean(self.total + total, self.count + count)
