"""A run with AdamW's moments in bf16 saves and resumes without copies of them on the device, and goes on as if nothing had been."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from internvl_megatron import device as device_module
from internvl_megatron.checkpoint import folders, save_load
from internvl_megatron.checkpoint.optimizer_layout import optimizer_layout
from internvl_megatron.device import Device, open_device
from internvl_megatron.parallel.groups import make_groups
from internvl_megatron.ranks import RankInfo, joined
from tests.support.layouts import ADAMW, LAYOUTS, Scenario
from tests.support.training import Tensors, make_step, replica_rows

pytestmark = pytest.mark.parallel

SAVED_AT, STEPS = 2, 4
SCENARIO = Scenario(changes={"dtype": "bf16", "optimizer": replace(ADAMW, moments="bf16"), "num_steps": STEPS})
BLOCK_BYTES = 1 << 20
History = list[tuple[float, float]]


def _train(
    info: RankInfo, weights: Tensors | None, root: Path, steps: range, own_format: bool
) -> tuple[History, dict[str, int]]:
    """Take some steps, from the checkpoint in `root` unless they are the first; save after `SAVED_AT`.

    Returns:
        (loss, gradient norm) by step; bytes that the optimizers have copied while the run was saved, and while it was loaded,
        beyond its state itself.
    """
    import torch

    from tests.support.fused_adam import FusedAdam, use_fused_adam

    torch.set_num_threads(1)
    device, ranks = open_device("cpu"), LAYOUTS["DP2"]
    use_fused_adam(setattr)
    # As on a GPU, whose checkpoints are copied into common blocks: a file must hold its tensors and not their blocks.
    device_module._host_memory = lambda tensors: device_module._in_blocks(tensors, BLOCK_BYTES, pin_memory=False)
    # A CPU has no Transformer Engine to say so.
    choose = Device.kernels
    Device.kernels = lambda self, config: choose(self, replace(config, optimizer=ADAMW))
    config = SCENARIO.config(ranks)
    copied = {}
    with joined(info, device, 60):
        groups = make_groups(ranks.layout, device, 60, ranks.vision_layout)
        step, model = make_step(config, weights, groups, device)
        layout = optimizer_layout(config, groups) if own_format else None
        if steps.start > 0:
            FusedAdam.copied_bytes = 0
            save_load.load(folders.finished(root)[-1], model, step.optimizer, groups, own_layout=layout)
            sides: Any = step.optimizer.sides
            inner = [part for side in sides for part in save_load._inner_optimizers(side)]
            state = sum(value.nbytes for one in inner for values in one.state.values() for value in values.values())
            assert state > 0, "the optimizers have state"
            copied["load"] = FusedAdam.copied_bytes - state
        history = []
        for number in steps:
            result = step.run(replica_rows(SCENARIO, config, number, ranks.layout, info.rank), number)  # type: ignore
            history.append((result.loss, result.grad_norm))
        if steps.stop == SAVED_AT:
            marker = folders.CheckpointInfo(
                SAVED_AT, 10, 20, str(ranks.layout), optimizer_state=True, optimizer_layout=layout
            )
            step.gather_parameters()
            FusedAdam.copied_bytes = 0
            folder = save_load.save(root, marker, model, step.optimizer, groups, None, keep_last=1)
            num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            assert num_bytes < 30 * sum(parameter.numel() for _, parameter in model.named_parameters())
            copied["save"] = FusedAdam.copied_bytes
        return history, copied


@pytest.fixture(scope="module")
def whole(
    run_ranks: Callable[..., list[Any]], weights: dict[str, Tensors], tmp_path_factory: pytest.TempPathFactory
) -> History:
    """Of the uninterrupted run."""
    return run_ranks(_train, 2, weights["300m"], tmp_path_factory.mktemp("none"), range(STEPS), True)[0][0]


@pytest.mark.parametrize("own_format", [True, False])
def test_the_run_goes_on_bit_for_bit_and_nothing_is_copied(
    run_ranks: Callable[..., list[Any]], weights: dict[str, Tensors], whole: History, tmp_path: Path, own_format: bool
) -> None:
    for _, copied in run_ranks(_train, 2, weights["300m"], tmp_path, range(SAVED_AT), own_format):
        assert copied == {"save": 0}
    resumed = run_ranks(_train, 2, None, tmp_path, range(SAVED_AT, STEPS), own_format)
    assert resumed[0][0] == whole[SAVED_AT:]
    assert len(set(whole)) == STEPS, "training changes something"
    for _, copied in resumed:
        assert copied == {"load": 0}
