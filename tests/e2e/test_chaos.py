"""Fifteen faults at random, of every kind: the run ends with the losses of an undisturbed one, and leaves nothing behind."""

import json
from pathlib import Path

import pytest

from tools.chaos import KINDS, SAVE_EVERY, main

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

NUM_FAULTS = 15


@pytest.mark.parametrize("saves", [[], ["--synchronous"]])
def test_fifteen_faults_cost_steps_and_nothing_else(tmp_path: Path, saves: list[str]) -> None:
    output = tmp_path / "chaos.json"
    faults = ["--faults", str(NUM_FAULTS), "--seed", "3"]
    assert main([*faults, *saves, "--folder", str(tmp_path), "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    assert record["num_faults"] == NUM_FAULTS and set(record["by_kind"]) == set(KINDS)
    assert all(fault["steps_redone"] <= fault["most_steps_redone"] for fault in record["faults"])
    if saves:
        assert {fault["most_steps_redone"] % SAVE_EVERY for fault in record["faults"]} == {0}, (
            "intervals alone are lost"
        )
    assert "| kill in save |" in output.with_suffix(".md").read_text()
