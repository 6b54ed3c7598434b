"""Real ranks trade rows: the run stays what it was, replicas get about the same work, errors end all of them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from internvl_megatron.config.schema import CheckpointConfig, DataConfig, RunConfig
from internvl_megatron.data.fast_tokenizer import FastTokenizer
from internvl_megatron.data.tokenizer_build import train_small_tokenizer
from internvl_megatron.errors import DataError
from internvl_megatron.ranks import RankInfo
from internvl_megatron.watching.metrics import METRICS_FILE, read_metrics
from tests.support.layouts import LAYOUTS, Scenario

pytestmark = pytest.mark.parallel

STEPS = 3


def _record(text: str, num_images: int = 0) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>" * num_images + "?"}, {"from": "gpt", "value": text}]
    images = [f"{index}.png" for index in range(num_images)]
    return {"conversations": turns, **({"image": images} if images else {})}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of very different lengths: rows differ in what they cost."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for index in range(3):
        pixels = rng.integers(0, 256, (28, 28 * (index + 1), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    records = [_record("seven " * int(count), int(count) % 4) for count in rng.integers(1, 60, 80)]
    lines = [json.dumps(record) for record in records]
    _write(folder, "good", lines)
    _write(folder, "broken", [*lines[:12], "{", *lines[12:23]])  # three records a stream: one stream soon meets it
    FastTokenizer(train_small_tokenizer(["seven and seven"], vocab_size=320), "small").save(folder / "tokenizer")
    return folder


def _write(folder: Path, name: str, lines: list[str]) -> None:
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    entry = {"root": str(folder), "annotation": str(folder / f"{name}.jsonl"), "repeat_time": 1, "data_augment": False}
    (folder / f"{name}.json").write_text(json.dumps({name: entry}))


def _config(data: Path, run: Path, layout: str, meta: str = "good", balance: bool = True) -> RunConfig:
    """A run of eight rows a step, cut to their lengths, with drop path."""
    scenario = Scenario(drop_path_rate=0.5, parallel_changes={"pad_rows": False})
    config = scenario.config(LAYOUTS[layout])
    language = replace(config.model.language, vocab_size=400)
    return replace(
        config,
        model=replace(config.model, language=language),
        data=DataConfig(
            meta=str(data / f"{meta}.json"),
            tokenizer=str(data / "tokenizer"),
            tokens_per_row=128,
            tiles_per_row=8,
            max_tiles=6,
            packing="first_fit",
            packing_buffer_rows=2,
            packing_window_rows=1,
            v2pe="random",
            system_prompt="",
            seed=1,
            balance_rows=balance,
        ),
        checkpoint=CheckpointConfig(),
        folder=str(run),
        num_steps=STEPS,
        rows_per_step=8,
    )


def _train(info: RankInfo, configs: list[RunConfig]) -> str | None:
    """One run after the other in the same ranks; the message of the data error that ended the last one, if one did."""
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
            except DataError as error:
                return str(error)
            finally:
                trainer.close()
            parallel_state.destroy_model_parallel()
    return None


def _metrics(run: Path) -> list[dict[str, float]]:
    return read_metrics(run / METRICS_FILE)


@pytest.mark.parametrize("layout", [pytest.param("DP2", marks=pytest.mark.slow), "TP2xDP2"])
def test_a_run_is_the_same_with_and_without(
    run_ranks: Callable[..., list[Any]], data: Path, tmp_path: Path, layout: str
) -> None:
    configs = [_config(data, tmp_path / name, layout, balance=name == "balanced") for name in ("balanced", "kept")]
    run_ranks(_train, LAYOUTS[layout].num_ranks, configs)
    balanced, kept = _metrics(tmp_path / "balanced"), _metrics(tmp_path / "kept")
    for one, other in zip(balanced, kept, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-6)
        for count in ("num_tiles", "num_samples", "num_supervised_tokens"):
            assert one[count] == other[count]
        assert 0 < one["row_fill"] == other["row_fill"] <= 1
        assert 1 <= one["row_cost_imbalance"] <= one["row_cost_imbalance_before"]
        assert other["row_cost_imbalance"] is other["row_cost_imbalance_before"] is None
    assert all(row["num_tiles"] > 0 for row in balanced), "drop path was not tested"
    before, after = (
        np.mean([row[name] for row in balanced]) for name in ("row_cost_imbalance_before", "row_cost_imbalance")
    )
    assert before > 1.05, f"rows cost the same, nothing was tested: {before}"
    assert after - 1 < (before - 1) / 3, f"{before} to {after}"


def test_a_broken_record_in_one_replica_ends_all_ranks(
    run_ranks: Callable[..., list[Any]], data: Path, tmp_path: Path
) -> None:
    texts = run_ranks(_train, 2, [_config(data, tmp_path, "DP2", meta="broken")])
    (message,) = (text for text in texts if text.startswith(str(data)))
    replica = texts.index(message)
    assert "broken.jsonl:13: is not valid JSON" in message
    assert texts[1 - replica] == f"the leader of replica {replica} failed: {message}"


def _exchange(info: RankInfo, payloads: list[list[list[bytes]]]) -> list[list[bytes]]:
    from internvl_megatron.device import open_device
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.parallel.host import exchange_bytes
    from internvl_megatron.parallel.layout import Layout
    from internvl_megatron.ranks import joined

    device = open_device("cpu")
    with joined(info, device, 60):
        group = make_groups(Layout(1, 1, info.world_size), device, 60).host_data
        return [exchange_bytes(of_ranks[info.rank], group) for of_ranks in payloads]


def test_bytes_go_to_the_rank_they_are_for(run_ranks: Callable[..., list[Any]]) -> None:
    """Payloads of any length, empty ones too, from each rank to each."""
    sizes = [[[0, 1, 7], [100_000, 0, 3], [0, 0, 0]], [[0] * 3] * 3]
    payloads = [
        [[bytes([10 * source + target]) * size for target, size in enumerate(to)] for source, to in enumerate(step)]
        for step in sizes
    ]
    for target, received in enumerate(run_ranks(_exchange, 3, payloads)):
        assert received == [[payloads[step][source][target] for source in range(3)] for step in range(2)]
