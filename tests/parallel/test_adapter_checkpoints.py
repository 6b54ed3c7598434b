"""Checkpoints of adapters alone: resumed under any layout on the weights they belong to, on no others, and merged on export."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoint_convert.__main__ import main
from checkpoint_convert.distributed_checkpoint import DistributedCheckpoint
from checkpoint_convert.sources import AdapterSource, open_source
from internvl_megatron.checkpoint import adapter_base, folders, save_load
from internvl_megatron.checkpoint.weights import is_weights_folder
from internvl_megatron.config.overrides import CONFIG_FILE, to_json
from internvl_megatron.config.schema import LoraConfig, PartConfig, RunConfig
from internvl_megatron.data.tokenizer_build import train_small_tokenizer
from internvl_megatron.device import open_device
from internvl_megatron.errors import CheckpointError
from internvl_megatron.launcher import RankFailedError
from internvl_megatron.model.adapter import is_adapter
from internvl_megatron.model.bit_sum import bit_sum
from internvl_megatron.model.build import build_model
from internvl_megatron.parallel.groups import make_groups
from internvl_megatron.ranks import RankInfo, joined
from internvl_megatron.train.step import Step
from tests.support.forward import logits_of_rows
from tests.support.layouts import ADAMW, LAYOUTS, Ranks, Scenario
from tests.support.lora_reference import random_adapters
from tests.support.models import huggingface_model, small_model
from tests.support.reference import images_of, row_logits
from tests.support.training import Tensors, replica_rows

pytestmark = pytest.mark.parallel

SAVED_AT, STEPS = 2, 4
MODEL = small_model(vocab_size=300)
"""With room for a tokenizer."""
LORA = LoraConfig(language_rank=4, vision_rank=3)
SCENARIO = Scenario(changes={"lora": LORA, "optimizer": ADAMW, "num_steps": STEPS})
SHARDED = Scenario(
    changes={
        "lora": replace(LORA, vision_rank=None),
        "optimizer": replace(ADAMW, vision=PartConfig(trainable=False)),
        "num_steps": STEPS,
    },
    parallel_changes={"vision_sharding": "sharded"},
)
History = list[tuple[float, float]]
"""(loss, gradient norm) by step."""


def _config(ranks: Ranks, scenario: Scenario = SCENARIO) -> RunConfig:
    return replace(scenario.config(ranks), model=MODEL)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_small_tokenizer(["a digit"], MODEL.language.vocab_size).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted weights of the small model."""
    return _converted(tmp_path_factory.mktemp("base"), seed=0)


def _converted(root: Path, seed: int) -> Path:
    huggingface_model(MODEL, seed).save_pretrained(root / "hf")
    assert main(["hf-to-megatron", str(root / "hf"), str(root / "weights")]) == 0
    assert is_weights_folder(root / "weights")
    return root / "weights"


def _train(
    info: RankInfo, ranks: Ranks, base: Path, root: Path, first: int, last: int, scenario: Scenario = SCENARIO
) -> History:
    """Steps `first` to `last`, adapters from the checkpoint in `root` if first > 0; saves at the end of a first part."""
    torch.set_num_threads(1)
    device, config = open_device("cpu"), _config(ranks, scenario)
    with joined(info, device, 60):
        groups = make_groups(ranks.layout, device, 60, ranks.vision_layout)
        model = build_model(config, groups, device, initialize=False)
        step = Step(config, model, groups, device)
        found = save_load.load_weights(base, config.model, model, groups)
        note = save_load.base_of(found, config.dtype, model, groups)
        if first > 0:
            save_load.load(folders.finished(root)[-1], model, step.optimizer, groups, note)
        else:
            step.optimizer.reload_parameters()
        history = []
        for number in range(first, last):
            result = step.run(replica_rows(scenario, config, number, ranks.layout, info.rank), number)  # type: ignore
            history.append((result.loss, result.grad_norm))
        if last == SAVED_AT:
            marker = folders.CheckpointInfo(last, 10, 20, str(ranks.layout), optimizer_state=True)
            step.gather_parameters()
            save_load.save(root, marker, model, step.optimizer, groups, None, keep_last=1, base=note)
        return history


@pytest.fixture(scope="module")
def interrupted(
    run_ranks: Callable[..., list[Any]], base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, History]:
    """A checkpoint written under TP2+SP after two steps, and the uninterrupted run's four."""
    root = tmp_path_factory.mktemp("checkpoints")
    run_ranks(_train, 2, LAYOUTS["TP2+SP"], base, root, 0, SAVED_AT)
    return root, run_ranks(_train, 2, LAYOUTS["TP2+SP"], base, root, 0, STEPS)[0]


