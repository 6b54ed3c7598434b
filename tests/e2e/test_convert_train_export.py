"""From a Hugging Face checkpoint through training under two layouts back to one that transformers loads."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_convert.__main__ import main as convert
from internvl_megatron.__main__ import main
from internvl_megatron.config.recipes import demo_digits
from internvl_megatron.data.tokenizer import load_tokenizer
from internvl_megatron.watching.metrics import METRICS_FILE, read_metrics
from tests.support.huggingface_folders import edit_json, load_tensors
from tests.support.models import huggingface_model
from tests.support.small_runs import small_data

pytestmark = pytest.mark.parallel


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("demo") / "data")


@pytest.fixture(scope="module")
def weights(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model with random weights, saved by transformers and converted."""
    root = tmp_path_factory.mktemp("weights")
    tokenizer = load_tokenizer(data / "tokenizer")
    model = demo_digits().model
    model = replace(model, language=replace(model.language, vocab_size=len(tokenizer)))
    reference = huggingface_model(model, image_token=tokenizer.image_context_id)
    reference.save_pretrained(root / "source")
    tokenizer.save(root / "source")
    assert convert(["hf-to-megatron", str(root / "source"), str(root / "weights")]) == 0
    return root / "weights"


def _run(module: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def _train(data: Path, weights: Path, run: Path, num_ranks: int, *settings: str) -> subprocess.CompletedProcess[str]:
    return _run("internvl_megatron", *_training(data, weights, run, num_ranks, *settings))


def _training(data: Path, weights: Path, run: Path, num_ranks: int, *settings: str) -> list[str]:
    vocab = json.loads((weights / "model.json").read_text())["model"]["language"]["vocab_size"]
    return [
        "train", "demo_digits", f"data.meta={data / 'train_meta.json'}",
        f"data.tokenizer={weights / 'huggingface'}", f"folder={run}", "num_steps=2", "checkpoint.save_every_steps=1",
        "eval_every_steps=null", "data.eval_meta=null", "data.tokens_per_row=512", "data.tiles_per_row=32",
        f"model.language.vocab_size={vocab}", f"checkpoint.load={weights}", *settings,
        "--nproc", str(num_ranks),
    ]  # fmt: skip


def _losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run / METRICS_FILE)]


@pytest.mark.slow
def test_train_from_converted_weights_and_export(data: Path, weights: Path, tmp_path: Path) -> None:
    one, four = tmp_path / "one", tmp_path / "four"
    single = ("parallel.tensor_size=1", "parallel.pipeline_size=1")
    for run, num_ranks, settings in ((one, 1, single), (four, 4, ("parallel.vision_sharding=sharded",))):
        done = _train(data, weights, run, num_ranks, *settings)
        assert done.returncode == 0, done.stderr
        assert f"starting from the weights of {weights}" in done.stderr
    assert _losses(four) == pytest.approx(_losses(one), rel=1e-5), "both layouts start from the same weights"

    done = _run("checkpoint_convert", "megatron-to-hf", four, tmp_path / "native", "--layout", "transformers")
    assert done.returncode == 0, done.stderr
    # The run has its own number of tiles, system turn and 6 tiles at most; both are asked alike all the same.
    picture = next((data / "images").rglob("*.png"))
    same = _run("checkpoint_convert", "check", four, tmp_path / "native", "--image", picture, "--prompt", "Read it.")
    assert same.returncode == 0, same.stdout + same.stderr
    assert "logits agree" in same.stdout
    assert json.loads((tmp_path / "native" / "preprocessor_config.json").read_text())["max_patches"] == 6
    differs = _run("checkpoint_convert", "check", four, weights)
    assert differs.returncode == 1, "it was trained"

    from transformers import InternVLForConditionalGeneration

    loaded = InternVLForConditionalGeneration.from_pretrained(str(tmp_path / "native"), local_files_only=True)
    stored = load_tensors(tmp_path / "native")
    assert torch.equal(loaded.lm_head.weight, stored["language_model.lm_head.weight"])
    assert loaded.config.image_token_id == load_tokenizer(weights / "huggingface").image_context_id

    step = _run("checkpoint_convert", "inspect", four / "checkpoints" / "step-00000001")
    assert "step 1, written as" in step.stdout, step.stderr


