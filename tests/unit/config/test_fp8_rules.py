"""What `plan` says of FP8: every rule by the field, the value and the way out, over all sizes and tensor-parallel sizes."""

import math
from dataclasses import replace
from typing import Any

import pytest

from internvl_megatron.config.fp8_rules import MULTIPLE, tile_multiple
from internvl_megatron.config.models import INTERNVL3
from internvl_megatron.config.overrides import apply_overrides
from internvl_megatron.config.plan import cut_multiple, plan
from internvl_megatron.config.recipes import find_recipe
from internvl_megatron.config.schema import DataConfig, Fp8Config, ParallelConfig, RunConfig
from internvl_megatron.errors import ConfigError


def problems(config: RunConfig) -> list[str]:
    """Lines of the error about FP8; none if the configuration is good."""
    try:
        plan(config, config.parallel.tensor_size * config.parallel.pipeline_size * config.parallel.context_size)
    except ConfigError as error:
        return [line.removeprefix("config: ") for line in str(error).splitlines() if "fp8" in line]
    return []


def released(size: str, tensor_size: int = 1, **fp8: Any) -> RunConfig:
    return RunConfig(
        name="test",
        model=INTERNVL3[size],
        data=DataConfig(meta="m", tokenizer="t", tokens_per_row=16384, tiles_per_row=48),
        parallel=ParallelConfig(tensor_size=tensor_size, sequence_parallel=tensor_size > 1, vision_chunk_tiles=128),
        fp8=Fp8Config(**fp8),
    )


# The dimensions of every linear layer on a rank, written out by hand: width, q + k + v, heads x size, feed-forward.
WIDTHS = {
    "1B": (896, 1152, 896, 4864),
    "2B": (1536, 2048, 1536, 8960),
    "8B": (3584, 4608, 3584, 18944),
    "9B": (4096, 4608, 4096, 10240),
    "14B": (5120, 7168, 5120, 13824),
    "38B": (5120, 7168, 5120, 27648),
    "78B": (8192, 10240, 8192, 29568),
}


SIZES = [(size, ranks) for size in WIDTHS for ranks in (1, 2, 4, 8) if INTERNVL3[size].language.num_heads % ranks == 0]


@pytest.mark.parametrize(("size", "tensor_size"), SIZES)
@pytest.mark.parametrize("recipe", ["delayed", "current", "mxfp8", "blockwise"])
def test_local_sizes_of_all_released_models(size: str, tensor_size: int, recipe: Any) -> None:
    width, *divided = WIDTHS[size]
    local = [width, *(value / tensor_size for value in divided)]
    wrong = [value for value in local if value % MULTIPLE[recipe]]
    found = problems(released(size, tensor_size, language=recipe))
    assert len(found) == len(wrong)
    for line, value in zip(found, wrong, strict=True):
        assert line.startswith(f"fp8.language={recipe}: ")
        assert f"{value:g}" in line
        assert f"not a multiple of {MULTIPLE[recipe]}; set " in line


def test_the_largest_model_at_eight_ranks() -> None:
    """29568 over 8 ranks is 3696 = 16 x 231."""
    assert problems(released("78B", 8, language="current")) == []
    (line,) = problems(released("78B", 8, language="mxfp8"))
    assert line == (
        "fp8.language=mxfp8: model.language.ffn_hidden_size=29568 over parallel.tensor_size=8 is 3696 a rank, which is not "
        "a multiple of 32; set parallel.tensor_size=4 or fp8.language=current (multiples of 16)"
    )
    assert problems(released("78B", 4, language="mxfp8")) == []
    (line,) = problems(released("78B", 8, language="blockwise"))
    assert line.endswith("set parallel.tensor_size=1 or fp8.language=current (multiples of 16)")
    assert problems(released("78B", 1, language="blockwise")) == []


@pytest.mark.parametrize("size", WIDTHS)
@pytest.mark.parametrize("recipe", ["current", "mxfp8", "blockwise"])
def test_vision_and_projector_of_all_released_models_fit(size: str, recipe: Any) -> None:
    assert problems(released(size, vision=recipe, projector=recipe)) == []


def test_what_is_proposed_is_accepted() -> None:
    """The nearest valid value of every rule about sizes, rows and tiles."""
    cases: list[tuple[RunConfig, str, str]] = [
        (released("38B", 8, language="mxfp8"), "data.tokens_per_row=16400", "data.tokens_per_row=16384"),
        (released("38B", 8, language="blockwise"), "data.tokens_per_row=500", "data.tokens_per_row=1024"),
        (released("38B", 8, language="current"), "data.tokens_per_row=16200", "data.tokens_per_row=16256"),
        (released("1B", vision="current"), "parallel.vision_chunk_tiles=24", "parallel.vision_chunk_tiles=32"),
        (released("1B", vision="mxfp8"), "parallel.vision_chunk_tiles=16", "parallel.vision_chunk_tiles=32"),
        (released("1B", vision="blockwise"), "parallel.vision_chunk_tiles=16", "parallel.vision_chunk_tiles=128"),
        (released("78B", 8, language="mxfp8"), "data.seed=1", "parallel.tensor_size=4"),
    ]
    for config, change, proposal in cases:
        wrong = apply_overrides(config, [change])
        (line,) = problems(wrong)
        assert f"set {proposal}" in line, line
        fewer_tiles = ["data.tiles_per_row=2", "data.max_tiles=1"]
        assert problems(apply_overrides(wrong, [proposal, *fewer_tiles])) == []


