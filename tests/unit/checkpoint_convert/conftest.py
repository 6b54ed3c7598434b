"""Small checkpoints of every kind, with tokenizers."""

from pathlib import Path

import pytest

from internvl_megatron.config.schema import ModelConfig
from internvl_megatron.data.tokenizer import load_tokenizer
from internvl_megatron.data.tokenizer_build import train_small_tokenizer
from tests.support.huggingface_folders import write_chat, write_transformers
from tests.support.models import small_model
from tests.support.sentencepiece_folder import write_folder

VOCAB_SIZE = 300


@pytest.fixture(scope="session")
def qwen_like_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small fast tokenizer of Qwen's kind with InternVL's tokens."""
    folder = tmp_path_factory.mktemp("tokenizer") / "qwen"
    tokenizer = train_small_tokenizer(["how many digits are there?", "there are two digits"], VOCAB_SIZE)
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def internlm_like_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sentencepiece tokenizer of InternLM's kind with InternVL's tokens."""
    return write_folder(tmp_path_factory.mktemp("tokenizer") / "internlm", "user_defined", add_dummy_prefix=False)


@pytest.fixture(scope="session")
def models(qwen_like_tokenizer: Path, internlm_like_tokenizer: Path) -> dict[str, ModelConfig]:
    """One small model of every kind; vocabularies are those of the tokenizers."""
    qwen, internlm = (len(load_tokenizer(folder)) for folder in (qwen_like_tokenizer, internlm_like_tokenizer))
    return {
        "300m": small_model("300m", vocab_size=qwen),
        "6b": small_model("6b", vocab_size=qwen),
        "internlm": small_model(
            "300m", vocab_size=internlm, family="internlm", qkv_bias=False, norm_eps=1e-5, rope_theta=5e7
        ),
    }


@pytest.fixture(scope="session")
def tokenizers(qwen_like_tokenizer: Path, internlm_like_tokenizer: Path) -> dict[str, Path]:
    """Folder of the tokenizer of every kind of model."""
    return {"300m": qwen_like_tokenizer, "6b": qwen_like_tokenizer, "internlm": internlm_like_tokenizer}


@pytest.fixture
def chat_folder(tmp_path: Path, models: dict[str, ModelConfig], tokenizers: dict[str, Path]):
    """`chat_folder(kind)`: a checkpoint in OpenGVLab's layout."""

    def make(kind: str = "300m", num_files: int = 1) -> Path:
        folder = tmp_path / f"chat-{kind}"
        write_chat(folder, models[kind], num_files=num_files)
        _add_files(tokenizers[kind], folder)
        return folder

    return make


@pytest.fixture
def native_folder(tmp_path: Path, models: dict[str, ModelConfig], tokenizers: dict[str, Path]):
    """`native_folder(kind)`: a checkpoint that transformers has saved."""

    def make(kind: str = "300m", in_memory_names: bool = False) -> Path:
        folder = tmp_path / f"native-{kind}-{in_memory_names}"
        image_token = load_tokenizer(tokenizers[kind]).image_context_id
        write_transformers(folder, models[kind], in_memory_names, image_token)
        _add_files(tokenizers[kind], folder)
        return folder

    return make


def _add_files(tokenizer: Path, folder: Path) -> None:
    for path in tokenizer.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
