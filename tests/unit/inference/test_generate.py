"""Generation equals transformers', which computes every step from the start, whatever shares the row and the cache."""

import numpy as np
import pytest
from PIL import Image

from internvl_megatron.data.positions import STRIDES
from internvl_megatron.inference.prompt import Prompt
from internvl_megatron.launcher import RankFailedError, launch
from tests.unit.inference.generation_ranks import cached_logits, compare

MAX_NEW_TOKENS = 9


@pytest.fixture
def picture(tmp_path):
    """Writes a picture of `squares` 28-pixel squares side by side and returns its path."""

    def make(name, squares):
        pixels = np.random.default_rng(len(name) + squares).integers(0, 256, (28, 28 * squares, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
        return str(tmp_path / name)

    return make


@pytest.fixture
def prompts(picture):
    one, two, three = (picture(f"{'x' * n}.png", n) for n in (1, 2, 3))
    return [
        Prompt("how many?"),
        Prompt("what is in the picture?", (one,)),
        Prompt("<image>\nthere are three digits in the picture: seven, two and one. how many?", (three,)),
        Prompt("seven " * 40, system=""),
        Prompt("how many in <image> and how many in <image>?", (two, one)),
        Prompt("which is it?", (one, two)),
        Prompt("user", system="seven, two and one"),
        Prompt("two", (three,), system=""),
        Prompt(
            "and <image>?", (one, two), history=(("<image> how many?", "there are two"), ("so?", "two")), system=""
        ),
        Prompt("how many?", (two,), answer_start="there are "),
    ]


@pytest.mark.parallel
@pytest.mark.parametrize(("family", "numerator"), [("300m", 256), ("6b", 64)])
def test_equals_transformers(prompts, family, numerator):
    (answers,) = launch(compare, 1, family, prompts, MAX_NEW_TOKENS, numerator)
    assert answers.ours == answers.reference
    assert answers.alone == answers.reference
    assert len(set(answers.reference)) > len(prompts) // 2, "the random model answers everything alike"
    assert len(set(answers.reference_lengths)) > 2, "answers should end at different lengths"
    assert max(answers.reference_lengths) == MAX_NEW_TOKENS
    assert answers.longest_row <= 220
    assert max(answers.vision_batches) == 3 and sum(answers.vision_batches) == 1 + 4 + (3 + 1) * 2 + 4 + (1 + 3) + 3
    assert answers.num_rounds < sum(answers.reference_lengths) / 2, "prompts should share rows"
    assert answers.modes == [False, False]


@pytest.mark.parallel
def test_cached_scores_equal_those_of_whole_sequences_at_every_stride(prompts):
    """Three sequences at a time, so that some enter while others are under way."""
    (differences,) = launch(cached_logits, 1, prompts[:5], 5, list(STRIDES))
    assert len(differences) == 9
    assert max(largest for largest, _ in differences) < 1e-4
    assert min(highest for _, highest in differences) > 1, "the model says something"


@pytest.mark.parallel
def test_a_prompt_longer_than_the_row_gets_a_row_of_its_own(picture):
    prompts = [Prompt("how many?"), Prompt("x" * 500, (picture("a.png", 1),)), Prompt("two")]
    (answers,) = launch(compare, 1, "300m", prompts, 3, 256)
    assert answers.ours == answers.reference
    assert answers.longest_row > 500


@pytest.mark.parallel
def test_no_prompts():
    (answers,) = launch(compare, 1, "300m", [], 3, 256)
    assert (answers.ours, answers.num_rounds) == ([], 0)


@pytest.mark.parallel
@pytest.mark.parametrize(
    ("prompt", "limit", "numerator", "message"),
    [
        (Prompt("<image> <image>", ("missing.png",)), 3, 256, "image missing.png: file not found"),
        (Prompt("<image>"), 3, 256, "1 <image> in the human turns but 0 image"),
        (Prompt("x"), 0, 256, "max_new_tokens: must be at least 1, not 0"),
        (Prompt("x"), 3, 0, "v2pe_numerator: must be 1 to 256"),
    ],
)
def test_wrong_input(prompt, limit, numerator, message):
    with pytest.raises(RankFailedError, match=message):
        launch(compare, 1, "300m", [prompt], limit, numerator)
