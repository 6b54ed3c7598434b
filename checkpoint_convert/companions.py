"""The files a Hugging Face checkpoint has beside its tensors: kept on import, written for whoever loads an export.

What the source has is copied byte for byte where the layout is the same. What a layout needs beyond that is made: for
transformers the processor's settings (its class defaults are another model's), the names of the image tokens and a chat
template; for OpenGVLab's own code, which uses the slow tokenizer, its vocabulary files.

OpenGVLab's Python files (the model's remote code) are copied if the source has them, never run, and never made here.
"""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoint_convert.hf_config import (
    CHAT_TYPE,
    CONFIG_FILE,
    TRANSFORMERS_TYPE,
    Fields,
    layout_of,
    read_json,
    read_model,
)
from checkpoint_convert.hf_config_write import (
    DYNAMIC_TILES,
    QWEN_ROPE_SCALING,
    ServingFacts,
    read_serving_facts,
    write_config,
)
from checkpoint_convert.mapping import Layout
from internvl_megatron.config.schema import ModelConfig
from internvl_megatron.data.sentencepiece_tokenizer import SentencePieceTokenizer
from internvl_megatron.data.tokenizer import IMAGE_CONTEXT, IMAGE_END, IMAGE_START, Tokenizer, load_tokenizer
from internvl_megatron.errors import CheckpointError, DataError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "tokenizer.model",
)  # fmt: skip
GENERATION_FILE = "generation_config.json"
IMAGE_PROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
VIDEO_PROCESSOR_FILE = "video_preprocessor_config.json"
TEMPLATE_FILE = "chat_template.jinja"
NOTE_FILE = "README.md"

KEPT = {
    *TOKENIZER_FILES, CONFIG_FILE, GENERATION_FILE, IMAGE_PROCESSOR_FILE, PROCESSOR_FILE, VIDEO_PROCESSOR_FILE,
    TEMPLATE_FILE, "chat_template.json",
}  # fmt: skip
"""What is kept of a source; beside these its Python files and licences."""

LARGEST_BYTES = 64 * 2**20
"""Of a file to keep: tokenizers have about 10 MB."""

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]
BICUBIC = 3
"""PIL's number of the filter."""

VIDEO_TOKEN = "<video>"
"""Placeholder of a video in transformers' template; the processor replaces it before anything is tokenized."""

TOKEN_NAMES = {
    "start_image_token": IMAGE_START,
    "end_image_token": IMAGE_END,
    "context_image_token": IMAGE_CONTEXT,
    "video_token": VIDEO_TOKEN,
}
"""How transformers' processor finds InternVL's tokens."""

# An image is one context token here; the processor makes <img>, 256 of them a tile, and </img> of it. As in the
# released -hf checkpoints there is no system turn unless a message is one.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- '<IMG_CONTEXT>\\n' -}}
{%- elif part['type'] == 'video' -%}
{{- '<video>\\n' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def has_tokenizer(folder: Path) -> bool:
    """Whether there is something to load a tokenizer from."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model"))


def kept_files(source: Path) -> list[Path]:
    """The files of a Hugging Face folder that are worth keeping.

    Raises:
        CheckpointError: one is too large to be what it is called, or is named as JSON and is not.
    """
    files = [path for path in sorted(source.iterdir()) if path.is_file()]
    files = [path for path in files if path.name in KEPT or path.suffix == ".py" or _is_licence(path)]
    for path in files:
        if path.stat().st_size > LARGEST_BYTES:
            raise CheckpointError(f"{path}: has {path.stat().st_size / 1e6:.0f} MB, too much for what it is called")
        if path.suffix == ".json":
            read_json(path)  # an LFS pointer, say, is found now and not by whoever loads the export
    return files


def content_digest(source: Path | None) -> str:
    """Changes when a file that is kept of a folder changes, wherever the folder is."""
    digest = hashlib.sha256()
    for path in kept_files(source) if source is not None else []:
        digest.update(f"{path.name}/{path.stat().st_size}/".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def keep(source: Path, target: Path) -> None:
    """Copy what is worth keeping of a Hugging Face folder.

    Raises:
        CheckpointError: see `kept_files`.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path in kept_files(source):
        shutil.copyfile(path, target / path.name)


def _is_licence(path: Path) -> bool:
    return path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))


