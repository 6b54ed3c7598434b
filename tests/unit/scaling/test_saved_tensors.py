"""What layers keep until their backward pass: sums written out here, and what a dry run has more of with more layers."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from internvl_megatron.config.models import INTERNVL3
from internvl_megatron.config.plan import plan
from internvl_megatron.config.schema import DataConfig, Fp8Config, LanguageConfig, ParallelConfig, RunConfig
from internvl_megatron.launcher import launch
from internvl_megatron.ranks import RankInfo
from internvl_megatron.scaling.memory import tile_activation_bytes
from internvl_megatron.scaling.saved_tensors import LayerKind, LayerShape, layer_shape, saved_bytes
from tests.support.layouts import ADAMW, run_config
from tests.support.models import small_model
from tools.dry_run import DrawnRows

QWEN_72B = INTERNVL3["78B"].language
TOKENS = 4096


def test_of_the_78b_transformer_engine_keeps_what_its_modules_save() -> None:
    """A token of a layer, in values: 8192 wide, 64 heads of 128 with 8 of keys, 29568 in the feed-forward layer."""
    kept = saved_bytes(LayerShape(QWEN_72B, TOKENS), "transformer_engine")
    norm = 2 * 8192 + 2 * 8192 + 4  # input, output, 1 / rms in fp32
    assert kept.norm_and_qkv == kept.norm_and_gate_up == TOKENS * norm
    assert kept.attention == TOKENS * (2 * (8192 + 1024 + 1024 + 8192) + 4 * 64)  # q, k, v, output; a sum a head
    assert kept.projection == 0, "its input is attention's output"
    assert kept.activation == TOKENS * 2 * 2 * 29568
    assert kept.down == TOKENS * 2 * 29568
    assert kept.total == TOKENS * (2 * norm + 2 * 18432 + 256 + 6 * 29568)


def test_in_fp8_inputs_of_products_are_half_as_large() -> None:
    kept = saved_bytes(LayerShape(QWEN_72B, TOKENS), "transformer_engine", in_fp8=True)
    assert kept.norm_and_qkv == TOKENS * (2 * 8192 + 8192 + 4)
    assert kept.projection == TOKENS * 8192, "rounded, beside attention's output"
    assert kept.down == TOKENS * 29568
    bf16 = saved_bytes(LayerShape(QWEN_72B, TOKENS), "transformer_engine")
    assert (kept.attention, kept.activation) == (bf16.attention, bf16.activation)


@pytest.mark.parametrize("kind", ["torch", "transformer_engine"])
def test_ranks_share_out_what_is_kept(kind: LayerKind) -> None:
    alone = saved_bytes(LayerShape(QWEN_72B, TOKENS), kind)
    tensor = saved_bytes(LayerShape(QWEN_72B, TOKENS, tensor_size=8, sequence_parallel=True), kind)
    assert tensor.total == alone.total / 8
    whole = saved_bytes(LayerShape(QWEN_72B, TOKENS, tensor_size=8), kind)
    assert whole.norm_and_qkv == alone.norm_and_qkv, "without sequence parallelism norms see all tokens"
    context = saved_bytes(LayerShape(QWEN_72B, TOKENS, context_size=8), kind)
    rest = (alone.total - alone.projection) / 8
    if kind == "torch":  # keys and values as they came with the queries, a head on each of the 8 ranks
        rest += TOKENS / 8 * 2 * 2 * 1024
    assert context.total - context.projection == rest
    assert context.projection == TOKENS / 8 * 2 * 8192, "attention's output is traded: the projection's is another"
    many = saved_bytes(LayerShape(QWEN_72B, TOKENS, tensor_size=4, context_size=4), "transformer_engine")
    assert many.attention == TOKENS / 4 * (2 * (2 * 2048 + 2 * 4 * 128) + 4 * 16), "a head of keys on each of 16 ranks"


def small(num_layers: int, parallel: ParallelConfig, fp8: Fp8Config) -> RunConfig:
    """Rows so long, and a feed-forward layer so wide, that a step has most while all layers' tensors are kept."""
    model = small_model("300m", num_layers=num_layers, ffn_hidden_size=192, num_kv_heads=1)
    data = DataConfig(tokens_per_row=2048, tiles_per_row=16, meta="not read", tokenizer="not read")
    rows = parallel.pipeline_size * 2
    return run_config(model, parallel=parallel, data=data, optimizer=ADAMW, rows_per_step=rows, dtype="bf16", fp8=fp8)


