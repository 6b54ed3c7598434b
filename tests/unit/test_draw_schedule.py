"""The drawing tool: every schedule is told and drawn, and wrong questions are refused."""

from pathlib import Path

import pytest

from tools.draw_schedule import main

RECIPE = ("internvl3_8b_pretrain", "parallel.pipeline_size=2", "parallel.stage_layers=14,14", "rows_per_step=32")
FIRST_STAGE = ("parallel.vision_placement=first_stage", "parallel.vision_recompute=layer")


@pytest.mark.parametrize(
    "more",
    [
        ("--gpus", "16"),
        ("--gpus", "16", *FIRST_STAGE),
        ("--gpus", "24", "--encoder-ranks", "8"),
    ],
)
def test_schedules_are_told(capsys: pytest.CaptureFixture[str], more: tuple[str, ...]) -> None:
    assert main([*RECIPE, *more]) == 0
    told = capsys.readouterr().out
    assert "bubbles" in told
    assert "exposed messages between ranks" in told
    assert ("last: the 8 encoder ranks" in told) == ("--encoder-ranks" in more)


def test_a_picture_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (pip install 'internvl_megatron[demo]')")
    file = tmp_path / "schedule.png"
    assert main([*RECIPE, "--gpus", "24", "--encoder-ranks", "8", "--output", str(file)]) == 0
    assert file.stat().st_size > 10000


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--gpus", "16", "--encoder-ranks", "16"), "below --gpus=16"),
        (("--gpus", "24", "--encoder-ranks", "8", *FIRST_STAGE), "vision_placement out"),
        (("--gpus", "15"), "does not divide"),
    ],
)
def test_what_does_not_go_is_refused(capsys: pytest.CaptureFixture[str], more: tuple[str, ...], said: str) -> None:
    assert main([*RECIPE, *more]) == 2
    assert said in capsys.readouterr().err
