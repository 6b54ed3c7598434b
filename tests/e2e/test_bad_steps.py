"""Bad steps in a real run: what they change, what the run does, and what it writes about them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from internvl_megatron.checkpoint import folders
from internvl_megatron.config.overrides import apply_overrides
from internvl_megatron.config.recipes import demo_digits
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.device import open_device
from internvl_megatron.launcher import RankFailedError
from internvl_megatron.ranks import RankInfo, joined
from tools.prepare_demo import Amounts, prepare

pytestmark = pytest.mark.parallel

RunRanks = Callable[..., list[Any]]
STEPS, SAVE_EVERY, BAD = 6, 2, 3
"""The step with this number, from 0, is spoiled."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "data"
    few = Amounts(
        num_pictures=60,
        num_pairs=4,
        num_texts=4,
        num_heldout_pictures=12,
        num_heldout_pairs=2,
        num_heldout_texts=2,
        questions_per_task=2,
    )
    prepare(out, amounts=few)
    return out


def _config(data: Path, folder: Path, *overrides: str) -> RunConfig:
    settings = [
        f"data.meta={data / 'train_meta.json'}",
        f"data.tokenizer={data / 'tokenizer'}",
        f"folder={folder}",
        "data.eval_meta=null",
        "eval_every_steps=null",
        "data.tokens_per_row=256",
        "data.tiles_per_row=32",
        "data.num_workers=0",
        "parallel.tensor_size=1",
        "parallel.pipeline_size=1",
        f"num_steps={STEPS}",
        f"checkpoint.save_every_steps={SAVE_EVERY}",
        "optimizer.schedule=constant",
        "optimizer.warmup_ratio=0",
    ]
    return apply_overrides(demo_digits(), [*settings, *overrides])


def _spoil(trainer: Any, add: float, in_call: int) -> None:
    """Add something to a gradient, in one backward pass of the run."""
    calls: list[int] = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient + add if len(calls) - 1 == in_call else gradient

    dict(trainer.model.named_parameters())["language.decoder.final_layernorm.weight"].register_hook(spoil)


def _train(info: RankInfo, config: RunConfig, add: float, in_step: int, passes_per_step: int = 1) -> float | None:
    """A run, one of whose backward passes is spoiled; the loss of its last step."""
    from internvl_megatron.trainer import Trainer

    torch.set_num_threads(1)
    device = open_device("cpu")
    with joined(info, device, 60):
        trainer = Trainer(info, config, device)
        _spoil(trainer, add, in_call=in_step * config.rows_per_step * passes_per_step)
        try:
            return trainer.run().loss
        finally:
            trainer.close()


def _train_with_data_left_out(info: RankInfo, config: RunConfig) -> list[float]:
    """What a rewind must come to, step by step: up to the checkpoint, then on with data after the bad step's."""
    from internvl_megatron.trainer import Trainer

    torch.set_num_threads(1)
    device = open_device("cpu")
    losses = []
    with joined(info, device, 60):
        trainer = Trainer(info, config, device)
        for number in range(STEPS):
            batch = trainer.loader.next_step()
            if number == SAVE_EVERY:
                for _ in range(BAD + 1 - SAVE_EVERY):
                    batch = trainer.loader.next_step()
            losses.append(trainer.trainer_step.run(batch, number).loss)
        trainer.close()
    return losses


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_bad_step_is_skipped_and_counted(run_ranks: RunRanks, data: Path, tmp_path: Path) -> None:
    run_ranks(_train, 1, _config(data, tmp_path), float("inf"), BAD)
    rows = _lines(tmp_path / "metrics.jsonl")
    assert [row["updated"] for row in rows] == [number != BAD for number in range(STEPS)]
    assert [row["num_bad_steps"] for row in rows] == [0, 0, 0, 1, 1, 1]
    (event,) = _lines(tmp_path / "events.jsonl")
    assert (event["step"], event["event"]) == (BAD + 1, "nonfinite skip") and "gradient norm" in event["text"]
    assert folders.read_info(folders.finished(tmp_path / "checkpoints")[-1]).num_bad_steps == 1


def test_a_bad_step_takes_the_run_back_and_its_data_are_passed_over(
    run_ranks: RunRanks, data: Path, tmp_path: Path
) -> None:
    config = _config(data, tmp_path / "run", "bad_steps.on_nonfinite=rewind")
    run_ranks(_train, 1, config, float("nan"), BAD)
    rows = _lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), "steps that were taken again are there once"
    wanted = run_ranks(_train_with_data_left_out, 1, _config(data, tmp_path / "wanted"))[0]
    assert [row["loss"] for row in rows] == wanted
    assert [row["num_rewinds"] for row in rows] == [0, 0, 1, 1, 1, 1]
    events = _lines(tmp_path / "run" / "events.jsonl")
    assert [event["event"] for event in events] == ["nonfinite rewind", "rewound"]
    info = folders.read_info(folders.finished(tmp_path / "run" / "checkpoints")[-1])
    assert (info.step, info.num_rewinds, info.num_rewound_steps) == (STEPS, 1, BAD + 1 - SAVE_EVERY)


def test_a_bad_step_ends_the_run_which_goes_on_after_it(run_ranks: RunRanks, data: Path, tmp_path: Path) -> None:
    config = _config(data, tmp_path, "bad_steps.on_nonfinite=stop")
    with pytest.raises(RankFailedError, match=r"step 4 is bad and ends the run: loss .*, gradient norm inf") as failed:
        run_ranks(_train, 1, config, float("inf"), BAD)
    assert failed.value.failures[0].is_user_error
    run_ranks(_train, 1, config, 0.0, 0)
    assert [row["step"] for row in _lines(tmp_path / "metrics.jsonl")] == list(range(1, STEPS + 1))


def test_gradients_that_come_out_otherwise_the_second_time_end_the_run(
    run_ranks: RunRanks, data: Path, tmp_path: Path
) -> None:
    plain = run_ranks(_train, 1, _config(data, tmp_path / "plain"), 0.0, 0)[0]
    checked = "bad_steps.recheck_every_steps=1"
    assert run_ranks(_train, 1, _config(data, tmp_path / "checked", checked), 0.0, 0)[0] == plain
    with pytest.raises(RankFailedError, match=r"step 4: ranks \[0\] computed other gradients the second time"):
        run_ranks(_train, 1, _config(data, tmp_path / "corrupt", checked), 1e-6, BAD, 2)
    assert folders.finished(tmp_path / "corrupt" / "checkpoints")[-1].name == "step-00000002"