def peaks(info: RankInfo, configs: list[tuple[RunConfig, LayerKind]], image_share: float = 0.0) -> list[int]:
    """Of dry runs."""
    from tools.fake_step import dry_run

    found = []
    for config, layers in configs:
        parallel = config.parallel
        num_ranks = parallel.tensor_size * parallel.context_size * parallel.pipeline_size
        rows = DrawnRows(config, plan(config, num_ranks), image_share=image_share)
        [run] = dry_run(info, config, num_ranks, [0], rows, layers)
        found.append(run.figures.peak_bytes)
    return found


FEW, MANY = 2, 6
LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "TP2": {"tensor_size": 2},
    "TP2+SP": {"tensor_size": 2, "sequence_parallel": True},
    "CP2": {"context_size": 2},
}
KINDS: dict[str, tuple[LayerKind, Fp8Config]] = {
    "torch": ("torch", Fp8Config()),
    "TE bf16": ("transformer_engine", Fp8Config()),
    "TE FP8": ("transformer_engine", Fp8Config(language="current")),
}


@cache
def growth(layout: str) -> dict[str, float]:
    """By kind of layers: bytes of the peak for each layer more."""
    parallel = ParallelConfig(prepare_ahead=False, **LAYOUTS[layout])
    configs = [(small(count, parallel, fp8), layers) for layers, fp8 in KINDS.values() for count in (FEW, MANY)]
    [found] = launch(peaks, 1, configs, device="cpu")
    pairs = zip(found[::2], found[1::2], strict=True)
    return {kind: (many - few) / (MANY - FEW) for kind, (few, many) in zip(KINDS, pairs, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dry_run_keeps_as_much_more_for_each_layer_more(layout: str, kind: str) -> None:
    layers, fp8 = KINDS[kind]
    config = small(FEW, ParallelConfig(**LAYOUTS[layout]), fp8)
    expected = saved_bytes(layer_shape(config), layers, in_fp8=kind == "TE FP8").total
    if kind == "TE FP8":
        expected += 2 * matrices(config.model.language) / config.parallel.tensor_size
    assert growth(layout)[kind] == pytest.approx(expected, rel=0.01)


def matrices(language: LanguageConfig) -> int:
    """Weights of a layer's four linear layers."""
    heads, keys = language.num_heads * language.head_size, language.num_kv_heads * language.head_size
    return language.hidden_size * (2 * heads + 2 * keys + 3 * language.ffn_hidden_size)


@pytest.mark.parametrize("family", ["300m", "6b"])
def test_an_encoder_layer_keeps_what_is_foretold(family: str) -> None:
    """The 6B's has norms of queries and keys beside. Not in it: numbers a token, of norms and attention."""
    data = DataConfig(tokens_per_row=1024, tiles_per_row=256, meta="not read", tokenizer="not read")
    configs = []
    for num_layers in (FEW, MANY):
        model = small_model(family, num_layers=2)
        model = replace(model, vision=replace(model.vision, num_layers=num_layers))
        parallel = ParallelConfig(prepare_ahead=False, vision_chunk_tiles=256)
        configs.append(run_config(model, parallel=parallel, data=data, optimizer=ADAMW, rows_per_step=1, dtype="bf16"))
    [[few, many]] = launch(peaks, 1, [(config, "transformer_engine") for config in configs], 0.75, device="cpu")
    drawn = DrawnRows(configs[0], plan(configs[0], 1), 0.75)(0, 0).rows
    one_layer = tile_activation_bytes(replace(configs[0].model.vision, num_layers=1))
    assert (many - few) / (MANY - FEW) == pytest.approx(drawn[0].num_tiles * one_layer, rel=0.05)
