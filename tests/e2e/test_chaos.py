"""Fifteen faults at random, of every kind: the run ends with the losses of an undisturbed one, and leaves nothing behind."""

import json
from pathlib import Path

import pytest

from tools.chaos import KINDS, main

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

NUM_FAULTS = 15


def test_fifteen_faults_cost_steps_and_nothing_else(tmp_path: Path) -> None:
    output = tmp_path / "chaos.json"
    assert main(["--faults", str(NUM_FAULTS), "--seed", "3", "--folder", str(tmp_path), "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    assert record["num_faults"] == NUM_FAULTS and set(record["by_kind"]) == set(KINDS)
    assert all(fault["steps_redone"] <= fault["most_steps_redone"] for fault in record["faults"])
    assert "| kill in save |" in output.with_suffix(".md").read_text()
