"""What native pre-training starts from: a bare InternViT and a bare language model, joined.

The projector is fresh. The vocabulary becomes the tokenizer's length with InternVL's nine tokens, which for Qwen2.5 cuts
the padding rows off its tables (151936 or 152064 rows to 151674). As InternVL's own training code does it:

* input rows of the nine: what stands there, for Qwen2.5 its unused padding rows; fresh rows where the table is shorter;
* output rows of the nine: the mean of all older rows, in the table's number format;
* a tied head (Qwen2.5-0.5B and 1.5B) becomes a head of its own, after the nine rows were set: they are the mean in both.

How InternVL3's own pre-training initialised them was never published.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from checkpoint_convert.companions import write_json
from checkpoint_convert.hf_config import (
    CONFIG_FILE,
    VISION_TYPES,
    check_sizes,
    language_type,
    read_json,
    read_language,
    read_vision,
)
from checkpoint_convert.hf_config_write import read_serving_facts, write_config
from checkpoint_convert.mapping import PREFIXES, Entry, Layout, check_fit, mapping
from checkpoint_convert.sources import ParameterSource, check_dtypes
from checkpoint_convert.transforms import PaddedVocab
from internvl_megatron.checkpoint.safetensors_folder import DTYPES, SafetensorsFolder
from internvl_megatron.config.schema import ModelConfig
from internvl_megatron.data.tokenizer import INTERNVL_TOKENS, load_tokenizer
from internvl_megatron.data.tokenizer_extend import add_internvl_tokens
from internvl_megatron.errors import CheckpointError, DataError
from internvl_megatron.model.initial import fresh_parameter
from internvl_megatron.model.position_table import interpolate_positions

EMBEDDING = "language.embedding.word_embeddings.weight"
HEAD = "language.output_layer.weight"
POSITIONS = "vision.position_embedding"
SHUFFLE_FACTOR = 2


class _Part:
    """A checkpoint of one part of the model, in whichever layout."""

    def __init__(
        self, path: Path, model: ModelConfig, layout: Layout, part: str, optional: tuple[str, ...] = ()
    ) -> None:
        """Open it; tensors of `optional` parameters may be absent."""
        prefix = PREFIXES[layout][part]
        self.tensors = SafetensorsFolder.open(path)
        entries = [
            replace(entry, hf_names=tuple(name.removeprefix(prefix) for name in entry.hf_names))
            for entry in mapping(model, layout)
            if entry.part == part
        ]
        present = [e for e in entries if e.name not in optional or set(e.hf_names) & self.tensors.keys()]
        check_fit(present, {name: info.shape for name, info in self.tensors.items()}, str(path))
        check_dtypes(self.tensors, present, {name: name for name in self.tensors})
        self.entries: dict[str, Entry] = {entry.name: entry for entry in present}

    def dtype(self, name: str) -> torch.dtype:
        return getattr(torch, DTYPES[self.tensors[self.entries[name].hf_names[0]].dtype])

    def parts(self, name: str) -> list[Tensor]:
        """The Hugging Face tensors of a parameter."""
        return [self.tensors.read(hf_name) for hf_name in self.entries[name].hf_names]


class BasePairSource(ParameterSource):
    """A model made of a bare vision encoder and a bare language model."""

    def __init__(self, vision: Path, language: Path, tokenizer: Path, seed: int, tile_pixels: int | None) -> None:
        """Open both.

        Args:
            vision: folder of an InternViT, in OpenGVLab's layout or transformers'.
            language: folder of a Qwen2 or InternLM model.
            tokenizer: folder of its tokenizer, InternVL's tokens included; becomes the folder of companions.
            seed: of the fresh parameters.
            tile_pixels: side of a tile; None = what the encoder was trained with. The position table is resized.

        Raises:
            CheckpointError: a part cannot be read, or is another kind of model.
        """
        vision_config, language_config = read_json(vision / CONFIG_FILE), read_json(language / CONFIG_FILE)
        kind = vision_config.values.get("model_type")
        if kind not in VISION_TYPES:
            raise CheckpointError(
                f"{vision_config.path}: model_type is {kind!r}, not one of an InternViT ({', '.join(VISION_TYPES)})"
            )
        stored_vision = read_vision(vision_config, SHUFFLE_FACTOR)
        stored = ModelConfig(vision=stored_vision, language=read_language(language_config))
        loaded = load_tokenizer(tokenizer)
        self.num_old_tokens = len(loaded) - len(INTERNVL_TOKENS)
        if {loaded.find(token) for token in INTERNVL_TOKENS} != set(range(self.num_old_tokens, len(loaded))):
            raise CheckpointError(
                f"{tokenizer}: InternVL's nine tokens are not its last ones, so it is not clear which rows are new; start "
                "from the base model's own tokenizer (--tokenizer DIR)"
            )
        if self.num_old_tokens > stored.language.vocab_size:
            raise CheckpointError(
                f"{language}: its tables have {stored.language.vocab_size} rows, its tokenizer {self.num_old_tokens} tokens "
                "besides InternVL's: they do not belong together"
            )
        self.path, self.companions, self.seed = language, tokenizer, seed
        self.model = ModelConfig(
            vision=stored_vision if tile_pixels is None else replace(stored_vision, tile_pixels=tile_pixels),
            language=replace(stored.language, vocab_size=len(loaded)),
        )
        pixels, unit = self.model.vision.tile_pixels, self.model.vision.patch_pixels * SHUFFLE_FACTOR
        if pixels < unit or pixels % unit:
            raise CheckpointError(
                f"{vision_config.path}: a tile of {pixels} pixels is not a multiple of {unit} ({SHUFFLE_FACTOR} patches); give "
                "another size, as 448 (--tile-pixels 448)"
            )
        check_sizes(vision_config, self.model)
        says_tied = language_config.flag("tie_word_embeddings", False)
        self.vision = _Part(vision, stored, "internvl-chat" if kind == "intern_vit_6b" else "transformers", "vision")
        fused: Layout = "internvl-chat" if language_type(language_config) == "internlm2" else "transformers"
        self.language = _Part(language, stored, fused, "language", optional=(HEAD,) if says_tied else ())
        # transformers keeps both tables too if they are there and differ.
        self.is_tied = says_tied and self._tables_are_one()
        self._shapes = {entry.name: entry.shape for entry in mapping(self.model, "transformers")}
        facts = read_serving_facts(
            language_config, str(self.dtype(EMBEDDING)).removeprefix("torch."), loaded.image_context_id
        )
        write_json(tokenizer / CONFIG_FILE, write_config(self.model, "internvl-chat", facts, None))

    def dtype(self, name: str) -> torch.dtype:
        """Number format of a parameter; fresh ones have that of the language model."""
        if name.startswith("vision.projector."):
            return self.dtype(EMBEDDING)
        if name == HEAD and self.is_tied:
            name = EMBEDDING
        return (self.vision if name.startswith("vision.") else self.language).dtype(name)

    def read(self, name: str) -> Tensor:
        """A parameter over all ranks."""
        if name.startswith("vision.projector."):
            return fresh_parameter(name, self._shapes[name], self.model, self.seed).to(self.dtype(name))
        if name in (EMBEDDING, HEAD):
            return self._table(name)
        part = self.vision if name.startswith("vision.") else self.language
        whole = part.entries[name].transform.join(part.parts(name))
        if name == POSITIONS:
            side = self.model.vision.patches_per_side
            return interpolate_positions(whole, side, side).to(whole.dtype)
        return whole

    def files(self) -> list[Path]:
        """The files of both parts."""
        folders = {self.vision.tensors.folder, self.language.tensors.folder}
        configs = [folder / CONFIG_FILE for folder in sorted(folders)]
        return [*configs, *self.vision.tensors.paths, *self.language.tensors.paths]

    def fingerprint(self) -> str:
        """As of every source, and the seed."""
        return f"{super().fingerprint()}/{self.seed}"

    def _tables_are_one(self) -> bool:
        if HEAD not in self.language.entries:
            return True
        (table,), (head,) = self.language.parts(EMBEDDING), self.language.parts(HEAD)
        return torch.equal(table, head)

    def _table(self, name: str) -> Tensor:
        """A table over the vocabulary, with the nine rows."""
        vocab = self.model.language.vocab_size
        (old,) = self.language.parts(EMBEDDING if self.is_tied else name)
        table = old[:vocab]
        if len(table) < vocab:
            fresh = fresh_parameter(name, (vocab, old.shape[1]), self.model, self.seed)
            table = torch.cat([table, fresh[len(table) :].to(old.dtype)])
        if name == HEAD or self.is_tied:
            older = table[: self.num_old_tokens]
            mean = older.mean(dim=0, keepdim=True)
            table = torch.cat([older, mean.expand(vocab - self.num_old_tokens, -1)])
        return PaddedVocab(vocab, self._shapes[name][0]).join([table])


@contextmanager
def open_base_pair(
    vision: Path, language: Path, tokenizer: Path | None, seed: int, tile_pixels: int | None
) -> Iterator[BasePairSource]:
    """Join a pair; its tokenizer with InternVL's tokens lives as long as the block.

    Args:
        vision: folder of an InternViT.
        language: folder of a language model.
        tokenizer: folder of the language model's tokenizer; None = the language model's own folder.
        seed: of the fresh parameters.
        tile_pixels: see `BasePairSource`.

    Raises:
        CheckpointError: a part or the tokenizer cannot be read.
    """
    with TemporaryDirectory(prefix="internvl-tokenizer-") as folder:
        try:
            add_internvl_tokens(tokenizer or language, folder)
            yield BasePairSource(vision, language, Path(folder), seed, tile_pixels)
        except DataError as error:
            raise CheckpointError(f"{error}. The tokenizer can be given by itself (--tokenizer DIR)") from error
