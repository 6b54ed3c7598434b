"""Emulated FP8 in training, on several ranks: products of split layers, histories under every layout, checkpoints, recomputation."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internvl_megatron.checkpoint import folders, save_load
from internvl_megatron.config.schema import Fp8Config
from internvl_megatron.device import open_device
from internvl_megatron.parallel.groups import make_groups
from internvl_megatron.ranks import RankInfo, joined
from tests.support.layouts import ADAMW, LAYOUTS, Ranks, Scenario
from tests.support.training import Tensors, make_step, replica_rows

pytestmark = pytest.mark.parallel

SAVED_AT, STEPS = 2, 4
DELAYED = Scenario(
    changes={"fp8": Fp8Config(language="delayed", history_steps=3), "optimizer": ADAMW, "num_steps": STEPS}
)
NONE = replace(DELAYED, changes=DELAYED.changes | {"fp8": Fp8Config()})


def _slow(case: str) -> Any:
    return pytest.param(case, marks=pytest.mark.slow)


@dataclass
class Run:
    """What a rank has seen."""

    losses: list[float]
    histories: dict[str, np.ndarray]
    """[steps, kinds] of this rank's layers after `SAVED_AT` steps: when they were saved, or as they were loaded."""
    after_first_step: dict[str, np.ndarray]


def _train(
    info: RankInfo, ranks: Ranks, weights: Tensors | None, root: Path | None, first: int, last: int, scenario: Scenario
) -> Run:
    """Steps `first` to `last`, from the checkpoint in `root` if first > 0; else one is saved there after `SAVED_AT`."""
    import torch

    torch.set_num_threads(1)
    device = open_device("cpu")
    config = scenario.config(ranks)

    def histories() -> dict[str, np.ndarray]:
        own = model.amax_histories
        return {} if own is None else dict(zip(own.names, own.past.clone().numpy(), strict=True))

    with joined(info, device, 60):
        groups = make_groups(ranks.layout, device, 60, ranks.vision_layout)
        step, model = make_step(config, weights, groups, device)
        if first > 0:
            assert root is not None, "a run goes on from a checkpoint"
            save_load.load(folders.finished(root)[-1], model, step.optimizer, groups)
        run = Run([], histories(), {})
        for number in range(first, last):
            rows: Any = replica_rows(scenario, config, number, ranks.layout, info.rank)
            if number == 0:
                step.evaluate(rows)  # must leave no trace
            run.losses.append(step.run(rows, number).loss)
            if number == 0:
                run.after_first_step = histories()
            if number + 1 == SAVED_AT:
                run.histories = histories()
                if root is not None:
                    marker = folders.CheckpointInfo(SAVED_AT, 10, 20, str(ranks.layout), optimizer_state=True)
                    step.gather_parameters()
                    save_load.save(root, marker, model, step.optimizer, groups, None, keep_last=1)
        return run


def _merged(runs: list[Run], which: str = "histories") -> dict[str, np.ndarray]:
    """Histories of all layers; ranks that hold parts or copies of one agree to the last bit."""
    merged: dict[str, np.ndarray] = {}
    for run in runs:
        for name, past in getattr(run, which).items():
            np.testing.assert_array_equal(past, merged.setdefault(name, past), err_msg=name)
    return merged


@pytest.fixture(scope="module")
def one_rank(run_ranks: Callable[..., list[Any]], weights: dict[str, Tensors]) -> Run:
    return run_ranks(_train, 1, LAYOUTS["1"], weights["300m"], None, 0, SAVED_AT, DELAYED)[0]


