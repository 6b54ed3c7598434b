"""The conversions: what is read, what is written, and how much at a time."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_convert import companions
from checkpoint_convert.conversion import Conversion, Group, Written, convert, make_shards
from checkpoint_convert.mapping import Entry, Layout, mapping
from checkpoint_convert.safetensors_writer import TensorSpec
from checkpoint_convert.sources import ParameterSource
from internvl_megatron.checkpoint import weights
from internvl_megatron.checkpoint.safetensors_folder import INDEX_END
from internvl_megatron.errors import CheckpointError

EXPORT_STEM = "model"


def to_megatron(source: ParameterSource, target: Path, file_bytes: int) -> Written:
    """Convert a source into weights that any layout can start from.

    Raises:
        CheckpointError: the target is taken, or cannot be written.
    """
    groups = [_whole(source, entry) for entry in mapping(source.model, "transformers")]

    def prepare(folder: Path) -> None:
        weights.write_model(folder, source.model)
        if source.companions is not None:
            companions.keep(source.companions, folder / weights.COMPANIONS)

    return convert(
        Conversion(
            target=target,
            shards=make_shards(groups, weights.FILE_STEM, file_bytes, always_numbered=True),
            index_name=weights.INDEX_FILE,
            fingerprint=_fingerprint(source, "megatron", source.companions),
            prepare=prepare,
            source_is_unchanged=_unchanged(source),
        )
    )


def to_huggingface(
    source: ParameterSource,
    target: Path,
    layout: Layout,
    dtype: torch.dtype | None,
    companion_folder: Path | None,
    file_bytes: int,
) -> Written:
    """Convert a source into a Hugging Face checkpoint.

    Args:
        source: any.
        target: folder to be made.
        layout: of the export.
        dtype: number format of all tensors; None = as they are.
        companion_folder: tokenizer and other files; None = what the source has.
        file_bytes: largest file.

    Raises:
        CheckpointError: the target is taken or cannot be written, or there is no tokenizer.
    """
    groups = [_parts(source, entry, dtype) for entry in mapping(source.model, layout)]
    shards = make_shards(groups, EXPORT_STEM, file_bytes, always_numbered=False)
    kinds = {spec.dtype for shard in shards for spec in shard.specs}
    name = str(next(iter(kinds)) if len(kinds) == 1 else torch.float32).removeprefix("torch.")
    beside = source.companions if companion_folder is None else companion_folder

    def prepare(folder: Path) -> None:
        companions.write_export(folder, source.model, layout, name, beside, source.title, source.max_tiles)

    return convert(
        Conversion(
            target=target,
            shards=shards,
            index_name=f"{EXPORT_STEM}{INDEX_END}" if len(shards) > 1 else None,
            fingerprint=_fingerprint(source, f"{layout}/{source.max_tiles}", beside),
            prepare=prepare,
            source_is_unchanged=_unchanged(source),
        )
    )


def _whole(source: ParameterSource, entry: Entry) -> Group:
    """A parameter as it is."""
    dtype = source.dtype(entry.name)
    return Group((TensorSpec(entry.name, dtype, entry.shape),), lambda: [source.read(entry.name).to(dtype)])


def _parts(source: ParameterSource, entry: Entry, dtype: torch.dtype | None) -> Group:
    """The Hugging Face tensors of a parameter."""
    kind = source.dtype(entry.name) if dtype is None else dtype
    specs = [TensorSpec(name, kind, shape) for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)]

    def make() -> list[Tensor]:
        parts = entry.transform.split(source.read(entry.name))
        return [_converted(name, part, kind) for name, part in zip(entry.hf_names, parts, strict=True)]

    return Group(tuple(specs), make)


def _converted(name: str, part: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another number format.

    Raises:
        CheckpointError: a value is too large for the format (fp16 ends at 65504).
    """
    converted = part.to(dtype)
    narrower = torch.finfo(dtype).max < torch.finfo(part.dtype).max
    if narrower and bool((converted.isinf() & ~part.isinf()).any()):
        raise CheckpointError(f"{name}: has values too large for {dtype}; use --dtype bf16 or fp32")
    return converted


def _unchanged(source: ParameterSource) -> Callable[[], bool]:
    before = source.fingerprint()
    return lambda: source.fingerprint() == before


def _fingerprint(source: ParameterSource, what: str, beside: Path | None) -> str:
    model = json.dumps(dataclasses.asdict(source.model), sort_keys=True)
    content = companions.content_digest(beside)
    return hashlib.sha256(f"{source.fingerprint()}/{what}/{content}/{model}".encode()).hexdigest()
