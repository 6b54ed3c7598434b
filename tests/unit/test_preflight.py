"""Which nodes are left out, and why; and that a node's own report and the bandwidth measurement are real."""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from internvl_megatron.errors import DataError
from internvl_megatron.ranks import RankInfo
from tools.preflight import judged, main, measure, node_report

GOOD = {"problems": [], "gpu": ["H100, 81559"], "versions": {"torch": "2.14"}, "free_bytes": 10**12}
NO_EXPECTATION: dict[str, float | None] = {"inside": None, "between": None}


def reports(folder: Path, changes: dict[str, dict[str, Any] | None]) -> list[str]:
    names = ["a1", "a2", "a3", "a4"]
    for name in names:
        change = changes.get(name, {})
        if change is not None:
            (folder / f"{name}.json").write_text(json.dumps(GOOD | {"time": time.time()} | change))
    return names


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (None, "did not report"),
        ({"problems": ["7 GPUs, 8 expected"]}, "7 GPUs, 8 expected"),
        ({"gpu": ["A100, 40960"]}, 'gpu ["A100, 40960"], unlike most nodes'),
        ({"versions": {"torch": "2.13"}}, 'versions {"torch": "2.13"}, unlike'),
        ({"time": 0.0}, "its clock is off by about"),
    ],
)
def test_a_bad_node_is_named(change: dict[str, Any] | None, reason: str, tmp_path: Path) -> None:
    names = reports(tmp_path, {"a3": change})
    bad = judged(tmp_path, names, time.time(), NO_EXPECTATION)
    assert list(bad) == ["a3"] and reason in bad["a3"][0]


def test_good_nodes_are_good(tmp_path: Path) -> None:
    assert judged(tmp_path, reports(tmp_path, {}), time.time(), NO_EXPECTATION) == {}


def test_a_slow_network_is_named(tmp_path: Path) -> None:
    names = reports(tmp_path, {})
    for name, between in zip(names, (40.0, 41.0, 12.0, 39.0), strict=True):
        (tmp_path / f"{name}.bandwidth.json").write_text(json.dumps({"inside": 350.0, "between": between}))
    bad = judged(tmp_path, names, None, NO_EXPECTATION)
    assert bad == {"a3": ["all-reduce between 12.0 GB/s, the median is 39.5"]}
    bad = judged(tmp_path, names, None, {"inside": 360.0, "between": None})
    assert all("350.0 GB/s, 360 expected" in bad[name][0] for name in names)


def test_a_folder_nobody_reported_to_is_no_node_s_fault(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no node has reported"):
        judged(tmp_path, ["a1"], None, NO_EXPECTATION)


def test_this_node_reports_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    report = node_report(run, None)
    assert report["versions"]["torch"] != "absent" and report["free_bytes"] > 0 and not list(run.iterdir())
    (tmp_path / "file").touch()
    assert "cannot be written" in node_report(tmp_path / "file" / "run", None)["problems"][0]
    assert main(["judge", str(tmp_path), "--hosts", "a1"]) == 2
    assert "no node has reported" in capsys.readouterr().err


def measure_as_two_nodes(info: RankInfo, folder: Path) -> None:
    os.environ["SLURMD_NODENAME"] = f"n{info.rank // 2}"
    measure(dataclasses.replace(info, local_rank=info.rank % 2, local_world_size=2), folder, 2**20)


@pytest.mark.parallel
def test_bandwidth_is_measured_inside_and_between_nodes(run_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    run_ranks(measure_as_two_nodes, 4, tmp_path)
    for name in ("n0", "n1"):
        found = json.loads((tmp_path / f"{name}.bandwidth.json").read_text())
        assert found["inside"] > 0 and found["between"] > 0