def test_a_checkpoint_holds_what_is_trained(interrupted: tuple[Path, History]) -> None:
    folder = folders.finished(interrupted[0])[-1]
    adapters = random_adapters(MODEL, LORA)
    names = DistributedCheckpoint(folder).names
    projector = {name for name in names if name.startswith("vision.projector.")}
    assert {*names} == adapters.keys() | projector
    assert len(projector) == 6
    for name, whole in adapters.items():
        assert DistributedCheckpoint(folder).shape(name) == whole.shape


def test_same_layout_continues_bit_for_bit(
    run_ranks: Callable[..., list[Any]], base: Path, interrupted: tuple[Path, History]
) -> None:
    root, whole = interrupted
    assert run_ranks(_train, 2, LAYOUTS["TP2+SP"], base, root, SAVED_AT, STEPS)[0] == whole[SAVED_AT:]


@pytest.mark.parametrize("layout", ["1", "PP2"])
def test_other_layouts_continue(
    run_ranks: Callable[..., list[Any]], base: Path, interrupted: tuple[Path, History], layout: str
) -> None:
    root, whole = interrupted
    ranks = LAYOUTS[layout]
    history = run_ranks(_train, ranks.num_ranks, ranks, base, root, SAVED_AT, STEPS)[0]
    np.testing.assert_allclose(history, whole[SAVED_AT:], rtol=1e-5)


@pytest.mark.slow
def test_beside_a_sharded_frozen_encoder(run_ranks: Callable[..., list[Any]], base: Path, tmp_path: Path) -> None:
    """Written with the vision side in shards, continued with it whole: the checksums are those of whole parameters."""
    run_ranks(_train, 2, LAYOUTS["DP2"], base, tmp_path, 0, SAVED_AT, SHARDED)
    whole = run_ranks(_train, 2, LAYOUTS["DP2"], base, tmp_path, 0, STEPS, SHARDED)[0]
    assert run_ranks(_train, 2, LAYOUTS["DP2"], base, tmp_path, SAVED_AT, STEPS, SHARDED)[0] == whole[SAVED_AT:]
    replicated = replace(SHARDED, parallel_changes={})
    history = run_ranks(_train, 1, LAYOUTS["1"], base, tmp_path, SAVED_AT, STEPS, replicated)[0]
    np.testing.assert_allclose(history, whole[SAVED_AT:], rtol=1e-5)


def test_other_weights_are_refused(
    run_ranks: Callable[..., list[Any]], interrupted: tuple[Path, History], tmp_path: Path
) -> None:
    other = _converted(tmp_path, seed=1)
    with pytest.raises(RankFailedError) as failed:
        run_ranks(_train, 1, LAYOUTS["1"], other, interrupted[0], SAVED_AT, STEPS)
    assert failed.value.failures[0].is_user_error
    assert "were trained on other weights" in str(failed.value)
    assert str(other) in str(failed.value)


def test_a_run_cannot_start_from_adapters(interrupted: tuple[Path, History], tmp_path: Path) -> None:
    folder = folders.finished(interrupted[0])[-1]
    with pytest.raises(CheckpointError, match="merge them first"):
        adapter_base.refuse_adapters(folder)
    run = tmp_path / "run"
    shutil.copytree(interrupted[0], run / folders.CHECKPOINTS)
    with pytest.raises(CheckpointError, match="merge them first"):
        adapter_base.refuse_adapters(run)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"format_version": 1, "path": "x", "dtype": "int8", "sums": {}}', "another type"),
        ('{"format_version": 1, "path": "x", "dtype": "fp32", "sums": {"a": "b"}}', "another type"),
        ('{"format_version": 9, "path": "x", "dtype": "fp32", "sums": {}}', "format version 9"),
        (None, "missing: the checkpoint holds a whole model"),
    ],
)
def test_a_damaged_note_is_refused(tmp_path: Path, text: str | None, error: str) -> None:
    if text is not None:
        (tmp_path / adapter_base.BASE_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=error):
        adapter_base.read_base(tmp_path)


def test_sums_see_every_bit_and_no_division() -> None:
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        whole = bit_sum(values, dtype)
        assert whole == bit_sum(values[:3], dtype) + bit_sum(values[3:], dtype)
        assert whole == bit_sum(values.to(dtype), dtype)
        changed = values.to(dtype).clone()
        changed[2, 2] = torch.nextafter(changed[2, 2], torch.tensor(9.0, dtype=dtype))
        assert bit_sum(changed, dtype) - whole in (1, -1)


