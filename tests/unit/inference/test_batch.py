"""Requests that join while others are under way get the tokens that each gets alone, whatever shares the batch."""

import numpy as np
import pytest
from PIL import Image

from internvl_megatron.inference.prompt import Prompt
from internvl_megatron.inference.settings import Generation, Limits, Sampling
from tests.unit.inference.batch_ranks import join

pytestmark = pytest.mark.parallel


@pytest.fixture
def asked(tmp_path):
    """Prompts of different lengths, with settings of their own."""
    pictures = []
    for squares in (1, 3):
        pixels = np.random.default_rng(squares).integers(0, 256, (28, 28 * squares, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{squares}.png")
        pictures.append(str(tmp_path / f"{squares}.png"))
    return [
        (Prompt("how many?"), Generation(12)),
        (Prompt("what is it?", (pictures[1],)), Generation(7, 256, Sampling(temperature=1.2, top_p=0.9, seed=5))),
        (Prompt("seven " * 30), Generation(9)),
        (Prompt("two", (pictures[0],)), Generation(11, 64, Sampling(temperature=0.8, top_k=20, seed=7))),
        (Prompt("what is it?", (pictures[1],)), Generation(7, 256, Sampling(temperature=1.2, top_p=0.9, seed=6))),
        (Prompt("how many?"), Generation(10, 256, Sampling(repetition_penalty=1.7))),
        (Prompt("user", seed=3), Generation(3, 256, Sampling(temperature=2.0))),
        (Prompt("one"), Generation(1)),
    ]


@pytest.mark.parametrize(
    ("tensor", "pipeline", "every", "limits"),
    [
        (1, 1, 2, Limits(max_sequences=3)),
        (1, 1, 1, Limits(cache_tokens=400)),
        pytest.param(1, 1, 1, Limits(), marks=pytest.mark.slow),
        pytest.param(2, 2, 2, Limits(max_sequences=3), marks=pytest.mark.slow),
    ],
)
def test_joining_equals_alone(run_ranks, asked, tensor, pipeline, every, limits):
    ranks = run_ranks(join, tensor * pipeline, tensor, pipeline, asked, limits, every, {})
    first = ranks[0]
    assert first.ids == [answer.token_ids for answer in first.alone]
    assert first.ends == [answer.end for answer in first.alone]
    assert first.texts == [answer.text for answer in first.alone]
    assert all(other.ids == first.ids and other.sizes == first.sizes for other in ranks)
    assert 1 < max(first.sizes) <= limits.max_sequences
    assert first.sizes[-1] == 0
    assert first.ids[1] != first.ids[4], "requests that differ in their seeds draw differently"


def test_dropped_requests_free_their_slots_and_disturb_nobody(run_ranks, asked):
    drops = {0: 3, 3: 1, 4: 0, 5: 2}
    (found,) = run_ranks(join, 1, 1, 1, asked, Limits(max_sequences=2), 1, drops)
    for number, (ids, end, answer) in enumerate(zip(found.ids, found.ends, found.alone, strict=True)):
        if number in drops:
            assert (ids, end) == (answer.token_ids[: drops[number]], None)
        else:
            assert (ids, end) == (answer.token_ids, answer.end)
    assert max(found.sizes) <= 2
    assert found.sizes[-1] == 0


def test_the_cache_shrinks_when_the_longest_has_left(run_ranks, asked):
    """What waits for room then has it: more sequences that are shorter."""
    in_order = [asked[number] for number in (2, 0, 3, 5, 7)]
    (found,) = run_ranks(join, 1, 1, 1, in_order, Limits(cache_tokens=250), 1, {})
    assert (2, 128) in found.rooms and (4, 64) in found.rooms
    assert all(slots * tokens <= 250 + 64 * slots for slots, tokens in found.rooms), (
        "room is in multiples of 64 tokens"
    )
    assert found.ids == [answer.token_ids for answer in found.alone]
