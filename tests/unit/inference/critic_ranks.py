"""Body of the test rank: solutions scored by our critic and, step by step, by transformers."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from internvl_megatron.config.schema import DataConfig, ParallelConfig, RunConfig
from internvl_megatron.inference.critic import Solution, score_solutions, score_steps
from internvl_megatron.inference.generate import Generator
from internvl_megatron.ranks import RankInfo
from tests.unit.inference.generation_ranks import TEXTS, _by_hand, _positions

INSTRUCTION = "user"


@dataclass
class Scores:
    """What both say."""

    ours: list[np.ndarray]
    means: list[float]
    reference: list[list[float]]


def compare(info: RankInfo, solutions: list[Solution], steps: list[list[str]], most_steps: int) -> Scores:
    """Score with the same random weights in both; `steps` are those the solutions should be cut into."""
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
    sizes = small_model("300m")
    sizes = replace(sizes, language=replace(sizes.language, vocab_size=len(tokenizer)))
    config = RunConfig(
        name="test",
        model=sizes,
        data=DataConfig(tokens_per_row=400, max_tiles=4, system_prompt="never"),
        parallel=ParallelConfig(vision_chunk_tiles=3),
        dtype="fp32",
    )
    reference: Any = huggingface_model(sizes)
    reference.config.image_token_id = tokenizer.image_context_id
    with joined(info, device, 60):
        groups = make_groups(Layout(1, 1, 1), device, 60)
        model = build_model(config, groups, device)
        full = from_huggingface(reference.state_dict(), sizes)
        for name, parameter in model.named_parameters():
            model.load_full(name, parameter, full[name])
        generator = Generator(config, model, groups, tokenizer, device)
        ours = score_steps(generator, solutions, INSTRUCTION, most_steps)
        means = score_solutions(generator, solutions, INSTRUCTION, most_steps)
    expected = [
        [_probability(reference, sizes, tokenizer, solution, own[:count]) for count in range(1, len(own) + 1)]
        for solution, own in zip(solutions, steps, strict=True)
    ]
    return Scores(ours, means, expected)


def _probability(reference: Any, sizes: Any, tokenizer: Any, solution: Solution, steps: list[str]) -> float:
    """P(+) of + and - behind the last of some steps, the conversation written out by hand."""
    first, *others = steps
    asked = f"### Question:\n{solution.prompt.question}\n\n### Solution Process:\n{first}"
    prompt = replace(solution.prompt, question=asked, system=INSTRUCTION)
    text, pixels = _by_hand(prompt, sizes.vision.tokens_per_tile)
    text += "".join(f"+<|im_end|>\n<|im_start|>user\n{step}<|im_end|>\n<|im_start|>assistant\n" for step in others)
    ids = tokenizer.hf_tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = reference(
            input_ids=torch.tensor([ids]),
            pixel_values=pixels,
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            position_ids=torch.tensor([_positions(ids, tokenizer, 1.0)]),
        ).logits[0, -1]
    signs = [tokenizer.hf_tokenizer(sign, add_special_tokens=False)["input_ids"] for sign in "+-"]
    (plus,), (minus,) = signs
    return float(logits[[plus, minus]].double().softmax(dim=0)[0])
