"""The planner: what it offers is valid and fits, the best is the best, and `train` takes it."""

import re
from pathlib import Path

import pytest

from internvl_megatron.cluster.request import JobRequest, check, describe, requested_config
from internvl_megatron.config.overrides import apply_overrides
from internvl_megatron.config.plan import plan
from internvl_megatron.config.recipes import find_recipe
from internvl_megatron.errors import ConfigError
from internvl_megatron.scaling.drawn_rows import drawn_workload
from internvl_megatron.scaling.gpus import GPUS
from internvl_megatron.scaling.memory import USED_SHARE, rank_bytes
from internvl_megatron.scaling.planner import Search, judge, lighter_last, search, slower_because
from internvl_megatron.scaling.predicted_step import predict_step
from tools.plan import main, planned_config

H100 = GPUS["h100-80g"]
CONFIG = planned_config("8b", 16, 16384, 128, "none")
WORKLOAD = drawn_workload(16384, CONFIG.data.tiles_per_row, 0.5)


@pytest.fixture(scope="module")
def found() -> Search:
    return search(CONFIG, 16, H100, WORKLOAD)


def test_every_choice_is_valid_and_fits(found: Search) -> None:
    assert len(found.choices) > 10
    for choice in found.choices:
        made = plan(choice.config, 16)
        assert made == choice.plan
        assert made.layout.world_size == 16
        assert rank_bytes(choice.config, made).total <= USED_SHARE * H100.memory_bytes
        assert choice.config.model == CONFIG.model
        assert choice.config.data == CONFIG.data


def test_the_best_is_first_and_the_others_lose_somewhere(found: Search) -> None:
    times = [choice.time.total for choice in found.choices]
    assert times == sorted(times)
    assert len({choice.layout for choice in found.choices}) == len(times)
    assert all(slower_because(choice, found.choices[0]) for choice in found.choices[1:])


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.tensor_size=2", "parallel.sequence_parallel=true"],
        ["parallel.tensor_size=4", "parallel.sequence_parallel=true", "parallel.vision_window_rows=null"],
        ["parallel.tensor_size=1", "parallel.sequence_parallel=false", "parallel.pipeline_size=4"],
        ["parallel.tensor_size=1", "parallel.sequence_parallel=false", "parallel.context_size=2"],
    ],
)
def test_no_layout_made_by_hand_is_faster(found: Search, overrides: list[str]) -> None:
    config = apply_overrides(CONFIG, overrides)
    memory, time = judge(config, 16, WORKLOAD, H100)
    fits = memory.total <= USED_SHARE * H100.memory_bytes
    assert not fits or time.total >= found.choices[0].time.total


def test_the_overrides_are_what_was_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str], found: Search) -> None:
    file = tmp_path / "overrides"
    arguments = ["8B", "--gpus", "16", "--rows", "16384", "--rows-per-step", "128", "--output", str(file)]
    assert main(arguments) == 0
    overrides = file.read_text(encoding="utf-8").split()
    given = [*overrides, "data.meta=given later", "data.tokenizer=given later"]
    config = apply_overrides(find_recipe("internvl3_8b_pretrain", 16), given)
    best = found.choices[0]
    assert predict_step(config, plan(config, 16), WORKLOAD, H100) == best.time
    text = capsys.readouterr().out
    assert f"best: {best.layout}" in text
    assert f"train internvl3_8b_pretrain $(cat {file})" in text


def test_layers_make_room_for_the_output_layer() -> None:
    assert lighter_last(80, 4, 0.0) == (20, 20, 20, 20)
    assert lighter_last(80, 4, 2.0) == (21, 21, 20, 18)
    assert sum(lighter_last(28, 8, 3.0)) == 28


def test_what_does_not_fit_is_said_with_the_way_out() -> None:
    config = planned_config("78b", 8, 32768, 512, "none")
    with pytest.raises(
        ConfigError, match=r"does not fit on 8 GPUs of 80 GB: .* needs \d+ GB on a rank; take more GPUs"
    ):
        search(config, 8, H100, drawn_workload(32768, config.data.tiles_per_row, 0.5))


def test_what_is_planned_is_launched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same layout, and the same prediction, from the settings file."""
    settings = tmp_path / "planned.toml"
    assert main(["8b", "--gpus", "16", "--rows", "16384", "--settings", str(settings)]) == 0
    said = capsys.readouterr().out
    best = re.search(r"best: (TP\S+ x PP\S+(?: x \S+)*),", said)
    seconds = re.search(r"predicted step (\d+\.\d+) s", said)
    assert best is not None and seconds is not None
    given = ["data.meta=m.json", "data.tokenizer=t", "checkpoint.load=w"]
    config = requested_config("internvl3_8b_pretrain", 16, settings, given)
    request = JobRequest(nodes=2, gpus_per_node=8, gpu="h100-80g")
    shown = describe(config, check(config, request)[0], request, [2])
    assert f"on 16 ranks: {best[1]}," in shown
    assert f"predicted step on h100-80g: {float(seconds[1]):.1f} s" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["79b", "--gpus", "8"], "known are 1b"),
        (["8b", "--gpus", "8", "--gpu", "v100"], "known are a100-80g"),
        (["8b", "--gpus", "0"], "--gpus and --rows are at least 1"),
        (["8b", "--gpus", "23"], "no layout of internvl3_8b_pretrain on 23 GPUs is valid"),
        (["8b", "--gpus", "8", "--gpu", "a100-80g", "--fp8", "current"], "a100-80g has no FP8"),
        (["8b", "--gpus", "8", "--image-share", "0.9"], "90% image tokens cannot be drawn"),
    ],
)
def test_wrong_questions(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
