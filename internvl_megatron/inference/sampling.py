"""How the next token is chosen: the most likely one, or a draw that depends on a request's seed and the step alone.

Scores are filtered as transformers' logits processors do it, and in their order: repetition penalty, temperature, top-k, top-p.

Shapes: n sequences, V vocabulary, s tokens of a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from internvl_megatron.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = 0.0
    """Scores are divided by it; 0 = always the most likely token."""
    top_k: int = 0
    """Draw from so many most likely tokens (and those that tie with the last of them); 0 = from all."""
    top_p: float = 1.0
    """Draw from the most likely tokens that have this probability between them."""
    seed: int = 0
    """Of all draws."""
    repetition_penalty: float = 1.0
    """Scores of tokens that the prompt or the answer has already are divided by it, or multiplied if below 0; 1 = off."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: with a line for each that is out of its range.
        """
        problems = []
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"temperature: must be 0 (the most likely token) or more, not {self.temperature}")
        if self.top_k < 0:
            problems.append(f"top_k: must be 0 (all tokens) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p: must be above 0 and at most 1 (all tokens), not {self.top_p}")
        if self.seed < 0:
            problems.append(f"seed: must be 0 or more, not {self.seed}")
        if not 0 < self.repetition_penalty < float("inf"):
            problems.append(f"repetition_penalty: must be above 0 (1 = off), not {self.repetition_penalty}")
        if problems:
            raise ConfigError("\n".join(problems))

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    def seed_of(self, number: int, own_seed: int | None) -> tuple[int, ...]:
        """What a request's draws depend on, beside the step.

        Args:
            number: place of the request among those of the call.
            own_seed: the request's own seed, in place of its number; None = it has none.
        """
        return (self.seed, 0, number) if own_seed is None else (self.seed, 1, own_seed)


GREEDY = Sampling()
"""The most likely token at every step."""


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
