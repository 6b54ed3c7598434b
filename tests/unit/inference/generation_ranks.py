"""Body of the test rank: the same prompts answered by our generator and by transformers, token by token."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from internvl_megatron.config.schema import DataConfig, ModelConfig, RunConfig
from internvl_megatron.inference.prompt import Prompt
from internvl_megatron.inference.settings import Generation, Limits, Sampling
from internvl_megatron.ranks import RankInfo

TEXTS = ["how many digits are there in the picture?", "there are three: seven, two and one.", "user assistant"]


@dataclass
class Answers:
    """What both say, and how much the generator ran."""

    ours: list[str]
    alone: list[str]
    """Ours, one prompt at a time."""
    reference: list[str]
    reference_lengths: list[int]
    """Tokens of each answer, the end of the turn included."""
    num_rounds: int
    longest_row: int
    vision_batches: list[int]
    modes: list[bool]
    """`training` of both sides afterwards."""


@dataclass
class Small:
    """A generator around random weights, and transformers' model with the same."""

    generator: Any
    reference: Any
    sizes: ModelConfig
    tokenizer: Any


@contextmanager
def small_generator(
    info: RankInfo,
    family: str = "300m",
    tensor: int = 1,
    pipeline: int = 1,
    limits: Limits | None = None,
    end_scale: float = 3.0,
) -> Iterator[Small]:
    """Both on this rank; tiles of 28 pixels and 4 tokens, rows of 220 tokens. Collective over all ranks."""
    from internvl_megatron.data.fast_tokenizer import FastTokenizer
    from internvl_megatron.data.tokenizer_build import train_small_tokenizer
    from internvl_megatron.device import open_device
    from internvl_megatron.inference.generate import Generator
    from internvl_megatron.inference.run import divided
    from internvl_megatron.inference.settings import Setup
    from internvl_megatron.model.build import build_model
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.parallel.layout import Layout
    from internvl_megatron.ranks import joined
    from tests.support.models import huggingface_model, small_model
    from tests.support.reference import from_huggingface

    torch.set_num_threads(1)
    device = open_device("cpu")
    tokenizer = FastTokenizer(train_small_tokenizer(TEXTS, vocab_size=300), "small")
    sizes = small_model(family)
    sizes = replace(sizes, language=replace(sizes.language, vocab_size=len(tokenizer)))
    config = RunConfig(
        name="test",
        model=sizes,
        data=DataConfig(tokens_per_row=220, max_tiles=4, system_prompt="user"),
        dtype="fp32",
    )
    config = divided(config, Setup(tensor, pipeline), info.world_size)
    config = replace(config, parallel=replace(config.parallel, vision_chunk_tiles=3))
    reference: Any = huggingface_model(sizes)
    reference.config.image_token_id = tokenizer.image_context_id
    with torch.no_grad():
        # The end of the turn wins now and then, so that answers end at different lengths.
        reference.lm_head.weight[tokenizer.turn_end_id] *= end_scale
    with joined(info, device, 60):
        layout = Layout(tensor, pipeline, info.world_size // (tensor * pipeline))
        groups = make_groups(layout, device, 60)
        model = build_model(config, groups, device)
        full = from_huggingface(reference.state_dict(), sizes)
        for name, parameter in model.named_parameters():
            model.load_full(name, parameter, full[name])
        yield Small(Generator(config, model, groups, tokenizer, device, limits), reference, sizes, tokenizer)


def compare(info: RankInfo, family: str, prompts: list[Prompt], max_new_tokens: int, numerator: int) -> Answers:
    """Answer with both, one prompt at a time and together."""
    with small_generator(info, family) as small:
        generator, model = small.generator, small.generator.model
        rows: list[int] = []
        batches: list[int] = []
        model.language[0].register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[1]))
        model.vision.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
        ours = generator.answer(prompts, max_new_tokens, numerator)
        num_rounds, longest, vision_batches = len(rows), max(rows, default=0), list(batches)
        alone = [generator.answer([prompt], max_new_tokens, numerator)[0] for prompt in prompts]
        modes = [model.vision.training, model.language[0].training]
        delta = numerator / 256
        expected = [greedy(small, prompt, max_new_tokens, delta)[0] for prompt in prompts]
    texts = []
    for prompt, ids in zip(prompts, expected, strict=True):
        text = small.tokenizer.decode([i for i in ids if i != small.tokenizer.turn_end_id]).rstrip()
        texts.append(text if prompt.answer_start else text.lstrip())
    return Answers(ours, alone, texts, [len(ids) for ids in expected], num_rounds, longest, vision_batches, modes)


@dataclass
class Layouts:
    """Tokens of a layout's answers, and transformers' with the margins of its choices (rank 0; else empty)."""

    together: list[tuple[int, ...]]
    alone: list[tuple[int, ...]]
    drawn: list[tuple[int, ...]]
    num_tiles: int
    """That this rank has encoded."""
    reference: list[list[int]]
    margins: list[list[float]]


