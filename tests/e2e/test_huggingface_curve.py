"""A narrow InternVL3 trained by the command line on TP2 x PP2 and by a plain Hugging Face loop on the same rows: the same losses."""

import json
from pathlib import Path

import pytest

from internvl_megatron.config.recipes import demo_digits
from internvl_megatron.train.optimizer import learning_rate
from tools.huggingface_curve import NUM_STEPS, TOLERANCE, compare, learning_rate_factor, main

RECORDS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.mark.slow
@pytest.mark.parallel
def test_500_steps_give_the_losses_of_a_plain_loop(tmp_path: Path) -> None:
    assert main([str(tmp_path / "work"), "--output", str(tmp_path / "curve.json")]) == 0
    record = json.loads((tmp_path / "curve.json").read_text())
    assert len(record["ours"]) == len(record["huggingface"]) == NUM_STEPS == 500
    assert record["largest_difference"] <= TOLERANCE
    assert record["ours"][-1] < 0.3 * record["ours"][0], "it learned"


def test_the_committed_record_says_what_its_curves_say() -> None:
    (path,) = RECORDS.glob("huggingface_curve_cpu_*.json")
    record = json.loads(path.read_text())
    assert path.with_suffix(".png").stat().st_size > 10_000
    differences = [abs(one - other) / other for one, other in zip(record["ours"], record["huggingface"], strict=True)]
    assert len(differences) == NUM_STEPS
    assert max(differences) == pytest.approx(record["largest_difference"], abs=1e-6)
    assert max(differences) <= TOLERANCE


def test_differences_are_relative_to_the_other_loop() -> None:
    found = compare([1.0, 2.0, 3.03], [1.0, 2.0, 3.0])
    assert found["largest_difference"] == pytest.approx(0.01)
    assert (found["at_step"], found["mean_difference"]) == (3, pytest.approx(0.01 / 3))


@pytest.mark.parametrize("num_steps", [1, 7, 500])
def test_the_plain_loop_has_the_rule_of_the_run(num_steps: int) -> None:
    """The loop's own, written out; compared here because its losses follow it."""
    rule = demo_digits().optimizer
    for step in range(num_steps):
        factor = learning_rate_factor(step, num_steps, rule.warmup_ratio or 0.0)
        assert rule.learning_rate * factor == pytest.approx(learning_rate(rule, step, num_steps), rel=1e-12)