def write_export(
    folder: Path,
    model: ModelConfig,
    layout: Layout,
    dtype: str,
    companions: Path | None,
    weights_from: str,
    max_tiles: int | None,
) -> None:
    """Write everything but tensors and index of an export.

    Args:
        folder: of the export; made by the caller.
        model: sizes.
        layout: of the export.
        dtype: torch's name of the weights' number format.
        companions: files of the source, in either layout; None if the weights are a run's that has none.
        weights_from: for the note.
        max_tiles: tiles an image may be cut into; None = as the companions say.

    Raises:
        CheckpointError: there is no tokenizer, it lacks InternVL's tokens, or the files are another model's.
    """
    if companions is None:
        raise CheckpointError(
            "the checkpoint has no tokenizer beside it, and without one nothing can load the export: give a folder with "
            "one (--companions DIR)"
        )
    try:
        tokenizer = load_tokenizer(companions)
    except DataError as error:
        raise CheckpointError(
            f"{error}. An export needs a tokenizer: give a folder that has it (--companions DIR)"
        ) from error
    origin = _internvl_config(companions)
    _check_belongs(model, tokenizer, origin)
    if origin is not None and layout_of(origin) == layout:
        keep(companions, folder)
    else:
        goes_across = {*TOKENIZER_FILES, GENERATION_FILE}
        for path in kept_files(companions):
            is_code = path.suffix == ".py" and layout == "internvl-chat"
            if path.name in goes_across or is_code or _is_licence(path):
                shutil.copyfile(path, folder / path.name)
    facts = _facts(model, layout, dtype, origin, tokenizer, companions)
    if max_tiles is not None:
        facts = replace(facts, dynamic_tiles=facts.dynamic_tiles | {"max_dynamic_patch": max_tiles})
    write_json(folder / CONFIG_FILE, write_config(model, layout, facts, origin))
    write_json(folder / GENERATION_FILE, _generation_config(folder / GENERATION_FILE, facts, tokenizer))
    if layout == "transformers":
        _complete_transformers(folder, model, facts, tokenizer)
        if max_tiles is not None:
            _set_max_patches(folder, max_tiles)
    else:
        _complete_chat(folder)
    (folder / NOTE_FILE).write_text(_note(model, layout, weights_from, folder), encoding="utf-8")


def _internvl_config(companions: Path) -> Fields | None:
    """config.json of the companions, if it is of an InternVL and not of a language model alone."""
    if not (companions / CONFIG_FILE).is_file():
        return None
    config = read_json(companions / CONFIG_FILE)
    return config if config.values.get("model_type") in (CHAT_TYPE, TRANSFORMERS_TYPE) else None


def _check_belongs(model: ModelConfig, tokenizer: Tokenizer, origin: Fields | None) -> None:
    """Refuse another model's tokenizer.

    Raises:
        CheckpointError: it has more tokens than the model has rows, or its config.json says another number of them.
    """
    rows = model.language.vocab_size
    if len(tokenizer) > rows:
        raise CheckpointError(f"{tokenizer.source}: has {len(tokenizer)} tokens, the model's vocabulary is {rows}")
    if origin is not None and read_model(origin).language.vocab_size != rows:
        raise CheckpointError(
            f"{origin.path}: is of a model with a vocabulary of {read_model(origin).language.vocab_size}, this one has {rows}; "
            "give the files of the same model (--companions DIR)"
        )


