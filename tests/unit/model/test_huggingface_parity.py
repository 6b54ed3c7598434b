"""One rank of our model equals transformers' `InternVLForConditionalGeneration` with the same weights."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from internvl_megatron.launcher import RankFailedError
from tests.support.forward import logits_of_rows, on_one_rank
from tests.support.layouts import run_config
from tests.support.models import huggingface_model, small_model
from tests.support.reference import images_of, normalized, our_tensors, row_logits
from tests.support.rows import IMAGE_TOKEN, StepData, random_step

LOGIT_TOLERANCE = 1e-4
FAMILIES = ["300m", "6b"]
ROWS = {"several images in one sample": 0, "a tile across the middle": 1, "text only": 2, "a full row": 3}
"""Rows of `random_step` with seed 0."""

Logits = tuple[list[np.ndarray], list[np.ndarray]]
"""Of all rows of a step, ours and theirs."""


@pytest.fixture(scope="module")
def logits(run_ranks: Callable[..., list[Any]]) -> dict[str, Logits]:
    """Logits of packed rows with fractional positions, by family."""
    result = {}
    for family in FAMILIES:
        model = small_model(family)
        reference, data = huggingface_model(model), random_step(model, num_rows=4, seed=0)
        weights = our_tensors(reference.state_dict(), model)
        (ours,) = run_ranks(on_one_rank, 1, run_config(model), weights, logits_of_rows, data)
        with torch.no_grad():
            theirs = [
                row_logits(reference, row, images_of(data, index)).numpy() for index, row in enumerate(data.rows)
            ]
        result[family] = ours, theirs
    return result


@pytest.mark.parallel
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_packed_rows(logits: dict[str, Logits], family: str, row: int) -> None:
    ours, theirs = logits[family]
    data = random_step(small_model(family), num_rows=4, seed=0)
    real, vocab_size = data.rows[row].num_tokens, theirs[row].shape[1]
    np.testing.assert_allclose(ours[row][:real, :vocab_size], theirs[row][:real], rtol=0, atol=LOGIT_TOLERANCE)
    assert np.isneginf(ours[row][:, vocab_size:]).all(), "padding of the vocabulary has probability zero"


@pytest.mark.parallel
@pytest.mark.parametrize("family", FAMILIES)
def test_v2pe_delta_1_equals_plain_positions(run_ranks: Callable[..., list[Any]], family: str) -> None:
    """An image row with delta 1 equals transformers called without any positions."""
    model = small_model(family)
    data = single_sample(random_step(model, num_rows=2, seed=0))
    reference = huggingface_model(model)
    weights = our_tensors(reference.state_dict(), model)
    (ours,) = run_ranks(on_one_rank, 1, run_config(model), weights, logits_of_rows, data)
    with torch.no_grad():
        theirs = reference(
            input_ids=torch.from_numpy(data.rows[0].token_ids).long()[None],
            pixel_values=normalized(np.concatenate(images_of(data, 0))),
            use_cache=False,
        ).logits[0]
    np.testing.assert_allclose(ours[0][:, : theirs.shape[1]], theirs.numpy(), rtol=0, atol=LOGIT_TOLERANCE)


def single_sample(data: StepData) -> StepData:
    """The first row as one sample with positions 0, 1, 2 .."""
    row = data.rows[0]
    length = len(row.token_ids)
    plain = replace(
        row,
        positions=np.arange(length, dtype=np.int32) * 256,
        segment_lengths=np.array([length], np.int32),
        sources=row.sources[:1],
    )
    assert (row.token_ids == IMAGE_TOKEN).any(), "the row has images"
    return StepData([plain], data.tiles)


def test_padded_vocabulary_rows_are_zero() -> None:
    model = small_model()
    ours = our_tensors(huggingface_model(model).state_dict(), model)
    for name in ("language.embedding.word_embeddings.weight", "language.output_layer.weight"):
        assert ours[name].shape[0] == 512
        assert not ours[name][model.language.vocab_size :].any(), f"{name} has zeros in its padding"


def test_weights_of_another_size_are_refused(run_ranks: Callable[..., list[Any]]) -> None:
    model = small_model()
    weights = our_tensors(huggingface_model(model).state_dict(), model)
    weights["vision.class_embedding"] = np.zeros(3, np.float32)
    with pytest.raises(RankFailedError, match=r"vision\.class_embedding: the weights have shape \(3,\)") as failed:
        run_ranks(on_one_rank, 1, run_config(model), weights, logits_of_rows, None)
    assert failed.value.failures[0].is_user_error
