"""Weights of groups of data sets, as settings carry them: texts like `multimodal=3`."""

import re
from collections.abc import Sequence
from fractions import Fraction

from internvl_megatron.errors import ConfigError

_WEIGHT = re.compile(r"[0-9]{1,9}(\.[0-9]{1,6})?")


def parse_group_weights(texts: Sequence[str]) -> dict[str, Fraction]:
    """{name: weight} of texts like `multimodal=3`, by ascending name.

    Raises:
        ConfigError: a text is not a name and a weight, a weight is not a number above 0, or a group is there twice.
    """
    weights: dict[str, Fraction] = {}
    for text in texts:
        name, _, weight = (part.strip() for part in text.rpartition("="))
        if not name or not _WEIGHT.fullmatch(weight) or not Fraction(weight):
            raise ConfigError(
                f"data.group_weights: {text!r} is not a group and its weight, a number above 0 with up to six decimals: "
                "write it like language=1,multimodal=3"
            )
        if name in weights:
            raise ConfigError(f"data.group_weights: group {name!r} is there twice; give it one weight")
        weights[name] = Fraction(weight)
    if not weights:
        raise ConfigError(
            "data.group_weights: names no group; write it like language=1,multimodal=3, or set it to null"
        )
    return dict(sorted(weights.items()))
