"""Data sets made on the spot, and tokenizers built once per test session."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from internvl_megatron.config.schema import DataConfig
from internvl_megatron.data.fast_tokenizer import FastTokenizer, load_fast_tokenizer
from internvl_megatron.data.records import SampleSettings
from internvl_megatron.data.tokenizer_build import find_dashscope_ranks, qwen2_5_tokenizer, train_small_tokenizer

TEXTS = ["how many digits are there in the picture?", "there are three: seven, two and one.", "system user assistant"]


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2.5's tokenizer with InternVL's tokens, written as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("qwen_tokenizer")
    qwen2_5_tokenizer(find_dashscope_ranks()).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def qwen(qwen_folder: Path) -> FastTokenizer:
    return load_fast_tokenizer(qwen_folder)


@pytest.fixture(scope="session")
def small() -> FastTokenizer:
    """A tokenizer of a few hundred ids, quick to make."""
    return FastTokenizer(train_small_tokenizer(TEXTS, vocab_size=320), "small")


class DataFolder:
    """Writes images, jsonl files and a meta file into one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, dict[str, Any]] = {}

    def image(self, name: str, width: int, height: int, seed: int = 0) -> str:
        pixels = np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(self.folder / name)
        return name

    def dataset(self, name: str, records: list[Any], **entry: Any) -> Path:
        """Add a data set (a record that is a string is written as it is) and return the meta file's path."""
        lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
        (self.folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        defaults = {"root": "", "annotation": f"{name}.jsonl", "data_augment": False, "repeat_time": 1}
        self.meta[name] = {**defaults, **entry}
        path = self.folder / "meta.json"
        path.write_text(json.dumps(self.meta))
        return path

    def mixture(self) -> Path:
        """Two data sets: 40 texts of different lengths, and 24 records with one to three images."""
        rng = np.random.default_rng(5)
        texts = [talk("how many?", "three " * int(rng.integers(1, 40))) for _ in range(40)]
        sizes = [(30, 30), (60, 30), (30, 60), (64, 64), (90, 30)]
        names = [self.image(f"{index}.png", *size, seed=index) for index, size in enumerate(sizes)]
        pictures = []
        for index in range(24):
            images = [names[int(i)] for i in rng.integers(0, len(names), size=int(rng.integers(1, 4)))]
            record = talk("<image>" * len(images) + f"how many {index}?", "seven " * int(rng.integers(1, 10)))
            pictures.append({**record, "image": images if len(images) > 1 else images[0]})
        self.dataset("texts", texts)
        return self.dataset("pictures", pictures, data_augment=True)


def talk(*texts: str) -> dict[str, Any]:
    """A record whose turns are human, gpt, human, ..."""
    senders = ["human", "gpt"] * len(texts)
    turns = zip(senders, texts, strict=False)
    return {"conversations": [{"from": sender, "value": text} for sender, text in turns]}


@pytest.fixture
def data_folder(tmp_path: Path) -> DataFolder:
    return DataFolder(tmp_path)


@pytest.fixture(name="talk")
def talk_fixture() -> Callable[..., dict[str, Any]]:
    return talk


@pytest.fixture
def make_settings() -> Callable[..., SampleSettings]:
    """Settings with 28-pixel tiles of 4 tokens; keywords go to `DataConfig`."""

    def make(**changes: Any) -> SampleSettings:
        base = DataConfig(tokens_per_row=256, tiles_per_row=12, packing_pool_samples=8, max_tiles=4, system_prompt="")
        changes.setdefault("max_skipped_share", None)
        return SampleSettings(data=replace(base, **changes), tile_pixels=28, tokens_per_tile=4)

    return make
