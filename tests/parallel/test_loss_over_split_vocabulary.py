"""The weighted loss of a vocabulary split over ranks, behind the output layer and in chunks together with it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from internvl_megatron.ranks import RankInfo

pytestmark = pytest.mark.parallel

NUM_TOKENS, HIDDEN_SIZE, VOCAB_SIZE, PADDED_SIZE = 16, 8, 600, 1024
CHUNKS = (None, 1, 4, 100)
FACTOR = -0.37
"""Of the gradient that comes back to the loss."""


@dataclass(frozen=True)
class Inputs:
    """What the loss is computed from, over the real vocabulary."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    """Some are ignored."""
    weights: torch.Tensor


def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, VOCAB_SIZE, (NUM_TOKENS,), generator=generator)
    targets[::3] = -100
    return Inputs(
        hidden=2 * torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=generator),
        weight=2 * torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator),
        targets=targets,
        weights=torch.rand(NUM_TOKENS, generator=generator) * (targets >= 0),
    )


def loss_on_rank(info: RankInfo) -> tuple[float, np.ndarray]:
    """Loss and this rank's part of the logits' gradient; padding columns are -inf."""
    from internvl_megatron.device import open_device
    from internvl_megatron.model.loss import cross_entropies, weighted_sum
    from internvl_megatron.ranks import joined

    device = open_device("cpu")
    with joined(info, device, 60):
        given = inputs()
        padded = F.pad(given.hidden @ given.weight.t(), (0, PADDED_SIZE - VOCAB_SIZE), value=float("-inf"))
        mine = padded.chunk(info.world_size, dim=1)[info.rank][:, None].clone().requires_grad_()
        assert dist.group.WORLD is not None
        loss, _ = weighted_sum(cross_entropies(mine, given.targets, dist.group.WORLD), given.weights)
        loss.backward()
        assert mine.grad is not None
        return loss.item(), mine.grad[:, 0].numpy()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_loss_equals_that_over_the_real_vocabulary(run_ranks: Callable[..., list[Any]], num_ranks: int) -> None:
    given = inputs()
    logits = (given.hidden @ given.weight.t()).requires_grad_()
    wanted = (F.cross_entropy(logits, given.targets, ignore_index=-100, reduction="none") * given.weights).sum()
    wanted.backward()
    assert logits.grad is not None
    results = run_ranks(loss_on_rank, num_ranks)
    np.testing.assert_allclose([loss for loss, _ in results], wanted.item(), rtol=1e-6)
    gradient = np.concatenate([part for _, part in results], axis=1)
    np.testing.assert_allclose(gradient[:, :VOCAB_SIZE], logits.grad.numpy(), rtol=0, atol=1e-6)
    assert not gradient[:, VOCAB_SIZE:].any(), "padding columns get no gradient"


@dataclass
class Outcome:
    """What a rank found: the loss with and without gradients, its terms, and the gradients of its hidden states and rows."""

    loss: float
    loss_without_gradient: float
    terms: np.ndarray
    hidden: np.ndarray
    weight: np.ndarray | None


def output_layers(
    info: RankInfo, device: Any, sequence_parallel: bool, dtype: torch.dtype, sizes: tuple[int, int]
) -> Callable[[int | None], Any]:
    """Makes output layers of (hidden size, vocabulary size) over all ranks, by size of the chunks."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from internvl_megatron.model.layer_specs import shared_settings
    from internvl_megatron.model.output_layer import OutputLayer
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.parallel.layout import Layout

    groups = make_groups(Layout(info.world_size, 1, 1), device, 60).language
    config = TransformerConfig(
        num_layers=1,
        hidden_size=sizes[0],
        num_attention_heads=info.world_size,
        tensor_model_parallel_size=info.world_size,
        sequence_parallel=sequence_parallel,
        **shared_settings(dtype),
    )
    return lambda chunk_tokens: OutputLayer(config, sizes[1], groups, chunk_tokens)


