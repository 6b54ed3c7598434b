"""Speed of generation beside transformers': tokens per second at the shape of a released size, as one JSON record.

    python -m tools.benchmark generation [--model 1B] [--batches 1,8] [--new-tokens N] [--rounds N] [--output FILE]

Random weights in fp32 on CPU threads, the same number for both. Prompts of different lengths (transformers pads them on the left),
every answer exactly N tokens, greedy, from cached keys and values. The two take turns, a process each, since only one copy of the
weights should be in memory; the best of the rounds counts, because other work on a machine only ever slows one down.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from internvl_megatron.config.models import INTERNVL3
from internvl_megatron.config.schema import DataConfig, RunConfig
from internvl_megatron.launcher import launch
from internvl_megatron.ranks import RankInfo
from tools.machine_record import machine_record

PROMPT_TOKENS = (48, 96)
"""Shortest and longest; those of a batch are spread evenly between the two, a batch of one has the mean."""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command `generation` of `tools.benchmark`."""
    parser = commands.add_parser("generation", help="tokens per second of generation beside transformers' on a CPU")
    parser.add_argument("--model", choices=list(INTERNVL3), default="1B")
    parser.add_argument("--batches", default="1,8", help="sequences at a time, several with commas")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, help="JSON file to write; default: print only")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure both, print the record, write it to a file if one is named."""
    batches = [int(size) for size in options.batches.split(",")]
    seconds: dict[str, dict[int, list[float]]] = {"ours": {}, "transformers": {}}
    loads = []
    for _ in range(options.rounds):
        for name, body in (("ours", time_ours), ("transformers", time_transformers)):
            (found,) = launch(body, 1, options.model, batches, options.new_tokens, options.threads, device="cpu")
            loads.append(round(os.getloadavg()[0], 1))
            for size, elapsed in found.items():
                seconds[name].setdefault(size, []).append(elapsed)
    record = machine_record() | {
        "benchmark": "generation",
        "model": options.model,
        "dtype": "fp32",
        "threads": options.threads,
        "new_tokens": options.new_tokens,
        "prompt_tokens": list(PROMPT_TOKENS),
        "load_averages": loads,
        "batches": [_compare(size, options.new_tokens, seconds) for size in batches],
    }
    text = json.dumps(record, indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    return 0


def time_ours(info: RankInfo, model: str, batches: list[int], new_tokens: int, threads: int) -> dict[int, float]:
    """Seconds for every batch size with this project's generator; the body of one rank."""
    from internvl_megatron.data.fast_tokenizer import FastTokenizer
    from internvl_megatron.data.tokenizer_build import find_dashscope_ranks, qwen2_5_tokenizer
    from internvl_megatron.device import open_device
    from internvl_megatron.inference.generate import Generator
    from internvl_megatron.inference.prompt import Prompt
    from internvl_megatron.inference.requests import RenderedPrompt
    from internvl_megatron.inference.settings import Generation
    from internvl_megatron.model.build import build_model
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.parallel.layout import Layout
    from internvl_megatron.ranks import joined

    torch.set_num_threads(threads)
    device = open_device("cpu")
    config = RunConfig(name="benchmark", model=INTERNVL3[model], data=DataConfig(tokenizer="-"), dtype="fp32")
    tokenizer = FastTokenizer(qwen2_5_tokenizer(find_dashscope_ranks()), "built")
    with joined(info, device, 600):
        groups = make_groups(Layout(1, 1, 1), device, 600)
        built = build_model(config, groups, device, initialize=False)
        generator = Generator(config, built, groups, tokenizer, device)
        _fill(parameter for _, parameter in built.named_parameters())

        def rendered(prompts: Sequence[Prompt], v2pe_numerator: int, max_new_tokens: int) -> list[RenderedPrompt]:
            del max_new_tokens
            ids = _prompts(len(prompts), config.model.language.vocab_size)
            no_images = np.empty(0, dtype=np.int64)
            return [
                RenderedPrompt(own, np.arange(len(own), dtype=np.int32) * v2pe_numerator, (), no_images) for own in ids
            ]

        # Tokens instead of texts: both get the same.
        generator.renderer.render_all = rendered
        found = {}
        for size in batches:
            for limit in (2, new_tokens):  # the first time makes the memory
                start = time.perf_counter()
                answers = generator.generate([Prompt("")] * size, Generation(limit))
                found[size] = time.perf_counter() - start
            assert all(len(answer.token_ids) == new_tokens for answer in answers), "an answer ended early"
        return found


def time_transformers(
    _info: RankInfo, model: str, batches: list[int], new_tokens: int, threads: int
) -> dict[int, float]:
    """The same with transformers' `generate`."""
    from transformers import InternVLForConditionalGeneration

    from tools.huggingface_baseline import transformers_config

    torch.set_num_threads(threads)
    sizes = INTERNVL3[model]
    config = transformers_config(sizes, sizes.language.vocab_size - 7)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        reference: Any = InternVLForConditionalGeneration(config)
    reference = reference.to_empty(device="cpu").eval()
    _fill(reference.parameters())
    _recompute_tables(reference)
    found = {}
    for size in batches:
        prompts = _prompts(size, sizes.language.vocab_size)
        longest = max(map(len, prompts))
        ids = torch.zeros(size, longest, dtype=torch.long)
        mask = torch.zeros(size, longest, dtype=torch.long)
        for row, own in enumerate(prompts):
            ids[row, longest - len(own) :] = torch.from_numpy(own)
            mask[row, longest - len(own) :] = 1
        for limit in (2, new_tokens):
            start = time.perf_counter()
            made = reference.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=limit,
                do_sample=False,
                use_cache=True,  # the configuration is one for training, which says no
                eos_token_id=None,
                pad_token_id=0,
            )
            found[size] = time.perf_counter() - start
        assert made.shape[1] == longest + new_tokens, "an answer ended early"
    return found


def _recompute_tables(reference: Any) -> None:
    """Rotary frequencies are no parameters: what was made without memory has to be made again."""
    rotary = reference.model.language_model.rotary_emb
    reference.model.language_model.rotary_emb = type(rotary)(rotary.config)


def _fill(parameters: Any) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)


def _prompts(size: int, vocab_size: int) -> list[np.ndarray]:
    shortest, longest = PROMPT_TOKENS
    lengths = np.linspace(shortest, longest, size).astype(int) if size > 1 else [(shortest + longest) // 2]
    rng = np.random.default_rng(size)
    return [rng.integers(0, vocab_size - 100, length).astype(np.int32) for length in lengths]


def _compare(size: int, new_tokens: int, seconds: dict[str, dict[int, list[float]]]) -> dict[str, Any]:
    speeds = {name: size * new_tokens / min(found[size]) for name, found in seconds.items()}
    return {
        "sequences": size,
        **{f"{name}_tokens_per_second": round(speed, 3) for name, speed in speeds.items()},
        "ratio": round(speeds["ours"] / speeds["transformers"], 3),
        "seconds": {name: [round(value, 2) for value in found[size]] for name, found in seconds.items()},
    }
