"""FLOPs of a step under every convention, against sums written out by hand and the trainer's own count."""

import pytest

from internvl_megatron.scaling.counts import layer_flops, output_layer_flops, step_flops
from tools.gpu_cases import benchmark_rows, model_of
from tools.step_work import StepWork, shares, speed

MODEL = model_of("1B", is_dry=False)
WORK = StepWork(
    num_samples=2, num_images=1, num_tiles=3, num_tokens=1500, num_supervised_tokens=100, attention_pairs=1_250_000
)


def test_conventions_differ_by_attention_and_head_alone() -> None:
    language = MODEL.language
    counted_by_trainer = step_flops(MODEL, 1500, 3, 1_250_000, num_supervised_tokens=100).total
    assert WORK.flops(MODEL) == WORK.flops(MODEL, "causal", "supervised") == counted_by_trainer
    # scores and weighted sum, 2 each per value of a head, for the other half of the pairs; forward and twice backward
    other_half = 3 * language.num_layers * 2 * 1_250_000 * language.num_heads * language.head_size
    assert WORK.flops(MODEL, "full", "supervised") - counted_by_trainer == other_half
    head = 2 * language.hidden_size * language.vocab_size
    assert WORK.flops(MODEL, "causal", "all") - counted_by_trainer == 3 * 1400 * head


def test_a_dense_model_is_six_flops_per_weight_and_token() -> None:
    language = MODEL.language
    layers = language.num_layers * layer_flops(language, 1, 0) // 2  # weights of the layers
    text = StepWork(1, 0, 0, 1000, 1000, 0)
    weights = layers + language.hidden_size * language.vocab_size
    assert text.flops(MODEL) == 6 * weights * 1000


def test_speed_is_work_over_seconds() -> None:
    found = speed(WORK, MODEL, seconds=2.0, peak_flops=1e15)
    assert found["tokens_per_second"] == 750
    assert found["samples_per_second"] == 1
    assert found["images_per_second"] == 0.5
    assert found["mfu"]["full_attention_all_head"] == pytest.approx(WORK.flops(MODEL, "full", "all") / 2e15)
    assert found["model_tflops_per_second"]["causal_attention_supervised_head"] == pytest.approx(
        WORK.flops(MODEL) / 2e12
    )


def test_work_of_rows_is_counted_from_their_samples() -> None:
    model = model_of("1B", is_dry=True)
    rows = benchmark_rows(model, 3, 4096)
    work = StepWork.of_rows(rows)
    lengths = [length for row in rows for length in row.segment_lengths[: row.num_samples].tolist()]
    assert work.num_samples == len(lengths)
    assert work.num_tokens == sum(lengths)
    assert work.attention_pairs == sum(length**2 for length in lengths)
    assert work.num_supervised_tokens == sum(int((row.targets >= 0).sum()) for row in rows)
    assert work.num_tiles * 16 == sum(int((row.token_ids == 511).sum()) for row in rows)


def test_shares_of_head_and_vision() -> None:
    found = shares(WORK, MODEL)
    assert found["head_flops_share"] == pytest.approx(3 * output_layer_flops(MODEL.language, 100) / WORK.flops(MODEL))
    assert found["image_token_share"] == 3 * 256 / 1500
    assert 0.25 < found["head_and_embedding_parameter_share"] < 0.35  # 272 M of 938 M
