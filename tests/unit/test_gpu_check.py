"""`gpu_check`: parts, their time limits, the report."""

import argparse
import json
import sys
from pathlib import Path

import pytest

from tools import benchmark_gpu, gpu_check
from tools.gpu_check import PARTS, Part, chosen, main, markdown, run_part
from tools.machine_record import parse_gpu


def python(name: str, code: str, limit_seconds: int = 60) -> Part:
    return Part(name, limit_seconds, ("-c", code), dry=())


WRITES = "import sys, json; json.dump({'name': 'x'}, open(sys.argv[-1], 'w'))"


def test_parts_are_chosen_by_how_they_begin() -> None:
    wanted = ["environment", "hf-2b-4k", "hf-2b-16k"]
    assert [part.name for part in chosen(["hf-2b", "environment"])] == wanted
    assert chosen([]) == list(PARTS)
    with pytest.raises(SystemExit, match="no part 'fast'"):
        chosen(["fast"])


def test_every_part_fits_nine_minutes() -> None:
    assert all(part.limit_seconds < 540 for part in PARTS)
    assert len({part.name for part in PARTS}) == len(PARTS)


def test_what_a_dry_part_overrides_comes_last() -> None:
    """And what a part has without it is what the tool takes."""
    parser = argparse.ArgumentParser()
    benchmark_gpu.add_command(parser.add_subparsers())
    for part in PARTS:
        if part.command[:3] == ("-m", "tools.benchmark", "gpu"):
            parser.parse_args(part.command[2:])
            dry = parser.parse_args([*part.command[2:], *part.dry])
            assert (dry.dry, dry.steps, dry.warmup) == (True, 1, 1)
    (kept,) = chosen(["kept"])
    assert parser.parse_args(kept.command[2:]).way == "bf16-none-16"
    (short, long) = (parser.parse_args(chosen([f"speed-8b-{rows}"])[0].command[2:]) for rows in ("4k", "16k"))
    assert set(short.precisions) - set(long.precisions) == {"fp8_delayed"}


def test_ends_of_a_part(tmp_path: Path) -> None:
    passed = run_part(python("good", WRITES), False, 60, tmp_path)
    assert (passed["status"], passed["record"]) == ("passed", {"name": "x"})
    assert run_part(python("bad", "raise SystemExit(3)"), False, 60, tmp_path)["exit_code"] == 3
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    late = run_part(python("late", child), False, 1.0, tmp_path)
    assert late["status"] == "out of time"
    assert late["seconds"] < 30


def test_a_failure_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parts = (python("bad", "raise SystemExit(1)"), python("good", WRITES))
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    assert main(["--output", str(tmp_path), "--dry"]) == 1
    (report,) = tmp_path.glob("*.json")
    assert {name: part["status"] for name, part in json.loads(report.read_text())["parts"].items()} == {
        "bad": "failed",
        "good": "passed",
    }
    assert "| good | passed |" in report.with_suffix(".md").read_text()
    # A later call for one part keeps what the other found.
    again = tmp_path / "again"
    assert main(["good", "--output", str(again), "--merge", str(report)]) == 0
    (merged,) = again.glob("*.json")
    assert set(json.loads(merged.read_text())["parts"]) == {"bad", "good"}


def test_parts_without_time_are_said_not_to_have_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_check, "PARTS", (python("good", WRITES),))
    assert main(["--output", str(tmp_path), "--limit", "0"]) == 1
    assert "| good | not run |" in next(tmp_path.glob("*.md")).read_text()


def test_missing_packages_are_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "is_installed", lambda module: module != "transformer_engine")
    gpu_check.say_what_is_missing()
    said = capsys.readouterr().out
    assert "transformer_engine is not installed; left out: FP8" in said
    assert "flash_attn" not in said


def test_an_empty_report_is_a_table() -> None:
    assert markdown({}).count("\n") == 2


def test_the_drivers_answer() -> None:
    found = parse_gpu("NVIDIA H100 80GB HBM3, 580.159.03, 81559\n")
    assert found == {"name": "NVIDIA H100 80GB HBM3", "driver": "580.159.03", "memory_bytes": 81559 * 2**20}
    assert parse_gpu("No devices were found\n") is None
    assert sys.version_info >= (3, 12)