@pytest.fixture(scope="module")
def run(run_ranks: Callable[..., list[Any]], base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in fp32, saved under TP2 x PP2, whose adapters are far from zero."""
    folder, ranks = tmp_path_factory.mktemp("run"), LAYOUTS["TP2xPP2"]
    config = replace(_config(ranks), folder=str(folder))
    (folder / CONFIG_FILE).write_text(to_json(config))
    adapters = random_adapters(MODEL, LORA)
    run_ranks(_save, 4, config, ranks, base, adapters)
    return folder


def _save(info: RankInfo, config: RunConfig, ranks: Ranks, base: Path, adapters: Tensors) -> None:
    device = open_device("cpu")
    with joined(info, device, 60):
        groups = make_groups(ranks.layout, device, 60, ranks.vision_layout)
        model = build_model(config, groups, device, initialize=False)
        note = save_load.base_of(
            save_load.load_weights(base, config.model, model, groups), config.dtype, model, groups
        )
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                model.load_full(name, parameter, torch.from_numpy(adapters[name]))
        marker = folders.CheckpointInfo(1, 0, 0, str(ranks.layout), optimizer_state=False)
        save_load.save(Path(config.folder) / folders.CHECKPOINTS, marker, model, None, groups, None, 1, note)


def _logits(info: RankInfo, config: RunConfig, weights: Path) -> list[np.ndarray]:
    device, ranks = open_device("cpu"), LAYOUTS["1"]
    with joined(info, device, 60):
        groups = make_groups(ranks.layout, device, 60)
        model = build_model(config, groups, device, initialize=False)
        save_load.load_weights(weights, config.model, model, groups)
        return logits_of_rows(model, config, device, SCENARIO.data(config, 0))


def test_exports_are_merged_and_answer_as_the_run(
    run_ranks: Callable[..., list[Any]], run: Path, base: Path, tokenizer: Path, tmp_path: Path
) -> None:
    from transformers import InternVLForConditionalGeneration

    config = _config(LAYOUTS["1"])
    (unmerged,) = run_ranks(_logits, 1, config, run)
    plain = replace(config, lora=LoraConfig())
    (untrained,) = run_ranks(_logits, 1, plain, base)
    vocab = config.model.language.vocab_size
    assert (
        max(np.abs(one[:, :vocab] - two[:, :vocab]).max() for one, two in zip(unmerged, untrained, strict=True)) > 0.1
    )

    assert main(["hf-to-megatron", str(run), str(tmp_path / "merged")]) == 0
    (merged,) = run_ranks(_logits, 1, plain, tmp_path / "merged")
    export = ["megatron-to-hf", str(run), str(tmp_path / "hf"), "--layout", "transformers", "--companions"]
    assert main([*export, str(tokenizer)]) == 0
    reference = InternVLForConditionalGeneration.from_pretrained(str(tmp_path / "hf"), local_files_only=True).float()
    # The tokenizer here has other ids than the rows of the tests.
    reference.config.image_token_id = huggingface_model(config.model, fill=False).config.image_token_id
    data = SCENARIO.data(config, 0)
    for index, row in enumerate(data.rows):
        wanted = unmerged[index][:, :vocab]
        np.testing.assert_allclose(merged[index][:, :vocab], wanted, atol=1e-5)
        with torch.no_grad():
            logits = row_logits(reference.eval(), row, images_of(data, index))
        num_tokens = int(row.segment_lengths[: row.num_samples].sum())
        np.testing.assert_allclose(logits.numpy()[:num_tokens], wanted[:num_tokens], atol=2e-5)


def test_an_export_checks_and_finds_what_is_below(run: Path, base: Path, tmp_path: Path) -> None:
    source = open_source(run)
    assert isinstance(source, AdapterSource)
    copy, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(run, copy)
    note = next(copy.glob(f"{folders.CHECKPOINTS}/*/{adapter_base.BASE_FILE}"))
    fields = json.loads(note.read_text())
    assert fields["path"] == str(base)
    note.write_text(json.dumps(fields | {"path": str(moved)}))
    with pytest.raises(CheckpointError, match="which is not there"):
        open_source(copy)
    shutil.copytree(base, moved)
    name = "language.decoder.layers.0.self_attention.linear_qkv.weight"
    assert torch.equal(open_source(copy).read(name), source.read(name))
    fields["sums"][name] += 1
    note.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="were trained on other weights"):
        open_source(copy).read(name)


def test_a_model_without_adapters_refuses_them(run_ranks: Callable[..., list[Any]], run: Path) -> None:
    config = replace(_config(LAYOUTS["1"]), lora=LoraConfig())
    with pytest.raises(RankFailedError) as failed:
        run_ranks(_logits, 1, config, run)
    assert failed.value.failures[0].is_user_error
    assert "merge them first" in str(failed.value)
