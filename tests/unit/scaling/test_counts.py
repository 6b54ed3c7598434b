"""Closed forms against published numbers, built models and counted operations."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from internvl_megatron.config.schema import LanguageConfig, ModelConfig, VisionConfig
from internvl_megatron.launcher import launch
from internvl_megatron.model.language import padded_vocab_size
from internvl_megatron.scaling.counts import forward_flops, parameter_counts, step_flops
from tests.support.models import IMAGE_TOKEN, huggingface_model, small_model

VIT_300M = VisionConfig(hidden_size=1024, num_layers=24, num_heads=16, ffn_hidden_size=4096)
VIT_6B = VisionConfig(
    hidden_size=3200,
    num_layers=45,
    num_heads=25,
    ffn_hidden_size=12800,
    norm="rms_norm",
    qkv_bias=False,
    qk_norm=True,
)


def released(vision, layers, hidden, heads, kv_heads, head, ffn):
    """A released size: spec 1.2 and 1.4."""
    language = LanguageConfig(
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head,
        ffn_hidden_size=ffn,
        vocab_size=151674,
    )
    return ModelConfig(vision=vision, language=language)


RELEASED = {
    "1B": released(VIT_300M, 24, 896, 14, 2, 64, 4864),
    "2B": released(VIT_300M, 28, 1536, 12, 2, 128, 8960),
    "8B": released(VIT_300M, 28, 3584, 28, 4, 128, 18944),
    "14B": released(VIT_300M, 48, 5120, 40, 8, 128, 13824),
    "38B": released(VIT_6B, 64, 5120, 40, 8, 128, 27648),
    "78B": released(VIT_6B, 80, 8192, 64, 8, 128, 29568),
}


@pytest.mark.parametrize(
    ("size", "billions"),
    [("1B", 0.938), ("2B", 2.089), ("8B", 7.944), ("14B", 15.117), ("38B", 38.388), ("78B", 78.408)],
)
def test_published_totals(size, billions):
    assert round(parameter_counts(RELEASED[size]).total / 1e9, 3) == billions


def test_published_parts():
    assert round(parameter_counts(RELEASED["8B"]).vision / 1e6, 2) == 304.01
    assert round(parameter_counts(RELEASED["78B"]).vision / 1e9, 4) == 5.5365
    assert round(parameter_counts(RELEASED["1B"]).language / 1e9, 3) == 0.630
    assert round(parameter_counts(RELEASED["1B"]).projector / 1e6, 1) == 4.5
    assert round(parameter_counts(RELEASED["78B"]).language / 1e9, 3) == 72.700
    assert round(parameter_counts(RELEASED["78B"]).projector / 1e6, 1) == 172.0


def test_padded_tables_are_larger_by_the_padding_only():
    model = RELEASED["8B"]
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


def test_step_is_three_forward_passes_and_scales_with_its_content():
    model = RELEASED["1B"]
    forward, step = forward_flops(model, 4096, 8, 4096**2), step_flops(model, 4096, 8, 4096**2)
    assert (step.vision, step.projector, step.language) == (
        3 * forward.vision,
        3 * forward.projector,
        3 * forward.language,
    )
    without_images = step_flops(model, 4096, 0, 4096**2)
    assert (without_images.vision, without_images.projector) == (0, 0)
    assert without_images.language == step.language
    packed = step_flops(model, 4096, 8, 4 * 1024**2)
    assert step.language - packed.language == 3 * 24 * 2 * (4096**2 - 4 * 1024**2) * 14 * 64


def test_language_matches_the_rule_of_thumb():
    """6 FLOPs per parameter and token, the input embedding aside, when attention is negligible."""
    model = RELEASED["8B"]
    used = parameter_counts(model).language - model.language.vocab_size * model.language.hidden_size
    assert step_flops(model, 1000, 0, 0).language == pytest.approx(6 * used * 1000, rel=1e-4)


def test_tokens_of_a_tile_follow_the_configuration():
    smaller = replace(RELEASED["1B"], vision=replace(VIT_300M, tile_pixels=224))
    quarter = forward_flops(smaller, 0, 4, 0).projector
    assert quarter == forward_flops(RELEASED["1B"], 0, 1, 0).projector
