"""Steps are scored as transformers scores them one at a time, whatever shares the row."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from internvl_megatron.data.tokenizer import load_tokenizer
from internvl_megatron.inference.critic import Solution, verdict_tokens
from internvl_megatron.inference.prompt import Prompt
from internvl_megatron.launcher import launch
from tests.support.sentencepiece_folder import write_folder
from tests.unit.inference.critic_ranks import compare


@pytest.mark.parallel
def test_equals_transformers(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (28, 56, 3), dtype=np.uint8)
    picture = str(tmp_path / "two.png")
    Image.fromarray(pixels).save(picture)
    solutions = [
        Solution(Prompt("how many digits?"), "seven\n\ntwo\n\none\n\nthere are three"),
        Solution(Prompt("<image>\nhow many digits?", (picture,)), "there are two\n\n+ is not -\n\nthree"),
        Solution(Prompt("how many?", (picture,)), "two"),
        Solution(Prompt("how many?"), " \n\n"),
        Solution(Prompt("what is it?", (picture,)), "digits " * 60 + "\n\nso three"),
    ]
    steps = [
        ["seven", "two", "one\n\nthere are three"],
        ["there are two", "+ is not -", "three"],
        ["two"],
        [],
        [("digits " * 60).strip(), "so three"],
    ]
    (scores,) = launch(compare, 1, solutions, steps, 3)
    assert [len(own) for own in scores.ours] == [3, 3, 1, 0, 2]
    for own, wanted in zip(scores.ours, scores.reference, strict=True):
        np.testing.assert_allclose(own, wanted, atol=1e-5)
    assert scores.means == pytest.approx([np.mean(own) if own else 0.0 for own in scores.reference], abs=1e-5)
    assert np.ptp([score for own in scores.reference for score in own]) > 0.01, "the random model says the same of all"


@pytest.mark.parametrize("add_dummy_prefix", [True, False])
def test_verdicts_of_sentencepiece(tmp_path: Path, add_dummy_prefix: bool) -> None:
    """Their tokens are those behind a header, where no blank is put in front."""
    tokenizer = load_tokenizer(write_folder(tmp_path / "tokenizer", "control", add_dummy_prefix))
    plus, minus = verdict_tokens(tokenizer)
    assert [tokenizer.decode([token]) for token in (plus, minus)] == ["+", "-"]
