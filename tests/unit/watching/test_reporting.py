"""What is reported of a step: model FLOPs of what is trained, with the output layer where there is a loss."""

from types import SimpleNamespace
from typing import Any

import pytest

from internvl_megatron.config.overrides import apply_overrides
from internvl_megatron.config.recipes import demo_digits
from internvl_megatron.scaling.counts import TrainedParts, step_flops
from internvl_megatron.watching.reporting import needed_flops

AGREEMENT: Any = SimpleNamespace(num_tokens=900, table=range(12), attention_pairs=60_000, num_supervised_tokens=70)


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ([], TrainedParts()),
        (["optimizer.vision.trainable=false"], TrainedParts(vision="nothing")),
        (["optimizer.language.trainable=false"], TrainedParts(language="nothing")),
        (["lora.language_rank=4"], TrainedParts(language="adapters")),
    ],
)
def test_needed_flops_follow_what_is_trained(settings: list[str], trained: TrainedParts) -> None:
    config = apply_overrides(demo_digits(), settings)
    found = needed_flops(config, AGREEMENT)
    assert found == step_flops(config.model, 900, 12, 60_000, 70, trained).total
    whole = step_flops(config.model, 900, 12, 60_000, 70).total
    assert (found < whole) == bool(settings)
    language = config.model.language
    at_every_token = step_flops(config.model, 900, 12, 60_000, 900, trained).total
    passes = 3 if trained.language == "weights" else 2
    assert at_every_token - found == passes * 2 * 830 * language.hidden_size * language.vocab_size
