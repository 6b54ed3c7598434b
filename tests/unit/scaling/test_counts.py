"""Closed forms against published numbers, built models and counted operations."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from internvl_megatron.config.models import INTERNVL3
from internvl_megatron.config.overrides import apply_overrides
from internvl_megatron.config.recipes import demo_digits
from internvl_megatron.launcher import launch
from internvl_megatron.model.language import padded_vocab_size
from internvl_megatron.scaling.counts import TrainedParts, forward_flops, parameter_counts, step_flops
from tests.support.models import IMAGE_TOKEN, huggingface_model, small_model


@pytest.mark.parametrize(
    ("size", "billions"),
    [("1B", 0.938), ("2B", 2.089), ("8B", 7.944), ("9B", 9.14), ("14B", 15.117), ("38B", 38.388), ("78B", 78.408)],
)
def test_published_totals(size, billions):
    places = 2 if size == "9B" else 3  # published with fewer
    assert round(parameter_counts(INTERNVL3[size]).total / 1e9, places) == billions


def test_published_parts():
    assert round(parameter_counts(INTERNVL3["8B"]).vision / 1e6, 2) == 304.01
    assert round(parameter_counts(INTERNVL3["78B"]).vision / 1e9, 4) == 5.5365
    assert round(parameter_counts(INTERNVL3["1B"]).language / 1e9, 3) == 0.630
    assert round(parameter_counts(INTERNVL3["1B"]).projector / 1e6, 1) == 4.5
    assert round(parameter_counts(INTERNVL3["78B"]).language / 1e9, 3) == 72.700
    assert round(parameter_counts(INTERNVL3["78B"]).projector / 1e6, 1) == 172.0


def test_padded_tables_are_larger_by_the_padding_only():
    model = INTERNVL3["8B"]
    real, padded = parameter_counts(model), parameter_counts(model, padded_vocab=True)
    assert padded.language - real.language == 2 * (padded_vocab_size(151674) - 151674) * 3584
    assert (padded.vision, padded.projector) == (real.vision, real.projector)


def built_model(family):
    """A small model whose width differs from heads times head size (64)."""
    return small_model(family, hidden_size=48)


def sizes_of_built_parts(info, family):
    """Parameters of our model's parts: [vision, projector, language]."""
    from internvl_megatron.device import open_device
    from internvl_megatron.model.build import build_model
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.parallel.layout import Layout
    from internvl_megatron.ranks import joined
    from tests.support.layouts import run_config

    device = open_device("cpu")
    with joined(info, device, 60):
        config = run_config(built_model(family))
        model = build_model(config, make_groups(Layout(1, 1, 1), device, 60), device)
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    projector = sum(size for name, size in sizes.items() if name.startswith("vision.projector."))
    vision = sum(size for name, size in sizes.items() if name.startswith("vision.")) - projector
    return [vision, projector, sum(sizes.values()) - vision - projector]


@pytest.mark.parallel
@pytest.mark.parametrize("family", ["300m", "6b"])
def test_built_model(family):
    counts = parameter_counts(built_model(family), padded_vocab=True)
    assert launch(sizes_of_built_parts, 1, family) == [[counts.vision, counts.projector, counts.language]]


@pytest.mark.parametrize("family", ["300m", "6b"])
def test_flops_equal_those_torch_counts(family):
    """transformers' eager attention computes all pairs, twice the causal half."""
    sizes = small_model(family)
    model = huggingface_model(sizes)
    num_tiles, num_text = 3, 11
    num_tokens = num_tiles * sizes.vision.tokens_per_tile + num_text
    token_ids = torch.tensor([[IMAGE_TOKEN] * (num_tokens - num_text) + [9] * num_text])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=token_ids, pixel_values=torch.randn(num_tiles, 3, 28, 28))
    expected = forward_flops(sizes, num_tokens, num_tiles, attention_pairs=2 * num_tokens**2)
    assert counter.get_total_flops() == expected.total
    by_module = counter.get_flop_counts()
    counted = {name: sum(ops.values()) for name, ops in by_module.items()}
    prefix = "InternVLForConditionalGeneration.model."
    assert counted[f"{prefix}vision_tower"] == expected.vision
    assert counted[f"{prefix}multi_modal_projector"] == expected.projector


