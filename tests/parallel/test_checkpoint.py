"""Save under one layout, go on under the same or another: the losses must be those of the uninterrupted run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint_convert.distributed_checkpoint import DistributedCheckpoint
from internvl_megatron.checkpoint import folders, save_load
from internvl_megatron.device import open_device
from internvl_megatron.errors import CheckpointError
from internvl_megatron.launcher import RankFailedError
from internvl_megatron.model.build import check_copies_agree, torch_dtype
from internvl_megatron.parallel.groups import make_groups
from internvl_megatron.ranks import RankInfo, joined
from tests.support.comparison import expect_equal
from tests.support.layouts import ADAMW, LAYOUTS, Ranks, Scenario
from tests.support.training import Tensors, make_step, parameters_of, replica_rows

pytestmark = pytest.mark.parallel

SAVED_AT, STEPS = 3, 6
SCENARIO = Scenario(changes={"optimizer": ADAMW, "num_steps": STEPS})
SHARDED = replace(SCENARIO, parallel_changes={"vision_sharding": "sharded"})
COPIES = replace(SCENARIO, parallel_changes={"vision_sharding": "sharded", "vision_shard_ranks": 2})
BF16 = Scenario(changes={"dtype": "bf16", "optimizer": ADAMW, "num_steps": STEPS})
SHARDED_BF16 = replace(BF16, parallel_changes={"vision_sharding": "sharded"})
History = list[tuple[float, float]]
"""(loss, gradient norm) by step."""


def _slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


def _train(
    info: RankInfo,
    ranks: Ranks,
    weights: Tensors | None,
    root: Path,
    first: int,
    last: int,
    scenario: Scenario = SCENARIO,
) -> History:
    """Steps `first` to `last`, from the checkpoint in `root` if first > 0; saves at the end of a first part."""
    import torch

    torch.set_num_threads(1)
    device = open_device("cpu")
    config = scenario.config(ranks)
    with joined(info, device, 60):
        groups = make_groups(ranks.layout, device, 60, ranks.vision_layout)
        step, model = make_step(config, weights, groups, device)
        if first > 0:
            loaded, positions = save_load.load(folders.finished(root)[-1], model, step.optimizer, groups)
            assert (loaded.step, positions) == (first, {"0": [info.world_size >= 1]})
        history = []
        for number in range(first, last):
            result = step.run(replica_rows(scenario, config, number, ranks.layout, info.rank), number)  # type: ignore
            history.append((result.loss, result.grad_norm))
        if last == SAVED_AT:
            marker = folders.CheckpointInfo(last, 10, 20, str(ranks.layout), optimizer_state=True)
            state = {"0": [True]} if info.rank == 0 else None
            step.gather_parameters()
            save_load.save(root, marker, model, step.optimizer, groups, state, keep_last=1)
        return history


@pytest.fixture(scope="module")
def interrupted(
    run_ranks: Callable[..., list[Any]], weights: dict[str, Tensors], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, History]:
    """A checkpoint written under TP2 x PP2 after three steps, and the uninterrupted run's six."""
    root = tmp_path_factory.mktemp("checkpoints")
    run_ranks(_train, 4, LAYOUTS["TP2xPP2"], weights["300m"], root, 0, SAVED_AT)
    whole = run_ranks(_train, 4, LAYOUTS["TP2xPP2"], weights["300m"], root, 0, STEPS)[0]
    return root, whole


def test_same_layout_continues_bit_for_bit(
    run_ranks: Callable[..., list[Any]], interrupted: tuple[Path, History]
) -> None:
    root, whole = interrupted
    assert run_ranks(_train, 4, LAYOUTS["TP2xPP2"], None, root, SAVED_AT, STEPS)[0] == whole[SAVED_AT:]


@pytest.mark.parametrize(
    "layout", ["1", "PP2xVPP2xDP2", "PP2 uneven", *map(_slow, ("DP2", "TP2+SP", "TP2+SPxCP2", "PP2xDP2"))]
)
def test_other_layouts_continue(
    run_ranks: Callable[..., list[Any]], interrupted: tuple[Path, History], layout: str
) -> None:
    root, whole = interrupted
    ranks = LAYOUTS[layout]
    history = run_ranks(_train, ranks.num_ranks, ranks, None, root, SAVED_AT, STEPS)[0]
    # Not only the first step: Adam's step counts and moments show in the later ones.
    np.testing.assert_allclose(history, whole[SAVED_AT:], rtol=1e-5)


def test_bf16_continues_from_its_fp32_main_parameters(
    run_ranks: Callable[..., list[Any]], weights: dict[str, Tensors], tmp_path: Path
) -> None:
    """The weights in the modules are rounded; continuing from them instead would change the next steps."""
    layout = LAYOUTS["TP2+SP"]
    run_ranks(_train, 2, layout, weights["300m"], tmp_path, 0, SAVED_AT, BF16)
    whole = run_ranks(_train, 2, layout, weights["300m"], tmp_path, 0, STEPS, BF16)[0]
    assert run_ranks(_train, 2, layout, None, tmp_path, SAVED_AT, STEPS, BF16)[0] == whole[SAVED_AT:]
    # The first step sees the same rounded weights, the next ones the same fp32 ones behind them.
    crossed = run_ranks(_train, 2, layout, None, tmp_path, SAVED_AT, STEPS, SHARDED_BF16)[0]
    np.testing.assert_allclose(crossed, whole[SAVED_AT:], rtol=1e-4)