@pytest.mark.parametrize("layout", ["DP2", "TP2+SP", *map(_slow, ("CP2", "TP2xPP2", "PP2xVPP2"))])
def test_histories_do_not_depend_on_the_layout(
    run_ranks: Callable[..., list[Any]], weights: dict[str, Tensors], one_rank: Run, layout: str
) -> None:
    """Nor on how rows are split into micro-batches. After a step sums in another order (1e-7) have moved a few values over the
    edge between two numbers of FP8, on one rank as well; before, nothing differs."""
    ranks = LAYOUTS[layout]
    runs = run_ranks(_train, ranks.num_ranks, ranks, weights["300m"], None, 0, SAVED_AT, DELAYED)
    first, expected = _merged(runs, "after_first_step"), one_rank.after_first_step
    assert first.keys() == expected.keys()
    assert len(expected) == 4 * 4
    for name, past in expected.items():
        assert (past[0] > 0).all(), f"{name}: a tensor was not seen"
        assert (past[1:] == 0).all(), f"{name}: a step makes one entry"
        np.testing.assert_allclose(first[name], past, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(runs[0].losses[0], one_rank.losses[0], rtol=1e-6)
    np.testing.assert_allclose(runs[0].losses, one_rank.losses, rtol=5e-3)
    for name, past in _merged(runs).items():
        np.testing.assert_allclose(past, one_rank.histories[name], rtol=0.2, err_msg=name)


@pytest.mark.parametrize("how", ["full", _slow("selective")])
def test_recomputation_enters_nothing_twice(
    run_ranks: Callable[..., list[Any]], weights: dict[str, Tensors], one_rank: Run, how: Any
) -> None:
    again = replace(DELAYED, parallel_changes={"language_recompute": how})
    run = run_ranks(_train, 1, LAYOUTS["1"], weights["300m"], None, 0, SAVED_AT, again)[0]
    assert run.losses == one_rank.losses
    for name, past in one_rank.histories.items():
        np.testing.assert_array_equal(run.histories[name], past, err_msg=name)


@pytest.fixture(scope="module")
def saved(
    run_ranks: Callable[..., list[Any]], weights: dict[str, Tensors], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Run], list[float]]:
    """A checkpoint of TP2 x PP2 after two steps of four, what the ranks saw, and the losses."""
    root, ranks = tmp_path_factory.mktemp("fp8"), LAYOUTS["TP2xPP2"]
    runs = run_ranks(_train, 4, ranks, weights["300m"], root, 0, STEPS, DELAYED)
    return root, runs, runs[0].losses


@pytest.mark.slow
def test_same_layout_continues_bit_for_bit(
    run_ranks: Callable[..., list[Any]], saved: tuple[Path, list[Run], list[float]]
) -> None:
    root, _, whole = saved
    assert run_ranks(_train, 4, LAYOUTS["TP2xPP2"], None, root, SAVED_AT, STEPS, DELAYED)[0].losses == whole[SAVED_AT:]


@pytest.mark.parametrize("layout", ["1", _slow("PP2xVPP2")])
def test_other_layouts_continue(
    run_ranks: Callable[..., list[Any]], saved: tuple[Path, list[Run], list[float]], layout: str
) -> None:
    root, runs, whole = saved
    ranks = LAYOUTS[layout]
    continued = run_ranks(_train, ranks.num_ranks, ranks, None, root, SAVED_AT, STEPS, DELAYED)
    loaded, before = _merged(continued), _merged(runs)
    assert loaded.keys() == before.keys()
    for name, past in before.items():
        np.testing.assert_array_equal(loaded[name], past, err_msg=name)
    np.testing.assert_allclose(continued[0].losses, whole[SAVED_AT:], rtol=5e-3)


@pytest.mark.parametrize(("num_steps", "kept"), [pytest.param(1, 1, marks=pytest.mark.slow), (5, 3)])
def test_another_number_of_steps_keeps_the_newest(
    run_ranks: Callable[..., list[Any]], saved: tuple[Path, list[Run], list[float]], num_steps: int, kept: int
) -> None:
    root, runs, _ = saved
    other = replace(DELAYED, changes=DELAYED.changes | {"fp8": Fp8Config(language="delayed", history_steps=num_steps)})
    loaded = run_ranks(_train, 1, LAYOUTS["1"], None, root, SAVED_AT, SAVED_AT, other)[0].histories
    for name, past in _merged(runs).items():
        np.testing.assert_array_equal(loaded[name][:kept], past[:kept], err_msg=name)
        assert (loaded[name][kept:] == 0).all()