def test_rows_divide_over_context_and_tensor_ranks() -> None:
    config = released("38B", 2, language="mxfp8")
    config = replace(config, parallel=replace(config.parallel, context_size=2))
    assert problems(apply_overrides(config, ["data.tokens_per_row=16384"])) == []
    (line,) = problems(apply_overrides(config, ["data.tokens_per_row=16416"]))
    assert "multiple of 128 (32 x parallel.context_size=2 x parallel.tensor_size=2)" in line
    whole = replace(config, parallel=replace(config.parallel, sequence_parallel=False))
    assert problems(apply_overrides(whole, ["data.tokens_per_row=16448"])) == []


def test_rows_without_their_padding_are_cut_to_what_both_need() -> None:
    """38B on two tensor-parallel ranks with sequence parallelism and two context-parallel ones, a ring: 4 tokens for the layout."""
    config = released("38B", 2, language="none")
    changes = {"context_size": 2, "context_ring_size": 2, "pad_rows": False}
    data = replace(config.data, sample_multiple_tokens=4)
    config = replace(config, parallel=replace(config.parallel, **changes), data=data)
    layout = plan(config, 8).layout
    assert cut_multiple(config, layout) == 4
    assert cut_multiple(replace(config, fp8=Fp8Config(language="current")), layout) == 16 * 2 * 2
    assert cut_multiple(replace(config, parallel=replace(config.parallel, pad_rows=True)), layout) is None


def test_tiles_are_filled_up_where_their_tokens_are_odd() -> None:
    """1025 tokens are no multiple of anything; the projector's 256 are of all."""
    for recipe, multiple in (("current", 16), ("mxfp8", 32), ("blockwise", 128)):
        assert tile_multiple(released("1B", vision=recipe)) == multiple
        assert tile_multiple(released("1B", projector=recipe)) == 1
    demo = replace(find_recipe("demo_digits"), fp8=Fp8Config(vision="current", projector="mxfp8"))
    assert tile_multiple(demo) == math.lcm(16, 32 // 4)  # 17 tokens in the encoder, 4 in the projector
    assert tile_multiple(replace(demo, fp8=Fp8Config())) == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["fp8.backend=transformer_engine", "device=cpu"], "device=cpu; set fp8.backend=emulated"),
        (["fp8.backend=transformer_engine", "kernels.layers=torch"], "leave kernels.layers out"),
        (["kernels.layers=torch"], "set fp8.backend=emulated"),
        (["fp8.backend=emulated", "kernels.layers=transformer_engine"], "leave kernels.layers out"),
        (["fp8.vision=current", "parallel.vision_sharding=sharded"], "parallel.vision_sharding=replicated"),
        (["fp8.language=delayed", "fp8.last_bf16_layers=1"], "set fp8.language=current, or set both to 0"),
        (["fp8.first_bf16_layers=20", "fp8.last_bf16_layers=8"], "lower them to 27 together"),
        (
            ["parallel.language_offload=true"],
            "set parallel.language_recompute=full, parallel.language_offload=false, or fp8",
        ),
        (["parallel.language_offload=true", "parallel.language_recompute=selective"], "or fp8.language=none"),
        (
            ["parallel.vision_offload=true", "fp8.vision=current"],
            "set parallel.vision_recompute=layer, parallel.vision_offl",
        ),
        (
            ["parallel.vision_offload=true", "fp8.projector=current"],
            "set parallel.vision_offload=false, or fp8.projector",
        ),
        (["fp8.first_bf16_layers=1", "fp8.language=none"], "needs fp8.language"),
        (["fp8.first_bf16_layers=1", "fp8.language=none", "fp8.vision=current"], "needs fp8.language"),
    ],
)
def test_rules_about_other_settings(changes: list[str], expected: str) -> None:
    (line,) = problems(apply_overrides(released("8B", language="current"), changes))
    assert expected in line


@pytest.mark.parametrize(
    "changes",
    [
        ["fp8.backend=emulated", "kernels.layers=torch"],
        ["fp8.backend=emulated", "fp8.vision=mxfp8", "parallel.vision_sharding=sharded"],
        ["fp8.backend=emulated", "fp8.language=delayed", "fp8.first_bf16_layers=2", "fp8.last_bf16_layers=1"],
        ["device=cpu", "dtype=fp32", "fp8.language=delayed", "fp8.history_steps=1"],
        ["fp8.first_bf16_layers=14", "fp8.last_bf16_layers=13"],
        ["parallel.language_offload=true", "parallel.language_recompute=full"],
        ["parallel.language_offload=true", "fp8.backend=emulated"],
        ["parallel.vision_offload=true", "fp8.vision=current", "parallel.vision_recompute=layer"],
        ["parallel.vision_offload=true"],
    ],
)
def test_what_goes_together(changes: list[str]) -> None:
    assert problems(apply_overrides(released("8B", language="current"), changes)) == []
