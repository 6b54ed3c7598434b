"""Requests on their way into a row: their images encoded, their tokens as pieces."""

from collections.abc import Sequence

import numpy as np
import torch

from internvl_megatron.inference.requests import Request
from internvl_megatron.inference.stages import Piece, Stages


def embed(stages: Stages, requests: Sequence[Request]) -> None:
    """Encode the images of some requests, all tiles together.

    Raises:
        DataError: an image cannot be read.
    """
    with_images = [request for request in requests if request.rendered.images]
    if not with_images:
        return
    embeddings = iter(stages.encode([image for one in with_images for image in one.rendered.images]))
    for request in with_images:
        request.embeddings = torch.cat([next(embeddings) for _ in request.rendered.images])


def prompt_piece(request: Request, slot: int | None, wanted: np.ndarray) -> Piece:
    """A whole prompt."""
    rendered = request.rendered
    return Piece(
        slot,
        0,
        rendered.token_ids,
        rendered.positions,
        wanted,
        rendered.image_places if rendered.images else None,
        request.embeddings,
    )


def newest_piece(request: Request, slot: int) -> Piece:
    """The newest token of an answer, which has not been through the model yet."""
    return Piece(
        slot,
        request.num_cached,
        np.array(request.answer_ids[-1:]),
        request.rendered.next_positions(len(request.answer_ids) - 1, 1),
        np.zeros(1, dtype=np.int64),
    )