@pytest.mark.parametrize("family", ["300m", "6b"])
@pytest.mark.parametrize("frozen", [(), ("vision",), ("language",), ("vision", "language"), ("projector", "vision")])
def test_step_flops_equal_those_torch_counts(family: str, frozen: tuple[str, ...]) -> None:
    """Forward and backward of transformers' model with frozen parts, and logits of a few positions alone."""
    sizes = small_model(family)
    model = huggingface_model(sizes)
    modules = {
        "vision": (model.model.vision_tower,),
        "projector": (model.model.multi_modal_projector,),
        "language": (model.model.language_model, model.lm_head),
    }
    for part in frozen:
        for module in modules[part]:
            module.requires_grad_(False)
    num_tiles, num_text, supervised = 3, 11, 4
    num_tokens = num_tiles * sizes.vision.tokens_per_tile + num_text
    token_ids = torch.tensor([[IMAGE_TOKEN] * (num_tokens - num_text) + [9] * num_text])
    with FlopCounterMode(display=False) as counter:
        pixels = torch.randn(num_tiles, 3, 28, 28)
        model(input_ids=token_ids, pixel_values=pixels, logits_to_keep=supervised).logits.sum().backward()
    trained = replace(TrainedParts(), **dict.fromkeys(frozen, "nothing"))
    expected = step_flops(sizes, num_tokens, num_tiles, 2 * num_tokens**2, supervised, trained)
    # Nobody asks for the gradient of pixels, which torch leaves out of the patch embedding's. Ours counts the part as a whole.
    vision = sizes.vision
    patch_embedding = 2 * num_tiles * vision.patches_per_side**2 * 3 * vision.patch_pixels**2 * vision.hidden_size
    left_out = 0 if "vision" in frozen else patch_embedding
    assert counter.get_total_flops() == expected.total - left_out


def test_a_step_needs_three_forward_passes_and_scales_with_its_content() -> None:
    model = INTERNVL3["1B"]
    forward, step = forward_flops(model, 4096, 8, 4096**2), step_flops(model, 4096, 8, 4096**2, 4096)
    assert (step.vision, step.projector, step.language) == (
        3 * forward.vision,
        3 * forward.projector,
        3 * forward.language,
    )
    without_images = step_flops(model, 4096, 0, 4096**2, 4096)
    assert (without_images.vision, without_images.projector) == (0, 0)
    assert without_images.language == step.language
    packed = step_flops(model, 4096, 8, 4 * 1024**2, 4096)
    assert step.language - packed.language == 3 * 24 * 2 * (4096**2 - 4 * 1024**2) * 14 * 64
    few = step_flops(model, 4096, 8, 4096**2, 1024)
    assert step.language - few.language == 3 * 2 * 3072 * 896 * 151674, "the output layer, where there is a loss"


def test_frozen_parts_need_as_much_of_a_backward_pass_as_is_trained_below_them() -> None:
    model = INTERNVL3["1B"]
    forward = forward_flops(model, 4096, 8, 0)

    def passes(num_tiles: int = 8, **trained: Any) -> list[float]:
        step = step_flops(model, 4096, num_tiles, 0, 4096, TrainedParts(**trained))
        parts = (step.vision, forward.vision), (step.projector, forward.projector), (step.language, forward.language)
        return [part / once for part, once in parts]

    assert passes(vision="nothing") == [1, 3, 3]
    assert passes(vision="nothing", projector="nothing") == [1, 1, 3]
    assert passes(vision="nothing", language="nothing") == [1, 3, 2]
    vision, *rest = passes(projector="nothing", language="nothing")
    assert [vision, *rest] == [3, 2, 2]
    assert passes(0, language="nothing") == [0, 0, 1], "a text has no way to what is trained"
    vision, *rest = passes(vision="adapters", language="adapters")
    assert 2 < vision < 2.3, "attention needs all of a backward pass"
    assert rest == [3, 2]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], TrainedParts()),
        (["optimizer.vision.trainable=false", "lora.language_rank=4"], TrainedParts("nothing", "weights", "adapters")),
        (
            ["optimizer.language.trainable=false", "optimizer.projector.trainable=false", "lora.vision_rank=2"],
            TrainedParts("adapters", "nothing", "nothing"),
        ),
    ],
)
def test_trained_parts_of_a_run(settings: list[str], expected: TrainedParts) -> None:
    assert TrainedParts.of(apply_overrides(demo_digits(), settings)) == expected


def test_language_matches_the_rule_of_thumb():
    """6 FLOPs per parameter and token, the input embedding aside, when attention is negligible."""
    model = INTERNVL3["8B"]
    used = parameter_counts(model).language - model.language.vocab_size * model.language.hidden_size
    assert step_flops(model, 1000, 0, 0, 1000).language == pytest.approx(6 * used * 1000, rel=1e-4)


def test_tokens_of_a_tile_follow_the_configuration():
    smaller = replace(INTERNVL3["1B"], vision=replace(INTERNVL3["1B"].vision, tile_pixels=224))
    quarter = forward_flops(smaller, 0, 4, 0).projector
    assert quarter == forward_flops(INTERNVL3["1B"], 0, 1, 0).projector
