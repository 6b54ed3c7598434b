"""Body of the test rank: the same prompts answered by our generator and by transformers, token by token."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from internvl_megatron.config.schema import DataConfig, ModelConfig, ParallelConfig, RunConfig
from internvl_megatron.inference.generate import Generator, Prompt
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


def compare(info: RankInfo, family: str, prompts: list[Prompt], max_new_tokens: int, numerator: int) -> Answers:
    """Answer with the same random weights in both implementations, tiles of 28 pixels and 4 tokens."""
    from internvl_megatron.data.fast_tokenizer import FastTokenizer
    from internvl_megatron.data.tokenizer_build import train_small_tokenizer
    from internvl_megatron.device import open_device
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
        parallel=ParallelConfig(vision_chunk_tiles=3),
        dtype="fp32",
    )
    reference: Any = huggingface_model(sizes)
    reference.config.image_token_id = tokenizer.image_context_id
    with torch.no_grad():
        # The end of the turn wins now and then, so that answers end at different lengths.
        reference.lm_head.weight[tokenizer.turn_end_id] *= 6
    with joined(info, device, 60):
        groups = make_groups(Layout(1, 1, 1), device, 60)
        model = build_model(config, groups, device)
        full = from_huggingface(reference.state_dict(), sizes)
        for name, parameter in model.named_parameters():
            model.load_full(name, parameter, full[name])
        rows: list[int] = []
        batches: list[int] = []
        model.language[0].register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[1]))
        model.vision.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
        generator = Generator(config, model, groups, tokenizer, device)
        ours = generator.answer(prompts, max_new_tokens, numerator)
        num_rounds, longest, vision_batches = len(rows), max(rows, default=0), list(batches)
        alone = [generator.answer([prompt], max_new_tokens, numerator)[0] for prompt in prompts]
        modes = [model.vision.training, model.language[0].training]
    expected = [_greedy(reference, sizes, tokenizer, prompt, max_new_tokens, numerator / 256) for prompt in prompts]
    texts = [tokenizer.decode([i for i in ids if i != tokenizer.turn_end_id]).strip() for ids in expected]
    return Answers(ours, alone, texts, [len(ids) for ids in expected], num_rounds, longest, vision_batches, modes)


def _greedy(reference: Any, sizes: ModelConfig, tokenizer: Any, prompt: Prompt, limit: int, delta: float) -> list[int]:
    """Greedy search with transformers; template, tiles and positions written out by hand."""
    text, pixels = _by_hand(prompt, sizes.vision.tokens_per_tile)
    ids = tokenizer.hf_tokenizer(text, add_special_tokens=False)["input_ids"]
    positions, answer = _positions(ids, tokenizer, delta), []
    while len(answer) < limit and tokenizer.turn_end_id not in answer:
        with torch.no_grad():
            logits = reference(
                input_ids=torch.tensor([ids + answer]),
                pixel_values=pixels,
                # Without a mask transformers takes positions that do not rise by 1 for the bounds of packed samples.
                attention_mask=torch.ones(1, len(ids) + len(answer), dtype=torch.long),
                position_ids=torch.tensor([positions + [positions[-1] + n + 1 for n in range(len(answer))]]),
            ).logits
        answer.append(int(logits[0, -1].argmax()))
    return answer


def _by_hand(prompt: Prompt, tokens_per_tile: int) -> tuple[str, torch.Tensor | None]:
    """The whole prompt as text, and normalised tiles [T, 3, 28, 28] of images that are rows of 28-pixel squares."""
    from PIL import Image

    question = prompt.question
    if prompt.images and "<image>" not in question:
        several = len(prompt.images) > 1
        names = [f"Image-{n}: <image>\n" if several else "<image>\n" for n in range(1, len(prompt.images) + 1)]
        question = "".join(names) + question
    tiles = []
    for path in prompt.images:
        image = Image.open(path).convert("RGB")
        squares = [image.crop((left, 0, left + 28, 28)) for left in range(0, image.width, 28)]
        if len(squares) > 1:
            squares.append(image.resize((28, 28), Image.Resampling.BICUBIC))
        tiles += squares
        question = question.replace("<image>", f"<img>{'<IMG_CONTEXT>' * (tokens_per_tile * len(squares))}</img>", 1)
    system = "user" if prompt.system is None else prompt.system
    opening = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    text = f"{opening}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
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