def answer_divided(
    info: RankInfo, tensor: int, pipeline: int, prompts: list[Prompt], max_new_tokens: int, family: str
) -> Layouts:
    """Answer under a layout: greedily, all together and one by one; and by drawing."""
    with small_generator(info, family, tensor, pipeline) as small:
        generator = small.generator
        tiles: list[int] = []
        hook = generator.model.vision.register_forward_pre_hook(lambda _, inputs: tiles.append(len(inputs[0])))
        settings = Generation(max_new_tokens=max_new_tokens)
        together = [answer.token_ids for answer in generator.generate(prompts, settings)]
        hook.remove()
        alone = [generator.generate([prompt], settings)[0].token_ids for prompt in prompts]
        sampling = Sampling(temperature=0.9, top_p=0.9, seed=3)
        drawn = [answer.token_ids for answer in generator.generate(prompts, Generation(max_new_tokens, 256, sampling))]
        found = [greedy(small, prompt, max_new_tokens, 1.0) for prompt in prompts] if info.rank == 0 else []
    margins = [[float(top[0] - top[1]) for top in logits.topk(2).values] for _, logits in found]
    return Layouts(together, alone, drawn, sum(tiles), [ids for ids, _ in found], margins)


def cached_logits(
    info: RankInfo, prompts: list[Prompt], max_new_tokens: int, numerators: list[int]
) -> list[tuple[float, float]]:
    """For every stride the largest difference between scores from cached keys and values and transformers', which
    computes the whole sequence with positions written out by hand; and the largest score."""
    from internvl_megatron.inference.batch import Batch

    seen: dict[tuple[int, int], torch.Tensor] = {}
    choose = Batch._choose

    def recorded(batch: Any, requests: Any, logits: Any) -> list[int]:
        for request, row in zip(requests, logits, strict=True):
            seen[request.number, len(request.answer_ids)] = row
        return choose(batch, requests, logits)

    setattr(Batch, "_choose", recorded)
    differences = []
    with small_generator(info, limits=Limits(max_sequences=3)) as small:
        for numerator in numerators:
            seen.clear()
            answers = small.generator.generate(prompts, Generation(max_new_tokens, numerator))
            largest, highest = 0.0, 0.0
            for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
                logits = whole_logits(small, prompt, list(answer.token_ids[:-1]), numerator / 256)
                assert len(logits) == len(answer.token_ids), "every choice is compared"
                for step, row in enumerate(logits):
                    largest = max(largest, float((seen[number, step][: len(row)] - row).abs().max()))
                    highest = max(highest, float(row.abs().max()))
            assert len(seen) == sum(len(answer.token_ids) for answer in answers), "nothing more was computed"
            differences.append((largest, highest))
    return differences


def whole_logits(small: Small, prompt: Prompt, answer: list[int], delta: float) -> torch.Tensor:
    """transformers' scores of the first token of the answer and of those behind each of its tokens; the template, tiles and
    positions are written out by hand."""
    text, pixels = _by_hand(prompt, small.sizes.vision.tokens_per_tile)
    ids = small.tokenizer.hf_tokenizer(text, add_special_tokens=False)["input_ids"]
    positions = _positions(ids, small.tokenizer, delta)
    positions += [positions[-1] + n + 1 for n in range(len(answer))]
    with torch.no_grad():
        logits = small.reference(
            input_ids=torch.tensor([ids + answer]),
            pixel_values=pixels,
            # Without a mask transformers takes positions that do not rise by 1 for the bounds of packed samples.
            attention_mask=torch.ones(1, len(ids) + len(answer), dtype=torch.long),
            position_ids=torch.tensor([positions]),
        ).logits[0]
    return logits[len(ids) - 1 :]


def greedy(small: Small, prompt: Prompt, limit: int, delta: float) -> tuple[list[int], torch.Tensor]:
    """Greedy search with transformers, every step computed from the start; tokens, and scores of every step."""
    answer: list[int] = []
    logits = torch.empty(0)
    while len(answer) < limit and small.tokenizer.turn_end_id not in answer:
        logits = whole_logits(small, prompt, answer, delta)
        answer.append(int(logits[-1].argmax()))
    return answer, logits


def _by_hand(prompt: Prompt, tokens_per_tile: int) -> tuple[str, torch.Tensor | None]:
    """The whole prompt as text, and normalised tiles [T, 3, 28, 28] of images that are rows of 28-pixel squares."""
    from PIL import Image

    questions = [asked for asked, _ in prompt.history] + [prompt.question]
    if prompt.images and not any("<image>" in question for question in questions):
        several = len(prompt.images) > 1
        names = [f"Image-{n}: <image>\n" if several else "<image>\n" for n in range(1, len(prompt.images) + 1)]
        questions[0] = "".join(names) + questions[0]
    answers = [answered + "<|im_end|>\n" for _, answered in prompt.history] + [prompt.answer_start]
    text = "".join(
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}"
        for question, answer in zip(questions, answers, strict=True)
    )
    tiles = []
    for path in prompt.images:
        image = Image.open(path).convert("RGB")
        squares = [image.crop((left, 0, left + 28, 28)) for left in range(0, image.width, 28)]
        if len(squares) > 1:
            squares.append(image.resize((28, 28), Image.Resampling.BICUBIC))
        tiles += squares
        text = text.replace("<image>", f"<img>{'<IMG_CONTEXT>' * (tokens_per_tile * len(squares))}</img>", 1)
    system = "user" if prompt.system is None else prompt.system
    opening = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    text = opening + text
    if not tiles:
        return text, None
    values = torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles])).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return text, ((values - mean) / std).permute(0, 3, 1, 2)


def _positions(ids: list[int], tokenizer: Any, delta: float) -> list[float]:
    """Positions token by token: text 1 further, image tokens delta, text after an image at the next whole number."""
    positions: list[float] = []
    for index, token in enumerate(ids):
        if index == 0:
            positions.append(0.0)
        elif token == tokenizer.image_context_id:
            positions.append(positions[-1] + delta)
        else:
            positions.append(float(np.ceil(positions[-1])) + 1)
    return positions