def output_layer_on_rank(info: RankInfo, sequence_parallel: bool, trainable: bool) -> dict[int | None, Outcome]:
    """The output layer's loss over this rank's part of the vocabulary and, if so, from its slice of the sequence.

    By size of the chunks.
    """
    from internvl_megatron.device import open_device
    from internvl_megatron.ranks import joined

    device = open_device("cpu")
    with joined(info, device, 60):
        layer = output_layers(info, device, sequence_parallel, torch.float32, (HIDDEN_SIZE, VOCAB_SIZE))
        return {chunk_tokens: outcome_of(layer(chunk_tokens), trainable) for chunk_tokens in CHUNKS}


def outcome_of(layer: Any, trainable: bool) -> Outcome:
    from internvl_megatron.model.output_layer import Targets

    given, group = inputs(), layer.tp_group
    # Rows of the padding are anything but zero: they must not matter.
    rows = F.pad(given.weight, (0, 0, 0, PADDED_SIZE - VOCAB_SIZE), value=9.0)
    with torch.no_grad():
        layer.weight.copy_(rows.chunk(group.size())[group.rank()])
    layer.weight.requires_grad_(trainable)
    hidden = given.hidden.chunk(group.size())[group.rank()] if layer.config.sequence_parallel else given.hidden
    hidden = hidden[:, None].clone().requires_grad_()
    positions = (given.weights > 0).nonzero()[:, 0]
    targets = Targets(given.targets[positions], given.weights[positions])
    with torch.no_grad():
        evaluated = layer(hidden, positions, targets)
    loss, *terms = layer(hidden, positions, targets)
    (FACTOR * loss).backward()
    assert hidden.grad is not None
    gradient = layer.weight.grad
    return Outcome(
        loss=loss.item(),
        loss_without_gradient=evaluated[0].item(),
        terms=np.array([term.item() for term in terms]),
        hidden=hidden.grad[:, 0].numpy(),
        weight=None if gradient is None else gradient.numpy(),
    )


@pytest.mark.parametrize(("num_ranks", "sequence_parallel"), [(1, False), (2, False), (2, True), (4, True)])
def test_output_layer_with_loss_equals_plain_pytorch(
    run_ranks: Callable[..., list[Any]], num_ranks: int, sequence_parallel: bool
) -> None:
    """On four ranks the third has padding among its columns, and the last nothing else."""
    given = inputs()
    hidden, weight = given.hidden.double().requires_grad_(), given.weight.double().requires_grad_()
    losses = F.cross_entropy(hidden @ weight.t(), given.targets, ignore_index=-100, reduction="none")
    terms = losses * given.weights.double()
    wanted = terms.sum()
    (FACTOR * wanted).backward()
    assert hidden.grad is not None
    assert weight.grad is not None

    by_rank = run_ranks(output_layer_on_rank, num_ranks, sequence_parallel, True)
    for chunk_tokens in CHUNKS:
        found: list[Outcome] = [outcomes[chunk_tokens] for outcomes in by_rank]
        for one in found:
            np.testing.assert_allclose([one.loss, one.loss_without_gradient], wanted.item(), rtol=1e-6)
            np.testing.assert_allclose(one.terms, terms[given.weights > 0].detach().numpy(), rtol=1e-5)
        parts = [one.hidden for one in found]
        for gradient in [np.concatenate(parts)] if sequence_parallel else parts:
            assert_near(gradient, hidden.grad)
        rows = np.concatenate([one.weight for one in found if one.weight is not None])
        assert_near(rows[:VOCAB_SIZE], weight.grad)
        assert not rows[VOCAB_SIZE:].any(), "padding rows get no gradient"


def test_frozen_output_layer_passes_gradients_on(run_ranks: Callable[..., list[Any]]) -> None:
    frozen, trained = (run_ranks(output_layer_on_rank, 2, True, trainable) for trainable in (False, True))
    for rank, outcomes in enumerate(frozen):
        for chunk_tokens, one in outcomes.items():
            assert one.weight is None
            np.testing.assert_array_equal(one.hidden, trained[rank][chunk_tokens].hidden)


