"""Bodies of test ranks: settings of generation, scores of continuations and drawn answers, beside transformers'."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from internvl_megatron.errors import UserError
from internvl_megatron.inference.prompt import Answer, Prompt
from internvl_megatron.inference.settings import Generation, Limits, Sampling
from internvl_megatron.ranks import RankInfo
from tests.unit.inference.generation_ranks import _by_hand, small_generator, whole_logits


def penalised(info: RankInfo, prompts: list[Prompt], penalty: float, limit: int) -> tuple[list[Any], list[Any]]:
    """Tokens by greedy search with a repetition penalty: ours, all together, and those of transformers' own `generate`."""
    with small_generator(info) as small:
        settings = Generation(limit, 256, Sampling(repetition_penalty=penalty))
        ours = [list(answer.token_ids) for answer in small.generator.generate(prompts, settings)]
        theirs = []
        for prompt in prompts:
            text, pixels = _by_hand(prompt, small.sizes.vision.tokens_per_tile)
            ids = torch.tensor([small.tokenizer.hf_tokenizer(text, add_special_tokens=False)["input_ids"]])
            made = small.reference.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                **({} if pixels is None else {"pixel_values": pixels}),
                max_new_tokens=limit,
                do_sample=False,
                repetition_penalty=penalty,
                eos_token_id=small.tokenizer.turn_end_id,
                pad_token_id=small.tokenizer.pad_id,
            )
            theirs.append(made[0, ids.shape[1] :].tolist())
    return ours, theirs


@dataclass
class Stopped:
    """Answers to the same prompts without and with stops, and what was streamed of them."""

    plain: list[Answer]
    by_id: list[Answer]
    stop_id: int
    by_text: list[Answer]
    stop_text: str
    streamed: dict[int, list[str]]


def stopped(info: RankInfo, prompts: list[Prompt], limit: int) -> Stopped:
    """Stop at the third token of the first answer: as an id, and as a text."""
    with small_generator(info, end_scale=0.1) as small:
        plain = small.generator.generate(prompts, Generation(limit))
        stop_id = plain[0].token_ids[2]
        by_id = small.generator.generate(prompts, Generation(limit, stop_ids=(stop_id,)))
        stop_text = next(answer.text[1:3] for answer in plain if len(answer.text) > 4)
        streamed: dict[int, list[str]] = {}
        by_text = small.generator.generate(
            prompts,
            Generation(limit, stop_strings=(stop_text,)),
            lambda number, piece: streamed.setdefault(number, []).append(piece),
        )
    return Stopped(plain, by_id, stop_id, by_text, stop_text, streamed)


def video_and_frames(
    info: RankInfo, video: Prompt, frames: Prompt
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Tokens of a prompt with a video and of one with its frames as images, and of the answers to both."""
    with small_generator(info) as small:
        rendered = [small.generator.renderer.render(prompt, 256).token_ids.tolist() for prompt in (video, frames)]
        answers = [list(a.token_ids) for a in small.generator.generate([video, frames], Generation(6))]
    return rendered[0], rendered[1], answers[0], answers[1]


type Totals = list[list[list[float]]]


def scored(
    info: RankInfo, tensor: int, pipeline: int, prompts: list[Prompt], texts: list[list[str]], with_end: bool
) -> tuple[Totals, Totals]:
    """Log-probabilities of every token of every continuation: ours, and from transformers' scores of whole sequences."""
    from internvl_megatron.inference.scoring import score_continuations

    with small_generator(info, "300m", tensor, pipeline, Limits(max_sequences=5)) as small:
        found = score_continuations(small.generator, prompts, texts, 64, with_end)
        expected = []
        for prompt, own in zip(prompts, texts, strict=True) if info.rank == 0 else []:
            expected.append([])
            for text in own:
                ids = small.tokenizer.encode(text) + [small.tokenizer.turn_end_id] * with_end
                logits = whole_logits(small, prompt, ids[:-1], 64 / 256)
                values = logits.double().log_softmax(dim=-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
                expected[-1].append(values.tolist())
    return [[list(score.logprobs) for score in own] for own in found], expected


def nested(info: RankInfo, prompts: list[Prompt]) -> tuple[list[list[str]], list[list[str]], list[str]]:
    """Three and five answers to every prompt, and the most likely ones."""
    from internvl_megatron.inference.best_of_n import draw_answers

    with small_generator(info) as small:
        settings = Generation(6, 256, Sampling(temperature=1.5, seed=2))
        three, five = (draw_answers(small.generator, prompts, number, settings) for number in (3, 5))
        passes: list[int] = []
        small.generator.model.language[0].register_forward_pre_hook(
            lambda _, inputs: passes.append(inputs[0].shape[1])
        )
        draw_answers(small.generator, prompts[:1], 5, replace(settings, max_new_tokens=1))
        assert passes == [passes[0], passes[0]], (
            "a prompt is computed once for the likeliest answer, once for all others"
        )
        return three, five, small.generator.answer(prompts, 6)


def refused(info: RankInfo, cases: list[tuple[list[Prompt], int]]) -> list[str]:
    """What is said to prompts and lengths that cannot be answered in a context of 300 positions."""
    said = []
    with small_generator(info, limits=Limits(max_positions=300)) as small:
        for prompts, limit in cases:
            try:
                small.generator.generate(prompts, Generation(limit))
                said.append("")
            except UserError as error:
                said.append(str(error))
    return said


@dataclass
class OneByOne:
    """Answers as they came, with how many prompts had been taken by then, and those of a whole call on one's own prompts."""

    found: list[tuple[int, Answer, int]]
    expected: list[Answer]


def one_by_one(info: RankInfo, prompts: list[Prompt], limit: int) -> OneByOne:
    """Each of two replicas streams prompts of its own: all, or all but the first."""
    with small_generator(info, limits=Limits(max_sequences=2)) as small:
        expected = small.generator.generate(prompts, Generation(limit))[info.rank :]
        taken: list[Prompt] = []

        def given() -> Iterator[Prompt]:
            for prompt in prompts[info.rank :]:
                taken.append(prompt)
                yield prompt

        streamed = small.generator.stream(given(), Generation(limit))
        return OneByOne([(number, answer, len(taken)) for number, answer in streamed], expected)


def tiles(info: RankInfo, prompts: list[Prompt]) -> list[list[int]]:
    """Tiles of every image of prompts."""
    with small_generator(info) as small:
        return [
            [image.num_tiles for image in rendered.images]
            for rendered in small.generator.renderer.render_all(prompts, 256, 1)
        ]
