"""How the next token is chosen: the most likely one, or a draw that depends on a request's seed and the step alone.

Scores are filtered as transformers' logits processors do it, and in their order: repetition penalty, temperature, top-k, top-p.

Shapes: n sequences, V vocabulary, s tokens of a sequence.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from internvl_megatron.inference.settings import Sampling


def choose_tokens(logits: Tensor, sampling: Sampling, uniform: Sequence[float], seen: Sequence[np.ndarray]) -> Tensor:
    """The next token of every sequence, int64 [n].

    Args:
        logits: [n, V].
        sampling: how.
        uniform: a number from [0, 1) for every sequence (`draw`); not looked at where nothing is drawn.
        seen: int [s] for every sequence, the tokens that a repetition penalty is for.
    """
    scores = penalised(logits.float(), sampling.repetition_penalty, seen)
    if sampling.is_greedy:
        return scores.argmax(dim=-1)
    # In fp64: an fp32 sum over 150 000 tokens would leave out the unlikely ones.
    sums = filtered(scores, sampling).double().softmax(dim=-1).cumsum(dim=-1)
    drawn = torch.tensor(uniform, dtype=torch.float64).to(sums.device)[:, None] * sums[:, -1:]
    # The first token whose sum is above the number: never one of probability 0.
    return torch.searchsorted(sums, drawn, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def draw(seed: tuple[int, ...], step: int) -> float:
    """A number from [0, 1) for the `step`-th token of a request (`Sampling.seed_of`), whatever runs beside it."""
    return float(np.random.Generator(np.random.Philox(np.random.SeedSequence((*seed, step)))).random())


def penalised(scores: Tensor, penalty: float, seen: Sequence[np.ndarray]) -> Tensor:
    """Scores [n, V] with tokens that were seen made less likely (arXiv 1909.05858, sec. 4.1)."""
    if penalty == 1:
        return scores
    scores = scores.clone()
    for row, tokens in zip(scores, seen, strict=True):
        places = torch.from_numpy(np.unique(tokens).astype(np.int64)).to(scores.device)
        old = row[places]
        row[places] = torch.where(old < 0, old * penalty, old / penalty)
    return scores


def filtered(scores: Tensor, sampling: Sampling) -> Tensor:
    """Scores [n, V] over the temperature; those of tokens that are not drawn at -inf."""
    scores = scores / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        last = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < last, float("-inf"))
    if sampling.top_p < 1:
        ascending, order = scores.sort(dim=-1)
        left_out = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        left_out[:, -1] = False
        scores = scores.masked_fill(left_out.scatter(-1, order, left_out), float("-inf"))
    return scores
