"""A growing global batch on real ranks: the same losses on one replica and two, and after going on in the middle."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from internvl_megatron.config.schema import CheckpointConfig, DataConfig, RampConfig, RunConfig
from internvl_megatron.data.fast_tokenizer import FastTokenizer
from internvl_megatron.data.tokenizer_build import train_small_tokenizer
from internvl_megatron.ranks import RankInfo
from internvl_megatron.watching.metrics import METRICS_FILE, read_metrics
from tests.support.layouts import ADAMW, LAYOUTS, Scenario

pytestmark = pytest.mark.parallel

ROWS = [2, 2, 4, 6, 8, 8]
"""Of each step: the fourth begins in the middle of the streams, and so do those after it."""
GROWING = RampConfig(start_rows=2, increment_rows=2, ramp_steps=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples with and without images."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (28, 56, 3), dtype=np.uint8)).save(folder / "two_tiles.png")
    with (folder / "talk.jsonl").open("w") as file:
        for count in rng.integers(1, 40, 80).tolist():
            has_image = count % 2 == 0
            question = {"from": "human", "value": "<image>?" if has_image else "?"}
            turns = [question, {"from": "gpt", "value": "seven " * count}]
            file.write(
                json.dumps({"conversations": turns, **({"image": "two_tiles.png"} if has_image else {})}) + "\n"
            )
    entry = {"root": str(folder), "annotation": str(folder / "talk.jsonl"), "repeat_time": 1, "data_augment": False}
    (folder / "meta.json").write_text(json.dumps({"talk": entry}))
    FastTokenizer(train_small_tokenizer(["seven and seven"], vocab_size=320), "small").save(folder / "tokenizer")
    return folder


def _config(data: Path, run: Path, layout: str, num_steps: int = len(ROWS)) -> RunConfig:
    config = Scenario(drop_path_rate=0.5).config(LAYOUTS[layout])
    return replace(
        config,
        model=replace(config.model, language=replace(config.model.language, vocab_size=400)),
        data=DataConfig(
            meta=str(data / "meta.json"),
            tokenizer=str(data / "tokenizer"),
            tokens_per_row=128,
            tiles_per_row=8,
            max_tiles=6,
            packing_pool_samples=4,
            packing_window_rows=2,
            v2pe="random",
            system_prompt="",
        ),
        # The rate of a step does not depend on how many there are to be.
        optimizer=replace(ADAMW, schedule="constant", warmup_ratio=None),
        checkpoint=CheckpointConfig(),
        folder=str(run),
        num_steps=num_steps,
        rows_per_step=8,
        ramp=GROWING,
    )


def _train(info: RankInfo, configs: Sequence[RunConfig]) -> None:
    """One run after the other in the same ranks, with everything made anew."""
    import torch
    from megatron.core import parallel_state

    from internvl_megatron.device import open_device
    from internvl_megatron.ranks import joined
    from internvl_megatron.trainer import Trainer

    torch.set_num_threads(1)
    device = open_device("cpu")
    with joined(info, device, 60):
        for config in configs:
            trainer = Trainer(info, config, device)
            try:
                trainer.run()
            finally:
                trainer.close()
            parallel_state.destroy_model_parallel()


def _metrics(run: Path) -> list[dict[str, float]]:
    return read_metrics(run / METRICS_FILE)


@pytest.fixture(scope="module")
def whole(run_ranks: Callable[..., list[Any]], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One replica, uninterrupted."""
    run = tmp_path_factory.mktemp("whole")
    run_ranks(_train, 1, [_config(data, run, "1")])
    return run


def test_metrics_show_the_rows_of_each_step(whole: Path) -> None:
    found = _metrics(whole)
    assert [row["num_rows"] for row in found] == ROWS
    assert all(0.5 < row["row_fill"] <= 1 for row in found)
    assert all(row["num_tiles"] > 0 for row in found[2:])


def test_two_replicas_give_the_same_losses_and_go_on_in_the_middle(
    run_ranks: Callable[..., list[Any]], data: Path, whole: Path, tmp_path: Path
) -> None:
    """Interrupted while the batch grows, before the first step that begins in the middle of the streams."""
    run_ranks(_train, 2, [_config(data, tmp_path, "DP2", end) for end in (3, len(ROWS))])
    for one, two in zip(_metrics(whole), _metrics(tmp_path), strict=True):
        for name in ("num_rows", "num_samples", "num_tiles", "num_tokens", "num_supervised_tokens"):
            assert one[name] == two[name]
        for name in ("total_tokens", "total_samples"):
            assert one[name] == two[name], "over the interruption"
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(
    run_ranks: Callable[..., list[Any]], data: Path, whole: Path, tmp_path: Path
) -> None:
    run_ranks(_train, 1, [_config(data, tmp_path, "1", end) for end in (1, 3, 4, len(ROWS))])
    for one, resumed in zip(_metrics(whole), _metrics(tmp_path), strict=True):
        for name in ("num_rows", "num_samples", "loss", "grad_norm"):
            assert one[name] == resumed[name]