def _facts(
    model: ModelConfig, layout: Layout, dtype: str, origin: Fields | None, tokenizer: Tokenizer, companions: Path
) -> ServingFacts:
    if origin is None:
        return ServingFacts(
            dtype=dtype,
            image_token_id=tokenizer.image_context_id,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.turn_end_id,
            pad_token_id=tokenizer.pad_id,
            rope_scaling=dict(QWEN_ROPE_SCALING) if model.language.family == "qwen2" else None,
            drop_path_rate=model.vision.drop_path_rate,
        )
    facts = read_serving_facts(origin, dtype, tokenizer.image_context_id)
    unsaid = {"eos_token_id": tokenizer.turn_end_id, "pad_token_id": tokenizer.pad_id}
    facts = replace(facts, **{name: value for name, value in unsaid.items() if getattr(facts, name) is None})
    if layout_of(origin) == layout:
        return facts
    # OpenGVLab's configurations end at the base model's end of text and leave the turn's end to their code.
    facts = replace(facts, eos_token_id=tokenizer.turn_end_id)
    if layout == "internvl-chat":
        most = _max_patches(companions)
        facts = replace(facts, dynamic_tiles=facts.dynamic_tiles | {"max_dynamic_patch": most})
    return facts


def _max_patches(companions: Path) -> int:
    """Tiles an image may be cut into, of transformers' processor settings; the class's where they do not say it."""
    for name, section in ((PROCESSOR_FILE, "image_processor"), (IMAGE_PROCESSOR_FILE, None)):
        if (companions / name).is_file():
            values = read_json(companions / name)
            values = values.section(section, {}) if section else values
            if "max_patches" in values.values:
                return values.size("max_patches")
    return DYNAMIC_TILES["max_dynamic_patch"]


def _set_max_patches(folder: Path, max_tiles: int) -> None:
    """Write a run's own number of tiles into the processor settings, which may be the source's."""
    path = folder / (PROCESSOR_FILE if _holds_all_processors(folder) else IMAGE_PROCESSOR_FILE)
    values = read_json(path).values
    images = values["image_processor"] if path.name == PROCESSOR_FILE else values
    images["max_patches"] = max_tiles
    write_json(path, values)


def _generation_config(path: Path, facts: ServingFacts, tokenizer: Tokenizer) -> dict[str, Any]:
    """The source's own, if it has one; an answer ends where its turn ends, whatever else may end it."""
    if not path.is_file():
        return {
            "bos_token_id": facts.bos_token_id,
            "eos_token_id": tokenizer.turn_end_id,
            "pad_token_id": tokenizer.pad_id,
        }
    given = read_json(path)
    ends = given.token_ids("eos_token_id")
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if tokenizer.turn_end_id not in listed:
        ends = [tokenizer.turn_end_id, *listed] if listed else tokenizer.turn_end_id
    return given.values | {"eos_token_id": ends}


def _complete_transformers(folder: Path, model: ModelConfig, facts: ServingFacts, tokenizer: Tokenizer) -> None:
    """What `AutoProcessor` needs."""
    pixels = model.vision.tile_pixels
    images = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
        "processor_class": "InternVLProcessor",
        "resample": BICUBIC,
        "rescale_factor": 1 / 255,
        "size": {"height": pixels, "width": pixels},
    }
    tiles = {"crop_to_patches": True, "min_patches": 1, "max_patches": facts.dynamic_tiles["max_dynamic_patch"]}
    made = {
        IMAGE_PROCESSOR_FILE: {"image_processor_type": "GotOcr2ImageProcessor", **tiles, **images},
        VIDEO_PROCESSOR_FILE: {"video_processor_type": "InternVLVideoProcessor", "initial_shift": True, **images},
        PROCESSOR_FILE: {"processor_class": "InternVLProcessor", "image_seq_length": model.vision.tokens_per_tile},
    }
    for name, content in made.items():
        if not (folder / name).is_file() and not (name != PROCESSOR_FILE and _holds_all_processors(folder)):
            write_json(folder / name, content)
    if not (folder / TEMPLATE_FILE).is_file() and not (folder / "chat_template.json").is_file():
        (folder / TEMPLATE_FILE).write_text(CHAT_TEMPLATE, encoding="utf-8")
    _name_image_tokens(folder / "tokenizer_config.json", tokenizer)


