"""Say what a folder holds, from its headers alone."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint_convert.companions import has_tokenizer
from checkpoint_convert.mapping import mapping
from checkpoint_convert.sources import HuggingFaceSource, ParameterSource, TrainingSource, open_source
from internvl_megatron.config.models import INTERNVL3
from internvl_megatron.config.schema import ModelConfig
from internvl_megatron.scaling.counts import parameter_counts


@dataclass(frozen=True)
class Report:
    """Lines of (what, value)."""

    lines: list[tuple[str, str]]

    def __str__(self) -> str:
        """For people."""
        width = max(len(what) for what, _ in self.lines)
        return "\n".join(f"{what:{width}s}  {value}" for what, value in self.lines)


def inspect(path: Path) -> Report:
    """Open a checkpoint of any kind, which checks all names, shapes and number formats, and describe it.

    Raises:
        CheckpointError: it cannot be opened, or does not fit its configuration; says everything that is wrong.
    """
    source = open_source(path)
    model, counts = source.model, parameter_counts(source.model)
    entries = mapping(model, "transformers")
    kinds: Counter[torch.dtype] = Counter()
    for entry in entries:
        kinds[source.dtype(entry.name)] += torch.Size(entry.shape).numel()
    formats = ", ".join(
        f"{str(kind).removeprefix('torch.')} {count / 1e9:.3f} B" for kind, count in kinds.most_common()
    )
    vision, language = model.vision, model.language
    return Report(
        [
            ("kind", _kind(source)),
            ("folder", str(source.path)),
            ("size", _size_name(model)),
            ("parameters", f"{counts.total / 1e9:.3f} B: vision {counts.vision / 1e6:.1f} M, projector "
             f"{counts.projector / 1e6:.1f} M, language {counts.language / 1e6:.1f} M"),
            ("vision", f"{vision.num_layers} layers of {vision.hidden_size}, {vision.num_heads} heads, FFN "
             f"{vision.ffn_hidden_size}, {vision.norm}{', qk-norm' if vision.qk_norm else ''}, tile {vision.tile_pixels}"),
            ("language", f"{language.family}, {language.num_layers} layers of {language.hidden_size}, "
             f"{language.num_heads}/{language.num_kv_heads} heads of {language.head_size}, FFN "
             f"{language.ffn_hidden_size}, vocabulary {language.vocab_size}, rope {language.rope_theta:g}"),
            ("stored as", formats + ("" if isinstance(source, HuggingFaceSource) else " (vocabulary padded)")),
            ("whole", f"yes: all {len(entries)} parameters, with the shapes of the configuration"),
            ("tokenizer", "yes" if source.companions and has_tokenizer(source.companions) else "none"),
            ("beside it", _companions(source)),
        ]
    )  # fmt: skip


def _kind(source: ParameterSource) -> str:
    if isinstance(source, HuggingFaceSource):
        return f"Hugging Face, layout {source.layout}"
    if isinstance(source, TrainingSource):
        return (
            f"checkpoint of run {source.run_config.name!r}, step {source.info.step}, written as {source.info.layout}"
        )
    return "converted weights for internvl_megatron"


def _size_name(model: ModelConfig) -> str:
    """Name of the released size with these numbers."""
    for name, released in INTERNVL3.items():
        same_language = {**vars(released.language), "vocab_size": model.language.vocab_size} == vars(model.language)
        if same_language and released.vision == model.vision:
            return f"InternVL3-{name}"
    return "none of the released ones"


def _companions(source: ParameterSource) -> str:
    if source.companions is None or not source.companions.is_dir():
        return "nothing"
    return ", ".join(sorted(path.name for path in source.companions.iterdir() if path.suffix != ".safetensors"))
