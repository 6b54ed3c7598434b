"""Compare two checkpoints of any kind parameter by parameter, bit for bit."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from checkpoint_convert.mapping import mapping
from checkpoint_convert.sources import ParameterSource
from internvl_megatron.checkpoint.weights import TRAINING_ONLY
from internvl_megatron.config.overrides import changed_fields

ROUNDED = ", by rounding"
VOCABULARY_TABLES = ("language.embedding.word_embeddings.weight", "language.output_layer.weight")


@dataclass(frozen=True)
class Difference:
    """A parameter that is not the same in both."""

    name: str
    reason: str


@dataclass
class Comparison:
    """What was found."""

    num_parameters: int = 0
    num_equal: int = 0
    num_rounded: int = 0
    """Differences that are another number format of the same values and nothing else."""
    differences: list[Difference] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    """Settings of the model that differ, as `a -> b`."""

    @property
    def same(self) -> bool:
        """Whether both hold the same model."""
        return not self.differences and not self.settings


def compare(
    one: ParameterSource, other: ParameterSource, progress: Callable[[int], object] | None = None
) -> Comparison:
    """Compare all parameters, one at a time, but for the rows that pad the vocabulary.

    Values of different number formats are compared as they are, in fp32: a bf16 checkpoint and its fp32 copy are reported
    as another format with equal values, which is a difference.
    """
    found = Comparison()
    for name in changed_fields(one.model, other.model):
        if name not in TRAINING_ONLY:
            found.settings.append(f"{name}: {_value(one, name)} -> {_value(other, name)}")
    shapes = [{entry.name: entry.shape for entry in mapping(source.model, "transformers")} for source in (one, other)]
    for name in dict.fromkeys([*shapes[0], *shapes[1]]):
        found.num_parameters += 1
        reason = _reason(one, other, name, [shape.get(name) for shape in shapes])
        if reason is None:
            found.num_equal += 1
        else:
            found.differences.append(Difference(name, reason))
            found.num_rounded += reason.endswith(ROUNDED)
        if progress is not None:
            progress(1)
    return found


def _reason(
    one: ParameterSource, other: ParameterSource, name: str, shapes: list[tuple[int, ...] | None]
) -> str | None:
    """Why a parameter is not the same; None if it is."""
    if shapes[0] != shapes[1]:
        return f"shape {shapes[0]} and {shapes[1]}"
    kinds = one.dtype(name), other.dtype(name)
    real = slice(one.model.language.vocab_size if name in VOCABULARY_TABLES else None)
    first, second = one.read(name)[real], other.read(name)[real]
    if kinds[0] == kinds[1] and torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8)):
        return None
    gap = (first.float() - second.float()).abs().max().item()
    if kinds[0] != kinds[1]:
        rounded = torch.equal(first.to(kinds[1]), second) or torch.equal(second.to(kinds[0]), first)
        return f"{kinds[0]} and {kinds[1]}, largest difference {gap:.3g}{ROUNDED if rounded else ''}"
    return f"largest difference {gap:.3g}"


def _value(source: ParameterSource, path: str) -> object:
    value: object = source.model
    for part in path.split("."):
        value = getattr(value, part)
    return value