def _name_image_tokens(path: Path, tokenizer: Tokenizer) -> None:
    """Tell the processor InternVL's tokens by the names it asks for, and let transformers' own classes load the rest."""
    config = read_json(path)
    values = config.values
    # transformers 4 has the names here; 5 reads them here and writes them into the other, with a list of tokens here.
    extra, listed = values.get("extra_special_tokens"), []
    if isinstance(extra, list):
        extra, listed = {}, extra
    named = config.section("model_specific_special_tokens", {}).values | (extra if isinstance(extra, dict) else {})
    if TOKEN_NAMES.items() <= named.items():
        return
    values |= {"extra_special_tokens": {**named, **TOKEN_NAMES}, "processor_class": "InternVLProcessor"}
    values.pop("auto_map", None)
    if listed:
        values["additional_special_tokens"] = listed
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        if isinstance(values.get(name), dict):  # as older versions wrote them, which newer ones do not read
            values[name] = values[name].get("content")
    if isinstance(tokenizer, SentencePieceTokenizer):
        values |= {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": tokenizer.adds_dummy_prefix}
    write_json(path, values)


def _holds_all_processors(folder: Path) -> bool:
    """Whether processor_config.json holds the image and video processors too, as transformers 5 writes it."""
    path = folder / PROCESSOR_FILE
    return path.is_file() and isinstance(read_json(path).values.get("image_processor"), dict)


def _complete_chat(folder: Path) -> None:
    """What OpenGVLab's code, vLLM and LMDeploy need: the CLIP-style image settings, and the slow tokenizer's files."""
    if not (folder / IMAGE_PROCESSOR_FILE).is_file():
        pixels = read_json(folder / CONFIG_FILE).size("force_image_size")
        content = {
            "crop_size": pixels,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": IMAGENET_MEAN,
            "image_std": IMAGENET_STD,
            "resample": BICUBIC,
            "size": pixels,
        }
        write_json(folder / IMAGE_PROCESSOR_FILE, content)
    if (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        _write_slow_tokenizer(folder)


def _write_slow_tokenizer(folder: Path) -> None:
    """The files of Qwen's slow tokenizer, from the fast one's."""
    fast = read_json(folder / "tokenizer.json")
    bpe = fast.section("model")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe.values.get("merges") or []]
    added = {token["id"]: token for token in fast.values.get("added_tokens") or []}
    write_json(folder / "vocab.json", bpe.section("vocab").values)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    write_json(folder / "added_tokens.json", {token["content"]: index for index, token in added.items()})
    path = folder / "tokenizer_config.json"
    values = read_json(path).values
    if "added_tokens_decoder" not in values:
        rules = {str(index): {k: v for k, v in token.items() if k != "id"} for index, token in added.items()}
        write_json(path, {**values, "added_tokens_decoder": rules})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object the way Hugging Face does."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def _note(model: ModelConfig, layout: Layout, weights_from: str, folder: Path) -> str:
    language = (
        "Qwen2.5 (Apache-2.0; the 72B model under the Qwen License)"
        if model.language.family == "qwen2"
        else "InternLM3 (Apache-2.0)"
    )
    lines = [
        "# InternVL3 weights converted by internvl_megatron",
        "",
        f"Layout: {layout}. Weights from: {weights_from}.",
        "",
        "## Licence",
        "",
        "The licence of these weights is that of the weights they were made from. InternVL3 and InternViT are released under",
        f"the MIT licence; they contain {language}. If the weights come from another release or from training data of your",
        "own, their terms apply too. Licence files of the source, if it had any, are beside this file.",
    ]
    lines += [
        "",
        "## Prompts",
        "",
        "OpenGVLab's code and internvl_megatron put InternVL's default system turn before a conversation without one; the",
        "chat template of the transformers layout has no system turn, as in the released -hf checkpoints. A model trained",
        "with one answers best with it: send it as the first message. Image tokens have ordinary positions (V2PE delta 1).",
    ]
    if layout == "internvl-chat" and not any(folder.glob("modeling_internvl_chat.py")):
        lines += [
            "",
            "## Code",
            "",
            "transformers loads this layout with OpenGVLab's code (`trust_remote_code=True`), which is not part of",
            "internvl_megatron: copy configuration_intern_vit.py, configuration_internvl_chat.py, conversation.py,",
            "modeling_intern_vit.py and modeling_internvl_chat.py (for 9B also configuration_internlm2.py and",
            "modeling_internlm2.py) from the released model into this folder. vLLM and LMDeploy bring their own.",
        ]
    return "\n".join(lines) + "\n"
