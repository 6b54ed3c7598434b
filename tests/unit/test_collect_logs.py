"""A timeline of many ranks' logs: the first failure is told first, whatever its number, and tracebacks stay whole."""

import os
from pathlib import Path

import pytest

from internvl_megatron.errors import ConfigError
from tools.collect_logs import main, meaning, report

TRACE = 'Traceback (most recent call last):\n  File "x.py", line 3\nRuntimeError: CUDA error: uncorrectable ECC'


def write(folder: Path, rank: int, text: str, ended: float | None = None, code: int = 1) -> None:
    (folder / f"train-{rank}.log").write_text(text)
    if ended is not None:
        path = folder / f"exit-train-{rank}"
        path.write_text(f"{code} host{rank // 2}\n")
        os.utime(path, (ended, ended))


def test_the_first_failure_comes_first(tmp_path: Path) -> None:
    write(tmp_path, 0, "2026-11-28 10:00:00 rank 0 begins\n2026-11-28 10:00:09 rank 0 peer 3 is gone", 109.0)
    write(tmp_path, 1, "2026-11-28 10:00:01 rank 1 begins", 110.5, 143)
    write(tmp_path, 2, "2026-11-28 10:00:01 rank 2 begins", 110.5, 143)
    write(tmp_path, 3, f"2026-11-28 10:00:08 rank 3 step 7\n{TRACE}", 108.0)
    text = report(tmp_path)
    assert text.index("rank 3 on host1 ended first, with exit code 1 (failed)") < text.index("uncorrectable ECC")
    assert "+1.0 s: 1 ranks (0), exit code 1 (failed)" in text
    assert "+2.5 s: 2 ranks (1, 2), exit code 143 (signal 15)" in text
    lines = text[text.index("2026-11-28 10:00:00 rank 0: begins") :].splitlines()
    assert [line.split(" rank ")[1][0] for line in lines if line.startswith("2026")] == ["0", "1", "2", "3", "0"]
    at = lines.index("2026-11-28 10:00:08 rank 3: step 7")
    assert lines[at + 3] == "    RuntimeError: CUDA error: uncorrectable ECC"


def test_a_run_s_newest_attempt_is_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for job, attempt in (("0001", "5-0"), ("0002", "7-0"), ("0002", "7-1")):
        folder = tmp_path / "jobs" / job / "logs" / attempt
        folder.mkdir(parents=True)
        write(folder, 0, f"2026-11-28 10:00:00 rank 0 {attempt}", 1.0, 137)
        when = int(attempt[0]) * 10 + int(attempt[2])
        os.utime(folder, (when, when))
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "rank 0: 7-1" in out and "ran out of memory" in out and "5-0" not in out


def test_a_folder_without_logs_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "no job was launched there" in capsys.readouterr().err
    (tmp_path / "jobs" / "0001").mkdir(parents=True)
    assert main([str(tmp_path)]) == 2
    assert "has no logs yet" in capsys.readouterr().err
    assert issubclass(ConfigError, ValueError) and meaning(130) == "a person stopped it"


def test_logs_that_are_no_text_are_read(tmp_path: Path) -> None:
    (tmp_path / "train-0.log").write_bytes(b"2026-11-28 10:00:00 rank 0 \xff\xfe half a line")
    assert "no rank wrote down a bad end" in report(tmp_path)
