"""Where parameters come from: Hugging Face folders, converted weights, checkpoints of runs, all seen alike.

A source gives whole parameters under our names, one at a time, as they are stored: nothing is rounded.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_convert.conversion import JOB_FILE, PARTIAL_END
from checkpoint_convert.hf_config import CONFIG_FILE, Fields, layout_of, read_json, read_model
from checkpoint_convert.mapping import Entry, Layout, check_fit, mapping, on_disk_name
from checkpoint_convert.transforms import Same
from internvl_megatron.checkpoint import adapter_base, folders, weights
from internvl_megatron.checkpoint.safetensors_folder import DTYPES, SafetensorsFolder
from internvl_megatron.config.overrides import CONFIG_FILE as RUN_CONFIG_FILE
from internvl_megatron.config.overrides import from_json
from internvl_megatron.config.schema import ModelConfig
from internvl_megatron.errors import CheckpointError, ConfigError
from internvl_megatron.model.bit_sum import bit_sum

ADAPTER_ENDS = (".lora_a", ".lora_b")
"""What the names of an adapter's two matrices end with (`model.adapter`, which costs seconds to import)."""


class ParameterSource(ABC):
    """Every parameter of a model, whole, under our names."""

    path: Path
    model: ModelConfig
    companions: Path | None = None
    """Folder of the files beside the weights."""
    max_tiles: int | None = None
    """Tiles an image may be cut into, where the source itself says it."""

    @property
    def title(self) -> str:
        """What to call it in a note."""
        return self.path.resolve().name

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Number format of a parameter."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """A parameter over all ranks; may be a view of a mapped file, not to be changed."""

    @abstractmethod
    def files(self) -> list[Path]:
        """The files the weights are in."""

    def fingerprint(self) -> str:
        """Changes when the weights are written again: names, sizes and times of their files."""
        digest = hashlib.sha256()
        for path in self.files():
            status = path.stat()
            digest.update(f"{path.name}/{status.st_size}/{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()


class HuggingFaceSource(ParameterSource):
    """A folder in one of the two Hugging Face layouts."""

    def __init__(self, path: Path) -> None:
        """Open the folder and compare all of its tensors with what its config.json says.

        Raises:
            CheckpointError: a file is missing or damaged, or tensors do not fit; lists them.
        """
        self.path = self.companions = path
        self.config: Fields = read_json(path / CONFIG_FILE)
        self.layout: Layout = layout_of(self.config)
        self.model = read_model(self.config)
        self.tensors = SafetensorsFolder.open(path)
        self.stored_names = stored_names(self.tensors, self.layout)
        self.entries = {entry.name: entry for entry in mapping(self.model, self.layout)}
        self._untie()
        shapes = {name: self.tensors[stored].shape for name, stored in self.stored_names.items()}
        check_fit(list(self.entries.values()), shapes, str(path), _hint(self.config, self.layout))
        check_dtypes(self.tensors, list(self.entries.values()), self.stored_names)

    def _untie(self) -> None:
        """A checkpoint that says itself that its head is tied is read as what it computes: the head is a copy."""
        head, table = (f"language.{name}.weight" for name in ("output_layer", "embedding.word_embeddings"))
        (head_name,), (table_name,) = self.entries[head].hf_names, self.entries[table].hf_names
        says_tied = self.config.values.get("tie_word_embeddings") is True
        if says_tied and head_name not in self.stored_names and table_name in self.stored_names:
            self.stored_names[head_name] = self.stored_names[table_name]

    def dtype(self, name: str) -> torch.dtype:
        """Number format of a parameter."""
        stored = self.stored_names[self.entries[name].hf_names[0]]
        return getattr(torch, DTYPES[self.tensors[stored].dtype])

    def read(self, name: str) -> Tensor:
        """A parameter over all ranks."""
        entry = self.entries[name]
        return entry.transform.join([self.tensors.read(self.stored_names[part]) for part in entry.hf_names])

    def files(self) -> list[Path]:
        """The safetensors files."""
        return [self.path / CONFIG_FILE, *self.tensors.paths]


class WeightsSource(ParameterSource):
    """A folder of converted weights."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = weights.read_model(path)
        self.companions = weights.companions_of(path)
        self.tensors = SafetensorsFolder.open(path)
        shapes = {name: info.shape for name, info in self.tensors.items()}
        check_fit(own_entries(self.model), shapes, str(path))
        check_dtypes(self.tensors, own_entries(self.model), {name: name for name in self.tensors})

    def dtype(self, name: str) -> torch.dtype:
        """Number format of a parameter."""
        return getattr(torch, DTYPES[self.tensors[name].dtype])

    def read(self, name: str) -> Tensor:
        """A parameter over all ranks."""
        return self.tensors.read(name)

    def files(self) -> list[Path]:
        """The safetensors files."""
        return [self.path / weights.MODEL_FILE, *self.tensors.paths]


