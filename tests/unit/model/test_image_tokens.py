"""Putting image embeddings into a row."""

import pytest
import torch

from internvl_megatron.model.language import ImageTokens, insert_image_tokens, padded_vocab_size


def test_embeddings_replace_exactly_their_places() -> None:
    hidden = torch.randn(6, 1, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    embeddings = torch.randn(2, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    result = insert_image_tokens(hidden, ImageTokens(embeddings, torch.tensor([1, 4])))
    assert torch.equal(result[[1, 4], 0], embeddings)
    assert torch.equal(result[[0, 2, 3, 5]], hidden[[0, 2, 3, 5]])
    result.sum().backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad[:, 0, 0], torch.tensor([1.0, 0, 1, 1, 0, 1])), "placeholders get no gradient"
    assert embeddings.grad is not None
    assert torch.equal(embeddings.grad, torch.ones(2, 4))


@pytest.mark.parametrize("num_places", [1, 3])
def test_a_count_mismatch_is_an_error(num_places: int) -> None:
    images = ImageTokens(torch.zeros(2, 4), torch.arange(num_places))
    with pytest.raises(AssertionError, match=f"2 image embeddings for {num_places} image tokens"):
        insert_image_tokens(torch.zeros(6, 1, 4), images)


def test_the_vocabulary_is_padded_to_one_size_for_every_layout() -> None:
    assert padded_vocab_size(151_674) == 152_064
    assert padded_vocab_size(512) == 512
    assert padded_vocab_size(513) == 1024