def logits_on_rank(info: RankInfo) -> list[tuple[np.ndarray, list[int]]]:
    """What answers are chosen from, without gradients, and the rows of the weights it was multiplied with: as on a CPU, and as on a
    GPU."""
    from internvl_megatron.device import open_device
    from internvl_megatron.model import output_layer
    from internvl_megatron.ranks import joined

    device, given, found = open_device("cpu"), inputs(), list[tuple[np.ndarray, list[int]]]()
    multiply = F.linear
    with joined(info, device, 60):
        layer = output_layers(info, device, False, torch.float32, (HIDDEN_SIZE, VOCAB_SIZE))(None)
        rows = F.pad(given.weight, (0, 0, 0, PADDED_SIZE - VOCAB_SIZE), value=9.0)
        for whole in (False, True):
            widths: list[int] = []
            output_layer.likes_whole_widths = lambda _, whole=whole: whole
            F.linear = lambda x, weight, *rest, widths=widths: (
                widths.append(len(weight)),
                multiply(x, weight, *rest),
            )[1]
            with torch.no_grad():
                layer.weight.copy_(rows.chunk(info.world_size)[info.rank])
                found.append((layer(given.hidden[:, None])[:, 0].numpy(), widths))
    return found


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_logits_without_gradients_are_the_same_with_and_without_padding(
    run_ranks: Callable[..., list[Any]], num_ranks: int
) -> None:
    given, by_rank = inputs(), run_ranks(logits_on_rank, num_ranks)
    wanted = (given.hidden @ given.weight.t()).numpy()
    part = PADDED_SIZE // num_ranks
    for way in range(2):
        logits = np.concatenate([found[way][0] for found in by_rank], axis=1)
        np.testing.assert_allclose(logits[:, :VOCAB_SIZE], wanted, rtol=1e-5, atol=1e-5)
        assert logits.shape == (NUM_TOKENS, PADDED_SIZE)
        assert np.isneginf(logits[:, VOCAB_SIZE:]).all()
        real = [min(max(0, VOCAB_SIZE - rank * part), part) for rank in range(num_ranks)]
        assert [found[way][1] for found in by_rank] == [[part if way else width] for width in real]


def assert_near(found: np.ndarray, wanted: torch.Tensor) -> None:
    """1e-6 of the tensor's norm."""
    assert np.linalg.norm(found - wanted.numpy()) <= 1e-6 * float(wanted.norm())


def extra_bytes(info: RankInfo, dtype: torch.dtype) -> dict[int | None, int]:
    """Peak bytes of loss and backward beyond hidden states, weight and their gradients, by size of the chunks.

    The 8B's output layer on two tensor-parallel ranks, a row of 32K positions of which 1K at a time, all of it a 32nd.
    """
    from internvl_megatron.device import open_device
    from internvl_megatron.model.output_layer import Targets
    from internvl_megatron.ranks import joined
    from tools.tensor_bytes import TensorBytes

    device, (num_tokens, chunk_tokens), sizes = open_device("cpu"), (1024, 32), (112, 4700)
    found = {}
    with joined(info, device, 60):
        make_layer = output_layers(info, device, False, dtype, sizes)
        for size in (None, chunk_tokens):
            layer = make_layer(size)
            torch.nn.init.normal_(layer.weight, std=0.1)
            hidden = torch.randn(num_tokens, 1, sizes[0], dtype=dtype, requires_grad=True)
            targets = Targets(torch.randint(sizes[1], (num_tokens,)), torch.rand(num_tokens))
            account = TensorBytes()
            with account.in_this_thread():
                layer(hidden, None, targets)[0].backward()
            found[size] = account.peak - 2 * (hidden.nbytes + layer.weight.nbytes)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_take_an_eighth_of_the_memory(run_ranks: Callable[..., list[Any]], dtype: torch.dtype) -> None:
    for found in run_ranks(extra_bytes, 2, dtype):
        whole, in_chunks = found.values()
        assert in_chunks <= whole / 8
