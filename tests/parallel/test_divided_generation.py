"""Answers under every layout are those of transformers, token for token up to its first close call."""

from itertools import takewhile

import numpy as np
import pytest
from PIL import Image

from internvl_megatron.inference.prompt import Prompt
from tests.unit.inference.generation_ranks import answer_divided

pytestmark = pytest.mark.parallel

MARGIN = 1e-3
MAX_NEW_TOKENS = 8


@pytest.fixture
def prompts(tmp_path):
    """Eight of different lengths, with 0 to 3 images of 1 to 4 tiles; where there are three, each has one tile."""
    pictures = []
    for squares in (1, 2, 3):
        pixels = np.random.default_rng(squares).integers(0, 256, (28, 28 * squares, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{squares}.png")
        pictures.append(str(tmp_path / f"{squares}.png"))
    one, two, three = pictures
    return [
        Prompt("how many?"),
        Prompt("what is in the picture?", (one,)),
        Prompt("how many in <image>, in <image> and in <image>?", (one, one, one)),
        Prompt("seven " * 40, system=""),
        Prompt("two", (three,), system=""),
        Prompt("which is it?", (one, two)),
        Prompt("user", history=(("one?", "two"),)),
        Prompt("there are three digits in the picture: seven, two and one. how many?", (three,)),
    ]


@pytest.mark.parametrize(
    ("tensor", "pipeline", "num_ranks", "family"),
    [
        pytest.param(2, 1, 2, "300m", marks=pytest.mark.slow),
        pytest.param(1, 2, 2, "300m", marks=pytest.mark.slow),
        (2, 2, 4, "300m"),
        (1, 1, 2, "300m"),
        pytest.param(4, 1, 4, "6b", marks=pytest.mark.slow),
        pytest.param(1, 3, 3, "6b", marks=pytest.mark.slow),
        pytest.param(2, 1, 4, "6b", marks=pytest.mark.slow),
        pytest.param(2, 2, 8, "300m", marks=pytest.mark.slow),
    ],
)
def test_equals_transformers(run_ranks, prompts, tensor, pipeline, num_ranks, family):
    ranks = run_ranks(answer_divided, num_ranks, tensor, pipeline, prompts, MAX_NEW_TOKENS, family)
    first = ranks[0]
    for other in ranks[1:]:
        assert (other.together, other.alone, other.drawn) == (first.together, first.alone, first.drawn)
    clear = [len(list(takewhile(lambda margin: margin >= MARGIN, own))) for own in first.margins]
    assert sum(clear) >= 0.7 * sum(map(len, first.reference)), "too many close calls to see anything"
    for answers in (first.together, first.alone):
        cut = [list(ids[:count]) for ids, count in zip(answers, clear, strict=True)]
        assert cut == [ids[:count] for ids, count in zip(first.reference, clear, strict=True)]
    assert first.drawn != first.together
    # Of a replica's tiles every rank has encoded as many as the others, or one less.
    replica_ranks = [rank for rank in range(num_ranks) if rank // tensor % (num_ranks // tensor // pipeline) == 0]
    tiles = [ranks[rank].num_tiles for rank in replica_ranks]
    assert sum(rank.num_tiles for rank in ranks) == 1 + 3 + 4 + (1 + 3) + 4
    assert max(tiles) - min(tiles) <= len(prompts), "a difference of one at every admission"


@pytest.mark.slow
def test_draws_do_not_depend_on_the_layout(run_ranks, prompts):
    one = run_ranks(answer_divided, 1, 1, 1, prompts, MAX_NEW_TOKENS, "300m")[0]
    two = run_ranks(answer_divided, 2, 1, 2, prompts, MAX_NEW_TOKENS, "300m")[0]
    assert one.drawn == two.drawn
    assert len(set(one.drawn)) > 4
