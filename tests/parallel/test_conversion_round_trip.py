"""Hugging Face -> our weights -> ranks of some layout -> a run's checkpoint -> Hugging Face: not a bit changes.

Full width, few layers, bits of any pattern. The default suite takes the narrowest size and cuts the vocabulary; the wider
ones, and InternVL3-1B whole, are `slow`.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from checkpoint_convert.__main__ import main
from checkpoint_convert.compare import compare
from checkpoint_convert.mapping import mapping
from checkpoint_convert.sources import open_source
from internvl_megatron.checkpoint.safetensors_folder import SafetensorsFolder
from internvl_megatron.config.models import INTERNVL3
from internvl_megatron.config.overrides import CONFIG_FILE, to_json
from internvl_megatron.config.schema import ModelConfig
from internvl_megatron.ranks import RankInfo
from tests.support.huggingface_folders import random_bits, same_bits, write_chat, write_json, write_tensors
from tests.support.layouts import LAYOUTS, Ranks, run_config

pytestmark = pytest.mark.parallel

LAYOUTS_LOADED = ("1", "TP2", "PP2")
SMALL_VOCAB = 700


class Case(NamedTuple):
    """A size, cut."""

    size: str
    language_layers: int | None = 2
    vision_layers: int | None = 1
    vocab_size: int | None = SMALL_VOCAB

    @property
    def name(self) -> str:
        is_cut, is_full = self.vocab_size == SMALL_VOCAB, self.vision_layers is None
        return f"{self.size}-{'cut' if is_cut else 'full' if is_full else 'wide'}"

    @property
    def model(self) -> ModelConfig:
        whole = INTERNVL3[self.size]
        vision, language = whole.vision, whole.language
        return replace(
            whole,
            vision=replace(vision, num_layers=self.vision_layers or vision.num_layers),
            language=replace(
                language,
                num_layers=self.language_layers or language.num_layers,
                vocab_size=self.vocab_size or language.vocab_size,
            ),
        )


QUICK = Case("1B")
SLOW = [
    Case("2B"),
    Case("1B", language_layers=None, vision_layers=None, vocab_size=None),
    *[Case(size, vocab_size=None) for size in INTERNVL3],
]
CASES = [
    pytest.param(QUICK, id=QUICK.name),
    *[pytest.param(case, id=case.name, marks=pytest.mark.slow) for case in SLOW],
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", ["internvl-chat", "transformers"])
def test_no_bit_changes(run_ranks: Callable[..., list[Any]], tmp_path: Path, case: Case, layout: str) -> None:
    model = case.model
    source = tmp_path / "source"
    _write_source(source, model, layout)
    _convert("hf-to-megatron", source, tmp_path / "weights")
    for name in LAYOUTS_LOADED:
        ranks = LAYOUTS[name]
        run = tmp_path / f"run-{name}"
        config = run_config(model, parallel=ranks.config(), dtype="bf16", folder=str(run))
        run.mkdir()
        (run / CONFIG_FILE).write_text(to_json(config))
        run_ranks(_load_and_save, ranks.num_ranks, config, ranks, tmp_path / "weights", run)
        back = tmp_path / f"back-{name}"
        _convert("megatron-to-hf", run, back, "--layout", layout, "--companions", _tokenizer(tmp_path))
        _assert_same(source, back)
        shutil.rmtree(back)
        assert compare(open_source(run), open_source(tmp_path / "weights")).same
        shutil.rmtree(run)
    shutil.rmtree(tmp_path)  # pytest keeps folders, and these are gigabytes


def _write_source(folder: Path, model: ModelConfig, layout: str) -> None:
    """A checkpoint without tokenizer, in several files."""
    if layout == "internvl-chat":
        write_chat(folder, model, num_files=3)
        return
    # Names and shapes of this table are held against transformers' modules in the tests of the table.
    entries = mapping(model, "transformers")
    shapes = {name: shape for entry in entries for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)}
    folder.mkdir()
    write_tensors(folder, random_bits(shapes, seed=2), 3)
    vision, language = model.vision, model.language
    llama = {"model_type": "llama", "attention_bias": False, "head_dim": language.head_size}
    text = {"model_type": "qwen2"} if language.family == "qwen2" else llama
    text |= {
        "hidden_size": language.hidden_size,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_heads,
        "num_key_value_heads": language.num_kv_heads,
        "intermediate_size": language.ffn_hidden_size,
        "vocab_size": language.vocab_size,
        "rms_norm_eps": language.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": language.rope_theta},
    }
    section = {
        "model_type": "internvl_vision",
        "hidden_size": vision.hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "intermediate_size": vision.ffn_hidden_size,
        "norm_type": vision.norm,
        "attention_bias": vision.qkv_bias,
        "use_qk_norm": vision.qk_norm,
        "image_size": [448, 448],
        "patch_size": [14, 14],
    }
    config = {"model_type": "internvl", "downsample_ratio": 0.5, "text_config": text, "vision_config": section}
    write_json(folder / "config.json", config)


def _load_and_save(info: RankInfo, config: Any, ranks: Ranks, weights: Path, run: Path) -> None:
    """Body of a rank: take this rank's part of the weights, write it as a run does."""
    from internvl_megatron.checkpoint import folders, save_load
    from internvl_megatron.device import open_device
    from internvl_megatron.model.build import build_model
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.ranks import joined

    device = open_device(config.device)
    with joined(info, device, 600):
        groups = make_groups(ranks.layout, device, 600)
        model = build_model(config, groups, device, initialize=False)
        save_load.load_weights(weights, config.model, model, groups)
        marker = folders.CheckpointInfo(1, 0, 0, str(ranks.layout), optimizer_state=False)
        save_load.save(run / folders.CHECKPOINTS, marker, model, None, groups, None, keep_last=1)


def _convert(*arguments: Any) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def _tokenizer(root: Path) -> Path:
    from internvl_megatron.data.tokenizer_build import train_small_tokenizer

    folder = root / "tokenizer"
    if not folder.is_dir():
        train_small_tokenizer(["a digit"], 300).save_pretrained(str(folder))
    return folder


def _assert_same(one: Path, other: Path) -> None:
    """Tensor by tensor: the wide models do not fit into memory twice."""
    first, second = (SafetensorsFolder.open(folder) for folder in (one, other))
    assert first.keys() == second.keys()
    assert [name for name in first if not same_bits(first.read(name), second.read(name))] == []
