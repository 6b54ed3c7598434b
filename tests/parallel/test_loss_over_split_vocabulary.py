"""The weighted loss of a vocabulary split over two ranks, with padding columns on the second."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from internvl_megatron.ranks import RankInfo

pytestmark = pytest.mark.parallel

NUM_TOKENS, VOCAB_SIZE, PADDED_SIZE = 12, 70, 128


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits over the real vocabulary, targets (some ignored) and weights."""
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(NUM_TOKENS, VOCAB_SIZE, generator=generator)
    targets = torch.randint(0, VOCAB_SIZE, (NUM_TOKENS,), generator=generator)
    targets[::3] = -100
    return logits, targets, torch.rand(NUM_TOKENS, generator=generator) * (targets >= 0)


def loss_on_rank(info: RankInfo) -> tuple[float, np.ndarray]:
    """Loss and this rank's part of the logits' gradient; padding columns are -inf."""
    from internvl_megatron.device import open_device
    from internvl_megatron.model.loss import weighted_loss
    from internvl_megatron.ranks import joined

    device = open_device("cpu")
    with joined(info, device, 60):
        logits, targets, weights = inputs()
        padded = F.pad(logits, (0, PADDED_SIZE - VOCAB_SIZE), value=float("-inf"))
        mine = padded.chunk(info.world_size, dim=1)[info.rank][:, None].clone().requires_grad_()
        assert dist.group.WORLD is not None
        loss = weighted_loss(mine, targets, weights, dist.group.WORLD)
        loss.backward()
        assert mine.grad is not None
        return loss.item(), mine.grad[:, 0].numpy()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_loss_equals_that_over_the_real_vocabulary(run_ranks: Callable[..., list[Any]], num_ranks: int) -> None:
    logits, targets, weights = inputs()
    logits.requires_grad_()
    wanted = (F.cross_entropy(logits, targets, ignore_index=-100, reduction="none") * weights).sum()
    wanted.backward()
    assert logits.grad is not None
    results = run_ranks(loss_on_rank, num_ranks)
    np.testing.assert_allclose([loss for loss, _ in results], wanted.item(), rtol=1e-6)
    gradient = np.concatenate([part for _, part in results], axis=1)
    np.testing.assert_allclose(gradient[:, :VOCAB_SIZE], logits.grad.numpy(), rtol=0, atol=1e-6)
    assert not gradient[:, VOCAB_SIZE:].any(), "padding columns get no gradient"