class TrainingSource(ParameterSource):
    """A checkpoint of a run, whatever layout wrote it."""

    def __init__(self, path: Path) -> None:
        # Costs a second, which the other kinds need not wait.
        from checkpoint_convert.distributed_checkpoint import DistributedCheckpoint

        self.path = path
        self.info = folders.read_info(path)
        run = path.parent.parent
        try:
            self.run_config = from_json(run / RUN_CONFIG_FILE)
        except ConfigError as error:
            raise CheckpointError(f"{path}: the run's configuration cannot be read: {error}") from error
        self.model, self.max_tiles = self.run_config.model, self.run_config.data.max_tiles
        self.companions = weights.companions_of(path)
        if self.companions is None and Path(self.run_config.data.tokenizer).is_dir():
            self.companions = Path(self.run_config.data.tokenizer)
        self.stored = DistributedCheckpoint(path)
        self._check_fit({name: shape for name in self.stored.names if (shape := self.stored.shape(name))})

    def _check_fit(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Compare what the checkpoint has with the model's parameters."""
        check_fit(own_entries(self.model), shapes, str(self.path))

    @property
    def title(self) -> str:
        """Name and step of the run."""
        return f"run {self.run_config.name}, step {self.info.step}"

    def dtype(self, name: str) -> torch.dtype:
        """Number format of a parameter."""
        return self.stored.dtype(name)

    def read(self, name: str) -> Tensor:
        """A parameter over all ranks, in memory."""
        return self.stored.read(name)

    def files(self) -> list[Path]:
        """The marker and the files of all ranks."""
        return [self.path / folders.MARKER, *sorted(self.path.glob("*.distcp"))]


class AdapterSource(TrainingSource):
    """A checkpoint of a run with adapters, merged with the weights they belong to: W + scale * B A."""

    def _check_fit(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Open the weights below, and compare both together with the model's parameters."""
        note = adapter_base.read_base(self.path)
        self.base = open_source(adapter_base.base_folder(self.path, note))
        if not weights.same_weights(self.base.model, self.model):
            raise CheckpointError(f"{self.path}: its adapters belong to {self.base.path}, which holds another model")
        self.base_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[note.dtype]
        self.sums = note.sums
        entries = own_entries(self.model)
        trained = {name: shape for name, shape in shapes.items() if not name.endswith(ADAPTER_ENDS)}
        below = {entry.name: entry.shape for entry in entries if entry.name in note.sums}
        check_fit(entries, trained | below, str(self.path))
        self.adapted = {
            f"{name.removesuffix(ADAPTER_ENDS[0])}.weight" for name in shapes if name.endswith(ADAPTER_ENDS[0])
        }
        ours = {entry.name: entry.shape for entry in entries}
        for name in self.adapted:
            matrices = [shapes.get(name.removesuffix(".weight") + end, ()) for end in ADAPTER_ENDS]
            outputs = math.prod(matrices[1][:-1])
            if name not in ours or ours[name] != (outputs, *matrices[0][1:]) or matrices[0][:1] != matrices[1][-1:]:
                raise CheckpointError(f"{self.path}: the adapter of {name} has shapes {matrices}, which do not fit it")

    def dtype(self, name: str) -> torch.dtype:
        """Number format of a parameter: the run's."""
        return self.base_dtype

    def read(self, name: str) -> Tensor:
        """A parameter over all ranks; with an adapter merged it is fp32, for whoever wants it in that."""
        if name not in self.sums:
            return self.stored.read(name)
        below = self.base.read(name).to(self.base_dtype)
        found = {name: bit_sum(below, self.base_dtype)}
        adapter_base.check_sums(self.path, {name: self.sums[name]}, found, str(self.base.path))
        if name not in self.adapted:
            return below
        a, b = (self.stored.read(name.removesuffix(".weight") + end).float() for end in ADAPTER_ENDS)
        return below.float() + self.run_config.lora.scale * (b.flatten(0, -2) @ a)

    def files(self) -> list[Path]:
        """Of the checkpoint and of what is below."""
        return [*super().files(), self.path / adapter_base.BASE_FILE, *self.base.files()]


def open_source(path: Path) -> ParameterSource:
    """Open whatever a folder holds; a run stands for its newest checkpoint.

    Raises:
        CheckpointError: it holds nothing that can be read, or something damaged.
    """
    if not path.is_dir():
        what = "is a file; give the folder it is in" if path.exists() else "no such folder"
        raise CheckpointError(f"{path}: {what}")
    if path.name.endswith(PARTIAL_END) and (path / JOB_FILE).is_file():
        raise CheckpointError(f"{path}: is a conversion that is not finished; repeat its command")
    if weights.is_weights_folder(path):
        return WeightsSource(path)
    checkpoints = folders.finished(path / folders.CHECKPOINTS)
    checkpoint = checkpoints[-1] if checkpoints else path
    if (checkpoint / folders.MARKER).is_file():
        return (AdapterSource if adapter_base.is_adapter_checkpoint(checkpoint) else TrainingSource)(checkpoint)
    if (path / CONFIG_FILE).is_file() and not (path / folders.CHECKPOINTS).is_dir():
        return HuggingFaceSource(path)
    raise CheckpointError(
        f"{path}: holds no checkpoint: neither config.json of a Hugging Face checkpoint, nor {weights.MODEL_FILE} of "
        f"converted weights, nor a finished checkpoint of a run ({folders.MARKER})"
    )


def stored_names(tensors: SafetensorsFolder, layout: Layout) -> dict[str, str]:
    """The table's name to the stored name of every tensor: transformers' have two styles."""
    if layout == "internvl-chat":
        return {name: name for name in tensors}
    found: dict[str, str] = {}
    for stored in tensors:
        name = on_disk_name(stored)
        if name in found:
            raise CheckpointError(
                f"{tensors.folder}: {found[name]} and {stored} are two names of one tensor; keep one"
            )
        found[name] = stored
    return found


def own_entries(model: ModelConfig) -> list[Entry]:
    """The table with our names on both sides."""
    return [Entry(entry.name, entry.shape, (entry.name,), Same()) for entry in mapping(model, "transformers")]


def check_dtypes(tensors: SafetensorsFolder, entries: list[Entry], stored: dict[str, str]) -> None:
    """Refuse number formats that are not weights' (quantised checkpoints), and mixtures inside one parameter.

    Raises:
        CheckpointError: lists the tensors.
    """
    problems = []
    for entry in entries:
        kinds = [tensors[stored[name]].dtype for name in entry.hf_names]
        if len(set(kinds)) > 1 or kinds[0] not in DTYPES:
            problems += [f"{name} is {kind}" for name, kind in zip(entry.hf_names, kinds, strict=True)]
    if problems:
        lines = "\n  ".join(problems)
        raise CheckpointError(
            f"{tensors.folder}: {len(problems)} tensors have another number format than {', '.join(DTYPES)}, or than the "
            f"tensors they are joined with; take the unquantised checkpoint\n  {lines}"
        )


def _hint(config: Fields, layout: Layout) -> str:
    """What often is the reason."""
    vision = config.section("vision_config").values
    bias = "attention_bias" if layout == "transformers" else "qkv_bias"
    return (
        f" of {config.path.name} (vision_config: {vision.get('num_hidden_layers')} layers of {vision.get('hidden_size')}, "
        f"norm_type {vision.get('norm_type')}, {bias} {vision.get(bias)}; tie_word_embeddings "
        f"{config.values.get('tie_word_embeddings')}; InternVL3 has a head of its own in every size)"
    )
