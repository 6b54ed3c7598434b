"""What a configuration with MPO must satisfy."""

from dataclasses import replace
from typing import Any

import pytest

from internvl_megatron.config.overrides import apply_overrides
from internvl_megatron.config.plan import plan
from internvl_megatron.config.recipes import find_recipe
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.errors import ConfigError

GOOD = ["data.meta=meta.json", "data.tokenizer=tokenizer", "loss.kind=mpo", "checkpoint.load=weights"]


def config_of(*overrides: str) -> RunConfig:
    return apply_overrides(find_recipe("internvl3_1b_sft"), [*GOOD, *overrides])


def test_a_good_one() -> None:
    plan(config_of(), 1)
    plan(config_of("mpo.reference_file=reference.jsonl"), 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoint.load=null"], "checkpoint.load is not set"),
        (["mpo.reference_file=a", "data.v2pe=random"], "set data.v2pe=fixed"),
        (["mpo.beta=0"], "mpo.beta=0.0 must be greater than 0"),
        (["mpo.beta=-1"], "mpo.beta=-1.0 must be at least 0"),
        (["mpo.preference_factor=0", "mpo.quality_factor=0", "mpo.generation_factor=0"], "all three factors are 0"),
        (["fp8.language=delayed"], "fp8.language=delayed"),
        (["data.tokens_per_row=4096"], "each answer of a pair may take half of it"),
        (["loss.kind=next_token", "mpo.beta=0.2"], "set loss.kind=mpo"),
    ],
)
def test_wrong_ones_say_what_to_set(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        plan(config_of(*overrides), 1)
    assert message in str(raised.value)


def test_replicas_trade_rows_whatever_the_mean_is_over() -> None:
    """With MPO no two rows meet in a micro-step."""
    config = config_of("loss.normalize=micro_batch")
    assert plan(config, 2).balance_rows
    without: Any = replace(config, loss=replace(config.loss, kind="next_token"))
    assert not plan(without, 2).balance_rows
