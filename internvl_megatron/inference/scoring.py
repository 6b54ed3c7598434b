"""Scores of texts that are given: log-probabilities of continuations, and of some tokens where answers begin.

A prompt goes through the model once, whatever number of continuations it has: each of them gets a copy of its keys and values.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from internvl_megatron.data.conversation import answer_header, answer_places
from internvl_megatron.data.positions import UNITS_PER_POSITION
from internvl_megatron.errors import ConfigError
from internvl_megatron.inference.generate import Generator
from internvl_megatron.inference.pieces import embed, prompt_piece
from internvl_megatron.inference.prompt import Prompt
from internvl_megatron.inference.requests import Request
from internvl_megatron.inference.stages import Piece


@dataclass(frozen=True)
class Score:
    """A continuation as the model sees it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of its tokens, each behind those before it."""

    @property
    def total(self) -> float:
        """Log-probability of the whole continuation."""
        return sum(self.logprobs)


@torch.no_grad()
def score_continuations(
    generator: Generator,
    prompts: Sequence[Prompt],
    continuations: Sequence[Sequence[str]],
    v2pe_numerator: int = UNITS_PER_POSITION,
    with_end: bool = False,
) -> list[list[Score]]:
    """How likely texts are as answers; collective over all ranks.

    Args:
        generator: around the model.
        prompts: any number; answers go on behind `answer_start`.
        continuations: of each prompt.
        v2pe_numerator: position step of image tokens in units of 1/256.
        with_end: count `<|im_end|>` behind a continuation too: how likely it is as the whole answer.

    Returns:
        Scores of every prompt's continuations. A text is made tokens as in training, together with what stands before it:
        where a token spans both, the continuation begins with it.

    Raises:
        DataError: an image cannot be read, or images and `<image>` differ in number.
        ConfigError: a number is out of its range, or a text does not fit the context.
    """
    tokens = [
        [_tokens(generator, prompt, text, with_end) for text in texts]
        for prompt, texts in zip(prompts, continuations, strict=True)
    ]
    longest = max((len(ids) for own in tokens for _, ids in own), default=0)
    rendered = generator.renderer.render_all(prompts, v2pe_numerator, longest)
    waiting = deque(
        (Request(number, rendered[number]), tokens[number])
        for number in generator.own_numbers(len(prompts))
        if tokens[number]
    )
    found: dict[int, list[int]] = {number: [] for number, own in enumerate(tokens) if not own}
    while waiting:
        batch = _fitting(generator, waiting)
        values = iter(_logprobs(generator, batch).view(torch.int32).tolist())
        for request, own in batch:
            found[request.number] = [next(values) for _, ids in own for _ in ids]
    found = generator.of_all_replicas(found)
    scores = []
    for number, own in enumerate(tokens):
        values = iter(torch.tensor(found[number], dtype=torch.int32).view(torch.float32).tolist())
        scores.append([Score(tuple(ids), tuple(next(values) for _ in ids)) for _, ids in own])
    return scores


@torch.no_grad()
def answer_starts(generator: Generator, prompts: Sequence[Prompt], token_ids: Sequence[int]) -> list[np.ndarray]:
    """Scores of some tokens as the first of every answer of a conversation, fp32 [answers, tokens] each; collective.

    The answers are those of `history` and the one to come, in their order; each is scored behind the earlier ones as they
    stand there. Ordinary positions.
    """
    rendered = generator.renderer.render_all(prompts, UNITS_PER_POSITION, 0)
    waiting = deque((Request(number, rendered[number]), []) for number in generator.own_numbers(len(prompts)))
    found: dict[int, list[int]] = {}
    while waiting:
        batch = [request for request, _ in _fitting(generator, waiting)]
        embed(generator.stages, batch)
        places = [answer_places(request.rendered.token_ids, generator.tokenizer) for request in batch]
        pieces = [prompt_piece(request, None, own) for request, own in zip(batch, places, strict=True)]
        logits = generator.stages.scores(pieces)
        values = None if logits is None else logits[:, list(token_ids)].flatten()
        count = sum(map(len, places)) * len(token_ids)
        bits = generator.stages.agree_numbers(values, count).view(torch.int32).tolist()
        for request, own in zip(batch, places, strict=True):
            size = len(own) * len(token_ids)
            found[request.number], bits = bits[:size], bits[size:]
    found = generator.of_all_replicas(found)
    return [
        np.array(found[number], dtype=np.int32).view(np.float32).reshape(-1, len(token_ids))
        for number in range(len(prompts))
    ]


type _Tokens = tuple[int, list[int]]
"""How many of the prompt's last tokens a continuation is in place of, and the continuation's."""


def _tokens(generator: Generator, prompt: Prompt, text: str, with_end: bool) -> _Tokens:
    tokenizer = generator.tokenizer
    if not (text or with_end):
        raise ConfigError("a continuation is empty: there is nothing to score; leave it out")
    before = answer_header(tokenizer, prompt.answer_start)
    whole = answer_header(tokenizer, prompt.answer_start + text)
    same = next((n for n, (one, other) in enumerate(zip(before, whole, strict=False)) if one != other), len(before))
    return len(before) - same, whole[same:] + [tokenizer.turn_end_id] * with_end


def _fitting(
    generator: Generator, waiting: deque[tuple[Request, list[_Tokens]]]
) -> list[tuple[Request, list[_Tokens]]]:
    """Take requests from the front that fit into a row and the cache together; one that fits nowhere is alone."""
    limits, row_tokens, num_slots, longest = generator.limits, 0, 0, 0
    batch: list[tuple[Request, list[_Tokens]]] = []
    while waiting:
        request, own = waiting[0]
        length = len(request.rendered.token_ids)
        row_tokens += length + sum(len(ids) for _, ids in own)
        num_slots += max(1, len(own))
        longest = max(longest, length + max((len(ids) for _, ids in own), default=0))
        fits = (
            row_tokens <= generator.config.data.tokens_per_row
            and num_slots <= limits.max_sequences
            and num_slots * longest <= limits.cache_tokens
        )
        if not fits and batch:
            break
        batch.append(waiting.popleft())
    return batch


def _logprobs(generator: Generator, batch: Sequence[tuple[Request, list[_Tokens]]]) -> Tensor:
    """Log-probabilities of all tokens of all continuations of a batch in their order, fp32, in host memory."""
    stages = generator.stages
    lengths = [len(request.rendered.token_ids) for request, _ in batch]
    longest = max(
        length + max((len(ids) for _, ids in own), default=0) for length, (_, own) in zip(lengths, batch, strict=True)
    )
    stages.cache.reserve(sum(max(1, len(own)) for _, own in batch), longest)
    embed(stages, [request for request, _ in batch])
    slot, prompts, first_tokens, others, other_tokens, order = 0, [], [], [], [], []
    for (request, own), length in zip(batch, lengths, strict=True):
        kept = [length - replaced for replaced, _ in own]
        prompts.append(prompt_piece(request, slot, np.array([end - 1 for end in kept], dtype=np.int64)))
        first_tokens += [ids[0] for _, ids in own]
        for number, (end, (_, ids)) in enumerate(zip(kept, own, strict=True)):
            positions = np.concatenate([request.rendered.positions, request.rendered.next_positions(0, len(ids))])
            order.append(len(ids))
            if len(ids) > 1:
                given = np.array(ids[:-1], dtype=np.int64)
                others.append(
                    Piece(slot + number, end, given, positions[end : end + len(given)], np.arange(len(given)))
                )
                other_tokens += ids[1:]
        slot += max(1, len(own))
    total = len(first_tokens)
    first = stages.agree_numbers(stages.logprobs(prompts, np.array(first_tokens, dtype=np.int64)), total)
    for piece, (_, own), length in zip(prompts, batch, lengths, strict=True):
        assert piece.slot is not None, "prompts are kept for their continuations"
        for number in range(1, len(own)):
            stages.cache.copy(piece.slot, piece.slot + number, length)
    if not others:
        return first
    rest = stages.agree_numbers(stages.logprobs(others, np.array(other_tokens, dtype=np.int64)), len(other_tokens))
    values = []
    for one, count in zip(first, order, strict=True):
        values += [one[None], rest[: count - 1]]
        rest = rest[count - 1 :]
    return torch.cat(values)