def test_answer_from_converted_weights(weights: Path, data: Path) -> None:
    picture = next((data / "images").rglob("*.png"))
    command = ["generate", str(weights), "Read the number.", "--image", str(picture), "--max-new-tokens", "3"]
    assert main(command) == 0


@pytest.mark.slow
def test_a_run_starts_from_another_run_and_bf16_is_compared_in_fp32(data: Path, weights: Path, tmp_path: Path) -> None:
    single = ("parallel.tensor_size=1", "parallel.pipeline_size=1", "num_steps=1", "dtype=bf16")
    assert _train(data, weights, tmp_path / "first", 1, *single).returncode == 0
    again = _train(data, weights, tmp_path / "second", 1, *single, f"checkpoint.load={tmp_path / 'first'}")
    assert again.returncode == 0, again.stderr
    done = _run(
        "checkpoint_convert", "megatron-to-hf", tmp_path / "first", tmp_path / "hf", "--layout", "transformers"
    )
    assert done.returncode == 0, done.stderr
    same = _run("checkpoint_convert", "check", tmp_path / "first", tmp_path / "hf", "--prompt", "Read it.")
    assert same.returncode == 0, same.stdout + same.stderr
    refused = _train(data, weights, tmp_path / "third", 1, *single, f"checkpoint.load={tmp_path / 'hf'}")
    assert refused.returncode == 2
    assert "is a Hugging Face checkpoint; convert it first" in refused.stderr


def test_weights_of_another_model_are_refused(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    single = ("parallel.tensor_size=1", "parallel.pipeline_size=1")
    other_base = _training(data, weights, tmp_path / "run", 1, *single, "model.language.rope_theta=10000")
    assert main(other_base) == 2
    error = capsys.readouterr().err
    assert "holds another model than this run's" in error
    assert "model.language.rope_theta=1000000.0" in error
    assert not (tmp_path / "run").exists(), "it is said before anything is made"
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.json").write_bytes((weights / "model.json").read_bytes())
    edit_json(broken / "model.json", model__language__num_layers="four")
    assert main(_training(data, weights, tmp_path / "other", 1, *single, f"checkpoint.load={broken}")) == 2
    error = capsys.readouterr().err
    assert "model.json" in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_train_adapters_continue_elsewhere_and_export(data: Path, weights: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "lora", tmp_path / "whole"
    lora = ("lora.language_rank=4", "lora.vision_rank=4", "optimizer.learning_rate=0.01", "optimizer.schedule=constant",
            "optimizer.warmup_ratio=0", "num_steps=3")  # fmt: skip
    single = (*lora, "parallel.tensor_size=1", "parallel.pipeline_size=1")
    done = _train(data, weights, whole, 1, *single)
    assert done.returncode == 0, done.stderr
    done = _train(data, weights, run, 4, *lora, "num_steps=1")
    assert done.returncode == 0, done.stderr
    done = _train(data, weights, run, 1, *single)
    assert "continuing from" in done.stderr, done.stderr
    assert _losses(run) == pytest.approx(_losses(whole), rel=1e-5)
    base = sum(path.stat().st_size for path in weights.glob("*.safetensors"))
    step = run / "checkpoints" / "step-00000003"
    assert sum(path.stat().st_size for path in step.glob("*.distcp")) < base, "with Adam's state for everything: > 4 x"

    done = _run("checkpoint_convert", "megatron-to-hf", run, tmp_path / "native", "--layout", "transformers")
    assert done.returncode == 0, done.stderr
    same = _run("checkpoint_convert", "check", run, tmp_path / "native", "--prompt", "Read it.")
    assert same.returncode == 0, same.stdout + same.stderr
    assert _run("checkpoint_convert", "check", run, weights).returncode == 1, "it was trained"
    answer = _run("internvl_megatron", "generate", run, "Read the number.", "--max-new-tokens", 2)
    assert answer.returncode == 0, answer.stderr
    assert _run("checkpoint_convert", "inspect", run).returncode == 0

    again = _train(data, weights, tmp_path / "again", 1, *single, f"checkpoint.load={run}")
    assert again.returncode == 2
    assert "merge them first" in again.stderr
    changed = _train(data, weights, run, 1, *single, "lora.scale=1.0")
    assert changed.returncode == 2
    assert "other settings of lora.scale" in changed.stderr
