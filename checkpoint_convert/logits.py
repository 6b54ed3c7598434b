"""Compare what two checkpoints of any kind answer: logits of the same prompt, on the CPU in fp32.

Weights and runs are computed by this project's model on Megatron Core, Hugging Face checkpoints by transformers: its own
`from_pretrained` for its own layout; for OpenGVLab's layout, whose code is not run, its model is filled through the
table of names.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoint_convert.companions import IMAGENET_MEAN, IMAGENET_STD, has_tokenizer
from checkpoint_convert.hf_config_write import ServingFacts, write_config
from checkpoint_convert.mapping import in_memory_name, mapping
from checkpoint_convert.sources import HuggingFaceSource, ParameterSource, open_source
from internvl_megatron.config.schema import DataConfig
from internvl_megatron.data.conversation import Turn, render_prompt
from internvl_megatron.data.images import ImageRef, decode_tiles, image_size
from internvl_megatron.data.tiling import choose_grid, num_tiles
from internvl_megatron.data.tokenizer import load_tokenizer
from internvl_megatron.errors import CheckpointError
from internvl_megatron.inference.prompt import Prompt
from internvl_megatron.launcher import launch

NUM_POSITIONS = 16
"""Positions at the end of the prompt that are compared."""

TOLERANCE = 1e-4
"""Largest difference that may be rounding, relative to the largest logit (at least 1)."""

MARGIN = 1e-3
"""Two tokens nearer than this may change places."""

_MEAN, _STD = (np.array(values, dtype=np.float32)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
_PROMPT_LOGITS = "internvl_megatron.inference.run:prompt_logits"


@dataclass(frozen=True)
class LogitsComparison:
    """How far the answers are apart."""

    largest_difference: float
    largest_logit: float
    num_positions: int
    num_other_choices: int
    """Positions where the two clearly prefer different tokens."""

    @property
    def agree(self) -> bool:
        """Whether the difference can be rounding."""
        return self.num_other_choices == 0 and self.largest_difference <= TOLERANCE * max(1.0, self.largest_logit)

    def __str__(self) -> str:
        """For people."""
        verdict = "agree" if self.agree else "DIFFER"
        return (
            f"logits {verdict}: largest difference {self.largest_difference:.2e} of values up to {self.largest_logit:.1f} "
            f"over {self.num_positions} positions; {self.num_other_choices} positions choose another token"
        )


def compare_logits(one: Path, other: Path, question: str, images: list[str]) -> LogitsComparison:
    """Ask both the same.

    Raises:
        CheckpointError: one cannot be opened, or has no tokenizer.
        DataError: an image cannot be read.
    """
    prompt = Prompt(question, tuple(images))
    first, second = prompt_logits(one, prompt), prompt_logits(other, prompt)
    if first.shape != second.shape:
        raise CheckpointError(f"{one} and {other}: the vocabularies differ: logits {first.shape} and {second.shape}")
    top_two = np.sort(first, axis=-1)[:, -2:]
    clear = top_two[:, 1] - top_two[:, 0] > MARGIN
    return LogitsComparison(
        largest_difference=float(np.abs(first - second).max()),
        largest_logit=float(np.abs(first).max()),
        num_positions=len(first),
        num_other_choices=int((clear & (first.argmax(-1) != second.argmax(-1))).sum()),
    )


def check_inputs(one: ParameterSource, other: ParameterSource, images: list[str]) -> None:
    """See whether both can be asked.

    Raises:
        CheckpointError: one has no tokenizer.
        DataError: its tokenizer, or an image, cannot be read.
    """
    for path in images:
        image_size(path)
    for source in (one, other):
        if source.companions is None or not has_tokenizer(source.companions):
            raise CheckpointError(f"{source.path}: has no tokenizer beside it, so it cannot be asked anything")
        load_tokenizer(source.companions)


def prompt_logits(path: Path, prompt: Prompt) -> np.ndarray:
    """Logits fp32 [positions, vocabulary] at the end of a prompt, by whoever computes that kind of checkpoint."""
    source = open_source(path)
    if not isinstance(source, HuggingFaceSource):
        return launch(_PROMPT_LOGITS, 1, source.path, prompt, NUM_POSITIONS, "cpu", device="cpu")[0]
    inputs = _inputs(source, prompt)
    with torch.no_grad():
        logits = _transformers_model(source)(**inputs, logits_to_keep=NUM_POSITIONS, use_cache=False).logits
    return logits[0].float().numpy()


def _inputs(source: ParameterSource, prompt: Prompt) -> dict[str, Any]:
    """Token ids and normalised tiles of a prompt, as the data pipeline makes them."""
    assert source.companions is not None, "a Hugging Face folder is its own folder of companions"
    data, vision = DataConfig(), source.model.vision
    refs = []
    for path in prompt.images:
        most = max(1, data.max_tiles // len(prompt.images))
        grid = choose_grid(*image_size(path), data.min_tiles, most, vision.tile_pixels)
        refs.append(ImageRef(path, grid, num_tiles(grid, data.use_thumbnail), jpeg_seed=None))
    context = [ref.num_tiles * vision.tokens_per_tile for ref in refs]
    tokenizer = load_tokenizer(source.companions)
    rendered = render_prompt([Turn("human", prompt.question)], context, tokenizer, prompt.system)
    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(rendered.token_ids).long()[None]}
    if refs:
        tiles = np.concatenate([decode_tiles(ref, vision.tile_pixels, data.use_thumbnail) for ref in refs])
        inputs["pixel_values"] = torch.from_numpy((tiles.astype(np.float32) / 255 - _MEAN) / _STD)
    return inputs


def _transformers_model(source: HuggingFaceSource) -> Any:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    if source.layout == "transformers":
        return InternVLForConditionalGeneration.from_pretrained(
            str(source.path), dtype=torch.float32, local_files_only=True
        ).eval()
    tokenizer = load_tokenizer(source.path)
    facts = ServingFacts(dtype="float32", image_token_id=tokenizer.image_context_id)
    config = InternVLConfig(**write_config(source.model, "transformers", facts, None))
    model = InternVLForConditionalGeneration(config).eval()
    parameters = dict(model.named_parameters())
    for entry in mapping(source.model, "transformers"):
        for name, value in zip(entry.hf_names, entry.transform.split(source.read(entry.name)), strict=True):
            parameters[in_memory_name(name)].data.copy_(value)
    return model
