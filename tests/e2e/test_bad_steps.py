"""Bad steps in a real run: what they change, what the run does, and what it writes about them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from internvl_megatron.checkpoint import folders
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.device import open_device
from internvl_megatron.launcher import RankFailedError
from internvl_megatron.ranks import RankInfo, joined
from tests.support.small_runs import read_lines, small_data, small_run

pytestmark = pytest.mark.parallel

RunRanks = Callable[..., list[Any]]
STEPS, SAVE_EVERY, BAD = 6, 2, 3
"""The step with this number, from 0, is spoiled."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("demo") / "data")


def _config(data: Path, folder: Path, *overrides: str) -> RunConfig:
    settings = ["data.tokens_per_row=256", f"num_steps={STEPS}", f"checkpoint.save_every_steps={SAVE_EVERY}"]
    return small_run(data, folder, *settings, *overrides)


def _spoil(trainer: Any, add: float, in_call: int) -> None:
    """Add something to a gradient of the last rank, in one of its backward passes of the run."""
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
        if info.rank == info.world_size - 1:
            rows_per_step = config.rows_per_step // trainer.plan.layout.data_size
            _spoil(trainer, add, in_call=in_step * rows_per_step * passes_per_step)
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
            batch = trainer.data.loader.next_step()
            if number == SAVE_EVERY:
                for _ in range(BAD + 1 - SAVE_EVERY):
                    batch = trainer.data.loader.next_step()
            losses.append(trainer.trainer_step.run(batch, number).loss)
        trainer.close()
    return losses


def test_a_bad_step_is_skipped_and_counted(run_ranks: RunRanks, data: Path, tmp_path: Path) -> None:
    run_ranks(_train, 1, _config(data, tmp_path), float("inf"), BAD)
    rows = read_lines(tmp_path / "metrics.jsonl")
    assert [row["updated"] for row in rows] == [number != BAD for number in range(STEPS)]
    assert [row["num_bad_steps"] for row in rows] == [0, 0, 0, 1, 1, 1]
    (event,) = read_lines(tmp_path / "events.jsonl")
    assert (event["step"], event["event"]) == (BAD + 1, "nonfinite skip") and "gradient norm" in event["text"]
    assert folders.read_info(folders.finished(tmp_path / "checkpoints")[-1]).num_bad_steps == 1


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_bad_step_takes_the_run_back_and_its_data_are_passed_over(
    run_ranks: RunRanks, data: Path, tmp_path: Path, num_ranks: int
) -> None:
    """With two ranks each has half of the rows, and one alone computes something that is not a number."""
    config = _config(data, tmp_path / "run", "bad_steps.on_nonfinite=rewind")
    run_ranks(_train, num_ranks, config, float("nan"), BAD)
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), "steps that were taken again are there once"
    wanted = run_ranks(_train_with_data_left_out, num_ranks, _config(data, tmp_path / "wanted"))[0]
    assert [row["loss"] for row in rows] == wanted
    assert [row["num_rewinds"] for row in rows] == [0, 0, 1, 1, 1, 1]
    totals = [sum(row["num_tokens"] for row in rows[: number + 1]) for number in range(STEPS)]
    assert [row["total_tokens"] for row in rows] == totals, "steps that were taken back do not count"
    events = read_lines(tmp_path / "run" / "events.jsonl")
    assert [event["event"] for event in events] == ["nonfinite rewind", "rewound"]
    info = folders.read_info(folders.finished(tmp_path / "run" / "checkpoints")[-1])
    assert (info.step, info.num_rewinds, info.num_rewound_steps) == (STEPS, 1, BAD + 1 - SAVE_EVERY)


def _train_through_a_spike(info: RankInfo, config: RunConfig) -> None:
    """A run whose hidden states are far off in the forward passes of one step."""
    from internvl_megatron.trainer import Trainer

    torch.set_num_threads(1)
    device = open_device("cpu")
    with joined(info, device, 60):
        trainer = Trainer(info, config, device)
        calls: list[int] = []

        def distort(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return output * (30 if (len(calls) - 1) // config.rows_per_step == BAD else 1)

        norm: Any = trainer.model.language[0].decoder.final_layernorm
        norm.register_forward_hook(distort)
        trainer.run()
        trainer.close()


@pytest.mark.slow
@pytest.mark.parametrize("action", ["skip", "rewind"])
def test_a_spike_of_the_loss_is_a_bad_step_too(run_ranks: RunRanks, data: Path, tmp_path: Path, action: str) -> None:
    settings = (f"bad_steps.on_spike={action}", f"bad_steps.spike_window_steps={BAD}", "bad_steps.spike_factor=10")
    run_ranks(_train_through_a_spike, 1, _config(data, tmp_path, *settings))
    events = read_lines(tmp_path / "events.jsonl")
    assert [event["event"] for event in events] == [f"spike {action}", *(["rewound"] if action == "rewind" else [])]
    rows = read_lines(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["updated"] for row in rows] == [number != BAD or action == "rewind" for number in range(STEPS)]


@pytest.mark.slow
def test_a_bad_step_ends_the_run_which_goes_on_after_it(run_ranks: RunRanks, data: Path, tmp_path: Path) -> None:
    config = _config(data, tmp_path, "bad_steps.on_nonfinite=stop")
    with pytest.raises(RankFailedError, match=r"step 4 is bad and ends the run: loss .*, gradient norm inf") as failed:
        run_ranks(_train, 1, config, float("inf"), BAD)
    assert failed.value.failures[0].is_training_error
    run_ranks(_train, 1, config, 0.0, 0)
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_gradients_that_come_out_otherwise_the_second_time_end_the_run(
    run_ranks: RunRanks, data: Path, tmp_path: Path
) -> None:
    plain = run_ranks(_train, 1, _config(data, tmp_path / "plain"), 0.0, 0)[0]
    checked = "bad_steps.recheck_every_steps=1"
    assert run_ranks(_train, 1, _config(data, tmp_path / "checked", checked), 0.0, 0)[0] == plain
    with pytest.raises(RankFailedError, match=r"step 4: rank 0 on \S+ computed other gradients the second time"):
        run_ranks(_train, 1, _config(data, tmp_path / "corrupt", checked), 1e-6, BAD, 2)
    assert folders.finished(tmp_path / "corrupt" / "checkpoints")[-1].name == "step-00000002"
