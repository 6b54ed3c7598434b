"""Choosing tokens: filters against transformers' own, draws against the probabilities they stand for."""

from typing import Any, cast

import numpy as np
import pytest
import torch

from internvl_megatron.errors import ConfigError
from internvl_megatron.inference.sampling import choose_tokens, draw, filtered, penalised
from internvl_megatron.inference.settings import GREEDY, Sampling

VOCABULARY = 60


@pytest.fixture
def scores():
    """[8, V]: from nearly flat to very peaked."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(8, VOCABULARY, generator=generator) * torch.logspace(-1, 1.5, 8)[:, None]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_k=5),
        Sampling(temperature=0.6, top_p=0.95),
        Sampling(temperature=2.0, top_k=20, top_p=0.5),
        Sampling(temperature=1.5, top_k=1000, top_p=1e-6),
        Sampling(temperature=1.0, top_k=1, top_p=0.9, repetition_penalty=1.3),
        Sampling(temperature=0.9, top_p=0.8, repetition_penalty=0.8),
    ],
)
def test_filters_are_those_of_transformers(scores, sampling):
    from transformers import GenerationConfig
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    assert GenerationConfig().top_p in (None, 1.0), "transformers filters nothing unasked"
    seen = np.random.default_rng(1).integers(0, VOCABULARY, (8, 12))
    theirs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)])
    theirs.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        theirs.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        theirs.append(TopPLogitsWarper(sampling.top_p))
    expected = theirs(cast(Any, torch.from_numpy(seen)), scores.clone())
    ours = filtered(penalised(scores, sampling.repetition_penalty, list(seen)), sampling)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert torch.isfinite(ours).any(dim=-1).all()


def test_draws_have_the_probabilities_of_the_filtered_scores(scores):
    sampling = Sampling(temperature=1.0, top_k=6)
    row = scores[3:4]
    expected = filtered(row, sampling).softmax(dim=-1)[0]
    num_draws = 20_000
    uniform = [draw(sampling.seed_of(number, None), 4) for number in range(num_draws)]
    drawn = choose_tokens(row.expand(num_draws, -1), sampling, uniform, [])
    shares = torch.bincount(drawn, minlength=VOCABULARY) / num_draws
    assert (shares[expected == 0] == 0).all()
    # Five standard deviations of a share of so many draws.
    assert ((shares - expected).abs() <= 5 * (expected * (1 - expected) / num_draws).sqrt() + 1e-9).all()


def test_edges_of_the_unit_interval_draw_tokens_that_can_be_drawn(scores):
    sampling = Sampling(temperature=1.0, top_k=3)
    for uniform in (0.0, 1 - 2**-53):
        chosen = choose_tokens(scores, sampling, [uniform] * 8, [])
        assert torch.isfinite(filtered(scores, sampling).gather(1, chosen[:, None])).all()


def test_draws_depend_on_seed_request_and_step_alone():
    seeds = [Sampling(seed=s).seed_of(n, own) for s in (0, 1) for n, own in ((0, None), (1, None), (0, 0), (0, 1))]
    numbers = {draw(seed, step) for seed in seeds for step in range(50)}
    assert len(numbers) == 400
    assert Sampling(seed=1).seed_of(5, 7) == Sampling(seed=1).seed_of(6, 7)
    assert draw((3, 0, 2), 9) == draw((3, 0, 2), 9)


def test_greedy_is_the_most_likely_and_a_penalty_counts(scores):
    best = scores.argmax(dim=-1)
    assert choose_tokens(scores, GREEDY, [], []).tolist() == best.tolist()
    seen = [np.array([token]) for token in best.tolist()]
    others = choose_tokens(scores, Sampling(repetition_penalty=1e6), [], seen)
    assert (others != best).all()


def test_values_out_of_range():
    with pytest.raises(ConfigError) as raised:
        Sampling(temperature=-1, top_k=-1, top_p=0, seed=-1, repetition_penalty=0)
    lines = str(raised.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["temperature", "top_k", "top_p", "seed", "repetition_penalty"]
    with pytest.raises(ConfigError, match="temperature"):
        Sampling(temperature=float("nan"))
