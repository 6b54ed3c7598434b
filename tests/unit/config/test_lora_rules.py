"""What `plan` says about low-rank adapters."""

from dataclasses import replace
from typing import Any

import pytest

from internvl_megatron.config.lora_rules import lora_problems
from internvl_megatron.config.overrides import apply_overrides, from_json, to_json
from internvl_megatron.config.plan import plan
from internvl_megatron.config.recipes import demo_digits
from internvl_megatron.config.schema import LoraConfig, RunConfig
from internvl_megatron.errors import ConfigError

GOOD = ("lora.language_rank=8", "lora.vision_rank=8", "checkpoint.load=weights")


def config(*overrides: str) -> RunConfig:
    base = demo_digits()
    base = replace(base, data=replace(base.data, meta="meta.json", tokenizer="tokenizer"))
    return apply_overrides(base, overrides)


def test_adapters_go_with_every_layout_of_the_language_model() -> None:
    assert lora_problems(config()) == []
    plan(config(*GOOD), 4)
    plan(config(*GOOD, "lora.layers=mlp", "lora.scale=0.5", "optimizer.projector.trainable=false"), 4)
    plan(config("lora.language_rank=8", "checkpoint.load=w", "parallel.vision_sharding=sharded"), 4)


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (("lora.language_rank=0",), r"lora.language_rank=0 must be greater than 0"),
        (("lora.scale=0",), r"lora.scale=0.0 must be greater than 0"),
        (("lora.vision_rank=-2",), r"lora.vision_rank=-2 must be at least 0"),
        (("lora.language_rank=100000",), r"lora.language_rank=100000: must be below model.language.hidden_size"),
        (("optimizer.language.trainable=false",), r"optimizer.language.trainable=false; set it to true"),
        (("optimizer.vision.trainable=false",), r"or leave lora.vision_rank out"),
        (("fp8.language=current",), r"lora.language_rank=8: not with fp8.language=current"),
        (("parallel.vision_sharding=sharded",), r"lora.vision_rank=8: not with parallel.vision_sharding=sharded"),
        (("checkpoint.load=null",), r"lora: adapters are added to weights, and checkpoint.load names none"),
        (
            ("lora.language_rank=null", "lora.vision_rank=null", "lora.layers=mlp"),
            r"lora.layers=mlp needs lora.language_rank",
        ),
    ],
)
def test_what_does_not_go_together_is_said(overrides: tuple[str, ...], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        plan(config(*GOOD, *overrides), 4)


def test_a_run_keeps_its_adapters(tmp_path: Any) -> None:
    path = tmp_path / "config.json"
    path.write_text(to_json(config(*GOOD)))
    assert from_json(path).lora == LoraConfig(language_rank=8, vision_rank=8)