@pytest.mark.slow
def test_with_and_without_fp8_continue_from_each_other(
    run_ranks: Callable[..., list[Any]],
    saved: tuple[Path, list[Run], list[float]],
    weights: dict[str, Tensors],
    tmp_path: Path,
) -> None:
    root, _, whole = saved
    plain = run_ranks(_train, 1, LAYOUTS["1"], None, root, SAVED_AT, STEPS, NONE)[0]
    assert plain.histories == {}
    assert plain.losses != whole[SAVED_AT:]
    np.testing.assert_allclose(plain.losses, whole[SAVED_AT:], rtol=0.02)
    run_ranks(_train, 1, LAYOUTS["1"], weights["300m"], tmp_path, 0, SAVED_AT, NONE)
    rounded = run_ranks(_train, 1, LAYOUTS["1"], None, tmp_path, SAVED_AT, STEPS, DELAYED)[0]
    assert all((past == 0).all() for past in rounded.histories.values())
    np.testing.assert_allclose(rounded.losses, plain.losses, rtol=0.05)


def test_left_out_layers_are_counted_over_all_stages(
    run_ranks: Callable[..., list[Any]], weights: dict[str, Tensors]
) -> None:
    """The first two of four layers and the last: only the third chunk of four, on the first rank, is in FP8."""
    some = Fp8Config(language="delayed", first_bf16_layers=2, last_bf16_layers=1)
    scenario = replace(DELAYED, changes=DELAYED.changes | {"fp8": some})
    ranks = LAYOUTS["PP2xVPP2"]
    runs = run_ranks(_train, ranks.num_ranks, ranks, weights["300m"], None, 0, 1, scenario)
    assert {name.split(".")[1] for name in _merged(runs)} == {"2"}


VISION_CASES = [("6b", "mxfp8", True), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
    ("300m", "current", False), ("300m", "current", True), ("6b", "blockwise", False),
))]  # fmt: skip


@pytest.mark.parametrize(("family", "recipe", "sharded"), VISION_CASES)
def test_the_vision_side_trains_in_both_kinds_of_copies(
    run_ranks: Callable[..., list[Any]], weights: dict[str, Tensors], family: str, recipe: Any, sharded: bool
) -> None:
    """Rounded losses are near those without and not the same; FSDP2 changes nothing. Layers computed again too."""
    fp8 = Fp8Config(vision=recipe, projector=recipe)
    kind = {"vision_sharding": "sharded"} if sharded else {}
    parallel = {"vision_chunk_tiles": 128, "vision_recompute": "layer", **kind}
    rounded = Scenario(family, changes={"fp8": fp8, "num_steps": 2}, parallel_changes=parallel)
    plain = replace(rounded, changes={"num_steps": 2})
    ranks = LAYOUTS["DP2"]
    losses = [
        run_ranks(_train, 2, ranks, weights[family], None, 0, 2, scenario)[0].losses for scenario in (rounded, plain)
    ]
    assert losses[0] != losses[1]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.02)


def _curve(info: RankInfo, weights: Tensors, fp8: Fp8Config) -> list[float]:
    """Losses of thirty steps on the same four rows, on one rank."""
    import torch

    torch.set_num_threads(1)
    device, ranks = open_device("cpu"), LAYOUTS["1"]
    faster = replace(ADAMW, learning_rate=0.003, weight_decay=0.0, warmup_ratio=0.1, eps=1e-8)
    scenario = Scenario(changes={"optimizer": faster, "num_steps": 30, "fp8": fp8})
    config = scenario.config(ranks)
    with joined(info, device, 60):
        groups = make_groups(ranks.layout, device, 60, ranks.vision_layout)
        step, _ = make_step(config, weights, groups, device)
        rows: Any = replica_rows(scenario, config, 0, ranks.layout, 0)
        return [step.run(rows, number).loss for number in range(30)]


@pytest.mark.slow
def test_a_curve_with_fp8_stays_near_the_one_without(
    run_ranks: Callable[..., list[Any]], weights: dict[str, Tensors]
) -> None:
    """The rows are learnt by heart, nearly as fast as without: the first step's gradients have no scale yet, and are mostly
    lost. The demo's curves, in all recipes, are in `tests/e2e`."""
    plain = run_ranks(_curve, 1, weights["300m"], Fp8Config())[0]
    assert plain[-1] < plain[0] / 50
    fp8 = Fp8Config(language="delayed", vision="current", projector="current")
    rounded = run_ranks(_curve, 1, weights["300m"], fp8)[0]
    assert rounded != plain, "nothing was rounded"
    np.testing.assert_allclose(rounded, plain, atol=0.03 * plain[0], rtol=0)
