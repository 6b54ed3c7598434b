"""Runs on pairs of answers: real files, the trainer, checkpoints, and the reference's log-probabilities from a file."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internvl_megatron.config.recipes import demo_digits
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.launcher import RankFailedError
from internvl_megatron.watching.metrics import METRICS_FILE, read_metrics
from tests.support.small_runs import read_lines, small_data, small_run, write_lines

pytestmark = pytest.mark.parallel

TRAIN_RANK = "internvl_megatron.trainer:train_rank"
SCORE_RANK = "internvl_megatron.score_reference:score_rank"
RunRanks = Callable[..., list[Any]]
STEPS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small version of the demo's data, and pairs made of it: the rejected answer never says what is on the picture."""
    out = small_data(tmp_path_factory.mktemp("demo") / "data")
    for split in ("train", "heldout"):
        pairs = []
        for record in read_lines(out / f"{split}_digits.jsonl"):
            for asked, answered in zip(record["conversations"][::2], record["conversations"][1::2], strict=True):
                chosen = answered["value"]
                question = asked["value"].replace("<image>", "").strip()
                pairs.append({"image": record["image"], "question": question, "chosen": chosen, "rejected": "none"})
        write_lines(out / f"{split}_preferences.jsonl", pairs)
        entry = {"root": "", "annotation": f"{split}_preferences.jsonl", "repeat_time": 1, "data_augment": False}
        (out / f"{split}_preferences_meta.json").write_text(json.dumps({f"{split}_preferences": entry}))
    return out


def preference_config(data: Path, folder: Path, start: Path, *overrides: str) -> RunConfig:
    settings = [
        f"data.meta={data / 'train_preferences_meta.json'}",
        f"data.eval_meta={data / 'heldout_preferences_meta.json'}",
        f"checkpoint.load={start}",
        "checkpoint.save_every_steps=2",
        "loss.kind=mpo",
        "eval_every_steps=2",
        f"num_steps={STEPS}",
        "optimizer.learning_rate=1e-4",
        "model.vision.drop_path_rate=0.1",
    ]
    return small_run(data, folder, "data.v2pe=fixed", *settings, *overrides)


@pytest.fixture(scope="module")
def start(run_ranks: RunRanks, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has been fine-tuned a little: where preference training starts from, and its reference."""
    folder = tmp_path_factory.mktemp("sft")
    run_ranks(TRAIN_RANK, 1, small_run(data, folder, "data.v2pe=fixed", "num_steps=3"))
    return folder


@pytest.fixture(scope="module")
def whole(run_ranks: RunRanks, data: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(TRAIN_RANK, 1, preference_config(data, folder, start))
    return folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder / METRICS_FILE)


FIGURES = ("loss", "grad_norm", "chosen_reward", "rejected_reward", "reward_shift", "preference_accuracy", "eval_loss")


def expect_same(found: list[dict[str, Any]], wanted: list[dict[str, Any]], tolerance: float) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for name in FIGURES:
        values = [[row[name] or 0.0 for row in rows] for rows in (found, wanted)]
        np.testing.assert_allclose(*values, rtol=tolerance, atol=tolerance, err_msg=name)


def test_figures(whole: Path) -> None:
    rows = metrics(whole)
    config = demo_digits().mpo
    assert rows[0]["prepare_seconds"] > 0
    for row in rows:
        total = (
            config.preference_factor * row["preference_loss"]
            + config.quality_factor * row["quality_loss"]
            + config.generation_factor * row["generation_loss"]
        )
        assert row["loss"] == pytest.approx(total, rel=1e-9)
        assert row["reward_margin"] == pytest.approx(row["chosen_reward"] - row["rejected_reward"], abs=1e-12)
    assert [row["step"] for row in rows if row["eval_preference_accuracy"] is not None] == [2, 4]
    assert rows[-1]["reward_margin"] > rows[0]["reward_margin"], "the rewards part"


@pytest.mark.slow
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    run_ranks: RunRanks, data: Path, start: Path, whole: Path, tmp_path: Path
) -> None:
    run_ranks(TRAIN_RANK, 1, preference_config(data, tmp_path, start, "num_steps=2"))
    run_ranks(TRAIN_RANK, 1, preference_config(data, tmp_path, start))
    expect_same(metrics(tmp_path), metrics(whole), tolerance=0)


def test_a_run_does_not_continue_with_another_reference(
    run_ranks: RunRanks, data: Path, start: Path, whole: Path
) -> None:
    config = preference_config(data, whole, start, f"num_steps={STEPS + 1}")
    other = replace(config, checkpoint=replace(config.checkpoint, load=str(whole / "checkpoints" / "step-00000002")))
    with pytest.raises(RankFailedError, match="has other weights than when the run"):
        run_ranks(TRAIN_RANK, 1, other)


@pytest.mark.slow
def test_a_file_of_the_reference_gives_the_same_training(
    run_ranks: RunRanks, data: Path, start: Path, whole: Path, tmp_path: Path
) -> None:
    """Scored by two pipeline stages, trained with on one rank."""
    file = tmp_path / "reference.jsonl"
    scoring = preference_config(data, tmp_path / "scoring", start, "parallel.pipeline_size=2")
    num_pairs, nothing = run_ranks(SCORE_RANK, 2, scoring, str(file))
    lines = sum(len((data / f"{split}_preferences.jsonl").read_text().splitlines()) for split in ("train", "heldout"))
    assert (num_pairs, nothing) == (lines, 0)
    folder = tmp_path / "run"
    run_ranks(TRAIN_RANK, 1, preference_config(data, folder, start, f"mpo.reference_file={file}"))
    expect_same(metrics(folder), metrics(whole), tolerance=1e-6)

    # A file of other weights, and one of other pairs.
    other = preference_config(data, tmp_path / "other", whole, f"mpo.reference_file={file}")
    with pytest.raises(RankFailedError, match="is of a model with weights"):
        run_ranks(TRAIN_RANK, 1, other)
    head, *pairs = file.read_text().splitlines()
    changed = [json.dumps({**json.loads(line), "digest": "0" * 16}) for line in pairs]
    file.write_text("\n".join([head, *changed]) + "\n")
    with pytest.raises(RankFailedError, match="was another pair when"):
        run_ranks(TRAIN_RANK, 1, replace(other, checkpoint=replace(other.checkpoint, load=str(start))))


@pytest.mark.slow
def test_held_out_pairs_are_put_in_order(run_ranks: RunRanks, data: Path, start: Path, tmp_path: Path) -> None:
    """By the preference and quality losses alone; rejected answers are all alike, but pictures are new."""
    config = preference_config(
        data,
        tmp_path,
        start,
        "num_steps=40",
        "eval_every_steps=40",
        "checkpoint.save_every_steps=null",
        "mpo.generation_factor=0",
    )
    run_ranks(TRAIN_RANK, 1, config)
    rows = metrics(tmp_path)
    assert rows[0]["preference_accuracy"] < 0.6, "drop path aside, policy and reference begin alike"
    assert rows[-1]["preference_accuracy"] > 0.9
    assert rows[-1]["eval_preference_accuracy"] > 0.9
