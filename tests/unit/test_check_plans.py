"""Plans of all sizes, checked: what does not fit is said, known cases are kept, and (slow) dry runs find what was estimated."""

import json
from pathlib import Path
from typing import Any

import pytest

from internvl_megatron.config.models import INTERNVL3
from internvl_megatron.scaling.gpus import GPUS
from internvl_megatron.scaling.memory import OTHER_BYTES, USED_SHARE
from tools import check_plans
from tools.check_plans import GPU_COUNTS, checked, counted_bytes, main, table

H100 = GPUS["h100-80g"]
TOLERANCE = 0.10
"""Between the estimated and the counted bytes of the fullest rank, `OTHER_BYTES` in both."""
TOO_FEW = {("38B", 8), ("78B", 8)}


def case(size: str, peak: float) -> dict[str, Any]:
    run = {"rank": 0, "stage": 0, "held_bytes": 20e9, "peak_bytes": peak, "of_other_rows_bytes": 1e9, "seconds": 1.0}
    return {
        "size": size,
        "gpus": 8,
        "gpu": H100.name,
        "planner_seconds": 1.0,
        "layout": "TP1",
        "way": "plain",
        "step_seconds": 1.0,
        "estimated_bytes": 60e9,
        "by_hand": [{"name": "by hand", "outcome": "slower", "over_best": 1.5}],
        "dry_runs": [run, run | {"stage": 1, "peak_bytes": peak / 2}],
    }


def test_the_fullest_rank_counts() -> None:
    assert counted_bytes(case("1B", 30e9)) == 20e9 + 30e9 + 1e9 + OTHER_BYTES


def test_what_does_not_fit_is_marked_and_is_the_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "plans.json"
    record.write_text(json.dumps({"cases": [case("1B", 30e9), case("2B", 60e9)]}), encoding="utf-8")
    arguments = ["--gpus", "8", "--record", str(record), "--sizes"]
    assert main([*arguments, "1b"]) == 0, "the record has it: nothing is planned"
    assert "too much" not in capsys.readouterr().out
    assert main([*arguments, "1b", "2b"]) == 1
    assert "87.0, **too much**" in capsys.readouterr().out


def test_a_case_is_planned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--sizes", "1b", "--gpus", "8", "--no-dry-run", "--record", str(tmp_path / "plans.json")]
    arguments += ["--output", str(tmp_path / "plans.md")]
    assert main(arguments) == 0
    [planned] = json.loads((tmp_path / "plans.json").read_text(encoding="utf-8"))["cases"]
    assert planned["estimated_bytes"] <= USED_SHARE * H100.memory_bytes
    assert planned["layout"] in (tmp_path / "plans.md").read_text(encoding="utf-8")

    def search(*_: object) -> None:
        raise AssertionError("it was planned already")

    monkeypatch.setattr(check_plans, "search", search)
    assert main(arguments) == 0


def test_a_size_that_does_not_fit_has_a_row_that_says_so() -> None:
    refused = {"size": "78B", "gpus": 8, "gpu": H100.name, "planner_seconds": 1.0, "refused": "does not fit"}
    assert "| 78B | 8 | does not fit |" in table([refused], H100)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--sizes", "79b"], "known are 1b"),
        (["--gpus", "0"], "--gpus"),
        (["--gpu", "v100"], "known are a100-80g"),
        (["--output", "no/such/folder/plans.md"], "no/such/folder is no folder"),
        (["--record", "README.md"], "not a record of this tool"),
    ],
)
def test_wrong_questions(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert named in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("num_gpus", GPU_COUNTS)
@pytest.mark.parametrize("size", INTERNVL3)
def test_a_plan_takes_a_minute_fits_by_its_dry_runs_and_beats_what_is_made_by_hand(size: str, num_gpus: int) -> None:
    found = checked(size.lower(), num_gpus, H100, runs_dry=True)
    assert found["planner_seconds"] < 60
    if "refused" in found:
        assert "does not fit on" in found["refused"]
        assert (size, num_gpus) in TOO_FEW
        return
    counted = counted_bytes(found)
    assert counted <= USED_SHARE * H100.memory_bytes
    assert found["estimated_bytes"] == pytest.approx(counted, rel=TOLERANCE)
    assert all(one["over_best"] is None or one["over_best"] >= 1 for one in found["by_hand"])