def test_a_checkpoint_of_another_model_is_refused(
    run_ranks: Callable[..., list[Any]], interrupted: tuple[Path, History]
) -> None:
    other = Scenario(family="6b", changes={"optimizer": ADAMW, "num_steps": STEPS})
    with pytest.raises(RankFailedError) as failed:
        run_ranks(_train, 1, LAYOUTS["1"], None, interrupted[0], SAVED_AT, STEPS, other)
    assert failed.value.failures[0].is_user_error
    assert "cannot be loaded into this model" in str(failed.value)


def test_truncated_file_is_refused(
    run_ranks: Callable[..., list[Any]], interrupted: tuple[Path, History], tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(interrupted[0], tmp_path / "copy")
    data = next(folders.finished(tmp_path / "copy")[-1].glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(RankFailedError) as failed:
        run_ranks(_train, 1, LAYOUTS["1"], None, tmp_path / "copy", SAVED_AT, STEPS)
    assert failed.value.failures[0].is_user_error
    assert "step-00000003" in str(failed.value)


def test_folder_without_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        folders.read_info(tmp_path)


@pytest.mark.slow
def test_written_interleaved_it_continues_elsewhere(
    run_ranks: Callable[..., list[Any]], interrupted: tuple[Path, History], weights: dict[str, Tensors], tmp_path: Path
) -> None:
    """Chunks count their layers from 0 each; in the file they are counted through."""
    interleaved = LAYOUTS["PP2xVPP2xDP2"]
    run_ranks(_train, 4, interleaved, weights["300m"], tmp_path, 0, SAVED_AT)
    history = run_ranks(_train, 2, LAYOUTS["TP2+SP"], None, tmp_path, SAVED_AT, STEPS)[0]
    np.testing.assert_allclose(history, interrupted[1][SAVED_AT:], rtol=1e-5)


@pytest.mark.parametrize(("layout", "scenario"), [("DP2", SHARDED), ("PP2xDP2", COPIES)])
def test_a_replicated_vision_side_goes_on_in_shards(
    run_ranks: Callable[..., list[Any]], interrupted: tuple[Path, History], layout: str, scenario: Scenario
) -> None:
    root, whole = interrupted
    ranks = LAYOUTS[layout]
    history = run_ranks(_train, ranks.num_ranks, ranks, None, root, SAVED_AT, STEPS, scenario)[0]
    np.testing.assert_allclose(history, whole[SAVED_AT:], rtol=1e-5)


@pytest.fixture(scope="module")
def sharded(
    run_ranks: Callable[..., list[Any]], weights: dict[str, Tensors], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A checkpoint whose vision side was in four shards."""
    root = tmp_path_factory.mktemp("sharded")
    run_ranks(_train, 4, LAYOUTS["TP2xPP2"], weights["300m"], root, 0, SAVED_AT, SHARDED)
    return root


@pytest.mark.parametrize(
    ("layout", "scenario"),
    [("TP2xPP2", COPIES), ("1", SHARDED), _slow("TP2xPP2", SHARDED), _slow("TP2+SP", SCENARIO)],
)
def test_shards_go_on_in_other_numbers_and_as_a_whole(
    run_ranks: Callable[..., list[Any]],
    interrupted: tuple[Path, History],
    sharded: Path,
    layout: str,
    scenario: Scenario,
) -> None:
    ranks = LAYOUTS[layout]
    history = run_ranks(_train, ranks.num_ranks, ranks, None, sharded, SAVED_AT, STEPS, scenario)[0]
    np.testing.assert_allclose(history, interrupted[1][SAVED_AT:], rtol=1e-5)


def _weights_after_loading(info: RankInfo, ranks: Ranks, scenario: Scenario, folder: Path) -> Tensors:
    """All weights of the vision side, when they alone are loaded and the optimizer has taken them over."""
    import torch

    torch.set_num_threads(1)
    device = open_device("cpu")
    config = scenario.config(ranks)
    with joined(info, device, 60):
        groups = make_groups(ranks.layout, device, 60, ranks.vision_layout)
        step, model = make_step(config, None, groups, device)
        save_load.load_weights(folder, config.model, model, groups)
        step.optimizer.reload_parameters()
        check_copies_agree(model, groups)
        return {name: tensor for name, tensor in parameters_of(model).items() if name.startswith("vision.")}


@pytest.mark.slow
def test_sharded_bf16_continues_and_its_weights_are_those_of_a_replicated_run(
    run_ranks: Callable[..., list[Any]], weights: dict[str, Tensors], tmp_path: Path
) -> None:
    layout = LAYOUTS["DP2"]
    run_ranks(_train, 2, layout, weights["300m"], tmp_path, 0, SAVED_AT, SHARDED_BF16)
    whole = run_ranks(_train, 2, layout, weights["300m"], tmp_path, 0, STEPS, SHARDED_BF16)[0]
    assert run_ranks(_train, 2, layout, None, tmp_path, SAVED_AT, STEPS, SHARDED_BF16)[0] == whole[SAVED_AT:]
    crossed = run_ranks(_train, 2, layout, None, tmp_path, SAVED_AT, STEPS, BF16)[0]
    np.testing.assert_allclose(crossed, whole[SAVED_AT:], rtol=1e-4)
    checkpoint = folders.finished(tmp_path)[-1]
    found, wanted = (
        run_ranks(_weights_after_loading, 2, layout, scenario, checkpoint)[1] for scenario in (SHARDED_BF16, BF16)
    )
    expect_equal(found, wanted)
    stored = DistributedCheckpoint(checkpoint)
    for name, tensor in wanted.items():
        assert stored.dtype(name) == torch_dtype("bf16"), "weights of both kinds are in the run's number format"
        np.testing.assert_array_equal(stored.read(name).float().numpy(), tensor, err_msg=name)
