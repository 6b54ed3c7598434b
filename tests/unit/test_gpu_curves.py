"""Curves: what is judged, and that the data are what the trainer takes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internvl_megatron.config.schema import RunConfig
from internvl_megatron.launcher import Failure, RankFailedError
from tools import gpu_curves
from tools.gpu_curves import (
    CURVES,
    NUM_WORDS,
    Curve,
    LearnableStep,
    Record,
    counting,
    curve_config,
    curves_here,
    judge,
    table,
    train_curves,
)

FALLING = [5.0, 4.0, 3.0, 2.0, 1.0]


def passed(**losses: list[float]) -> dict[str, bool]:
    curves = [Curve("fp32", "fp32"), Curve("bf16", "bf16", reference="fp32"), Curve("fp8", "bf16", reference="bf16")]
    return {verdict.name: verdict.passed for verdict in judge(losses, curves, learned_share=0.8)}


def test_a_curve_must_stay_near_its_reference_and_learn() -> None:
    assert passed(fp32=FALLING, bf16=[*FALLING[:-1], 1.009]) == {"fp32": True, "bf16": True}
    assert passed(fp32=FALLING, bf16=[*FALLING[:-1], 1.02]) == {"fp32": True, "bf16": False}
    assert passed(fp32=[5.0] * 5, bf16=[5.0] * 5) == {"fp32": False, "bf16": False}


def test_what_is_not_a_number_or_has_no_reference_fails() -> None:
    assert passed(fp32=FALLING, bf16=[*FALLING[:-1], float("nan")]) == {"fp32": True, "bf16": False}
    assert passed(fp32=FALLING, fp8=FALLING) == {"fp32": True, "fp8": False}


def test_a_curve_that_fails_takes_no_other_along(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The third ends its process; those after it get another. All that has ended is in the record, and is judged."""
    record, processes = Record.begin(tmp_path / "record.json", True, {}), list[list[str]]()

    def launch(_body: Any, _ranks: int, configs: list[RunConfig], record: Record, **_: Any) -> None:
        processes.append([config.name for config in configs])
        for config in configs:
            if config.name == "fp8_delayed":
                raise RankFailedError([Failure(0, 0.0, "ValueError: no histories")])
            record.add_losses(config.name, FALLING)

    monkeypatch.setattr(gpu_curves, "launch", launch)
    curves = curves_here(is_dry=True)[0]
    train_curves([curve_config(curve, 5, "cpu", True) for curve in curves], record, "cpu")
    names = ["fp32", "bf16", "fp8_delayed", "fp8_current", "fp8_blockwise"]
    assert processes == [names, names[3:]]
    found = record.read()
    assert list(found["losses"]) == [name for name in names if name != "fp8_delayed"]
    assert list(found["failures"]) == ["fp8_delayed"]
    assert "no histories" in found["failures"]["fp8_delayed"]
    assert {verdict["name"]: verdict["passed"] for verdict in found["verdicts"]} == dict.fromkeys(
        found["losses"], True
    )


def test_the_table_says_how_each_ended() -> None:
    text = table(judge({"fp32": FALLING, "bf16": [*FALLING[:-1], 1.5]}, CURVES, 0.8))
    assert "| bf16 | 5.0000 | 1.5000 | fp32 | 50.00% | FAILED |" in text


def test_dry_curves_are_emulated_and_compared_with_bf16() -> None:
    curves, left_out = curves_here(is_dry=True)
    assert {curve.name for curve in curves} == {"fp32", "bf16", "fp8_delayed", "fp8_current", "fp8_blockwise"}
    assert all(curve.layers == "torch" and curve.fp8.backend == "emulated" for curve in curves)
    assert {curve.reference for curve in curves[2:]} == {"bf16"}
    assert set(left_out) == {"bf16_te"}


def test_steps_differ_and_depend_on_their_number_alone() -> None:
    config = curve_config(CURVES[0], 10, "cpu", is_dry=True)
    one, again, other = LearnableStep(config, 3), LearnableStep(config, 3), LearnableStep(config, 4)
    assert (one.rows[0].token_ids == again.rows[0].token_ids).all()
    assert (one.rows[0].token_ids != other.rows[0].token_ids).any()


def test_pictures_say_the_first_word_of_their_answers() -> None:
    config = curve_config(CURVES[0], 10, "cpu", is_dry=True)
    right = total = 0
    for number in range(20):
        step = LearnableStep(config, number)
        for row_number, row in enumerate(step.rows):
            for image, start in enumerate(row.image_starts.tolist()):
                last = start + config.model.vision.tokens_per_tile - 1
                brightness = int(step.tiles().tiles[row_number, image].mean()) // 16
                assert row.weights[last] == 1
                right, total = right + int(row.targets[last] == brightness), total + 1
    assert total > 40
    assert right / total > 0.75, "but for random words"


def test_counting_goes_round_with_some_random_words() -> None:
    words = counting(np.random.default_rng(0), 1000, 5, 3)
    regular = (5 + 3 * np.arange(1000)) % NUM_WORDS
    assert (words != regular).mean() == pytest.approx(0.1, abs=0.03)
    assert words.max() < NUM_WORDS
