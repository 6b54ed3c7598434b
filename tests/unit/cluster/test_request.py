"""What is asked of a cluster: every committed settings file fits, and what does not fit is refused with its reason."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from internvl_megatron.cluster.request import (
    JobRequest,
    check,
    describe,
    layout_picture,
    requested_config,
    settings_of,
    time_seconds,
)
from internvl_megatron.config.models import INTERNVL3
from internvl_megatron.config.plan import plan
from internvl_megatron.config.recipe_settings import STAGES
from internvl_megatron.errors import ConfigError
from internvl_megatron.parallel.layout import Layout
from internvl_megatron.scaling.memory import rank_bytes

SETTINGS = Path(__file__).resolve().parents[3] / "launch" / "settings"
GIVEN = ["data.meta=m.json", "data.tokenizer=t", "checkpoint.load=w"]
NODE = 8
MOST_GPUS = {"1b": 128, "2b": 256, "8b": 256, "14b": 512}
"""Of a stage with 64 rows a step: heads cannot be divided over more context-parallel ranks. The other sizes go up to 1024."""


def tables(size: str) -> dict[str, dict[str, object]]:
    return tomllib.loads((SETTINGS / f"internvl3_{size}.toml").read_text())


def runs(size: str) -> list[tuple[str, int, bool]]:
    """(stage, GPUs, whether there is a layout) of everything that a file is for."""
    most = {stage: MOST_GPUS.get(size, 1024) if stage in ("mpo", "prm") else 1024 for stage in STAGES}
    return [(stage, int(n), int(n) <= most[stage]) for n in tables(size)["any"] for stage in STAGES]


SIZES = [size.lower() for size in INTERNVL3]


def test_there_is_a_file_for_every_size_up_to_1024_gpus() -> None:
    assert {path.stem for path in SETTINGS.glob("*.toml")} == {f"internvl3_{size}" for size in SIZES}
    fewest = {"38b": 16, "78b": 32}
    for size in SIZES:
        assert [int(n) for n in tables(size)["any"]] == [2**k for k in range(3, 11) if 2**k >= fewest.get(size, 8)]


@pytest.mark.parametrize("size", SIZES)
def test_every_settings_file_fits_the_nodes_and_their_memory(size: str) -> None:
    path = SETTINGS / f"internvl3_{size}.toml"
    for stage, num_ranks, has_layout in runs(size):
        recipe = f"internvl3_{size}_{stage}"
        config = requested_config(recipe, num_ranks, path, GIVEN)
        request = JobRequest(nodes=num_ranks // NODE, gpus_per_node=NODE)
        if not has_layout:
            with pytest.raises(ConfigError, match="rows_per_step=64 must be a multiple"):
                check(config, request)
            assert f"# No MPO or PRM on {num_ranks} GPUs: a step has 64 rows." in path.read_text(), recipe
            continue
        made, counts = check(config, request)
        assert made.layout.world_size == num_ranks, recipe
        assert NODE % made.layout.tensor_size == 0 and counts == [num_ranks // NODE]


@pytest.mark.parametrize("size", SIZES)
def test_the_memory_that_settings_files_name_is_what_is_estimated(size: str) -> None:
    path = SETTINGS / f"internvl3_{size}.toml"
    named = re.findall(r"^\[any\.(\d+)\] # ([^:]*): (.*)$", path.read_text(), re.MULTILINE)
    assert len(named) == len(tables(size)["any"])
    for num_ranks, layout, memory in named:
        expected = []
        for stage, n, has_layout in runs(size):
            if n == int(num_ranks) and has_layout:
                config = requested_config(f"internvl3_{size}_{stage}", n, path, GIVEN)
                made = plan(config, n)
                expected.append(f"{stage} {rank_bytes(config, made).total / 1e9:.0f} GB")
                assert stage != "sft" or str(made.layout) == layout
        assert memory == ", ".join(expected), num_ranks


def test_the_command_line_wins_over_the_file_and_the_file_over_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        "[any.16]\nparallel.tensor_size = 8\nparallel.sequence_parallel = true\nseed = 7\n[sft.16]\nseed = 8\n"
    )
    assert settings_of(path, "internvl3_8b_sft", 16)[-2:] == ["seed=7", "seed=8"]
    config = requested_config("internvl3_8b_sft", 16, path, ["seed=9"])
    assert (config.parallel.tensor_size, config.seed) == (8, 9)
    assert requested_config("internvl3_8b_pretrain", 16, path, []).seed == 7


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_may_have_tables(stage: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"[{stage}.128]\nseed = 8\n")
    assert requested_config(f"internvl3_8b_{stage}", 128, path, []).seed == 8


def test_fewer_nodes_keep_a_window_that_fits_them() -> None:
    config = requested_config("internvl3_78b_pretrain", 512, SETTINGS / "internvl3_78b.toml", GIVEN)
    _, counts = check(config, JobRequest(nodes=64, gpus_per_node=NODE, min_nodes=32))
    assert counts == [64, 32]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[any.8]\nseed = 1", "nothing for 16 GPUs, only for 8"),
        ("[gpus.16]\nseed = 1", "'gpus': expected tables"),
        ("seed = 1", "'seed': expected tables"),
        ("[any.many]\nseed = 1", "'any': expected tables"),
        ("[any.16]\nsead = 1", "did you mean 'seed'"),
        ("[any.16", "cannot be read as TOML"),
    ],
)
def test_a_wrong_settings_file_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        requested_config("internvl3_8b_sft", 16, path, [])


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({"gpus_per_node": 4, "nodes": 16}, [], "tensor_size=8 does not go into the 4 GPUs of a node"),
        ({"nodes": 5}, [], "does not divide the 40 ranks of this run"),
        ({"nodes": 0}, [], "--nodes 0: at least 1"),
        ({"min_nodes": 9}, [], "--min-nodes 9 is more than --nodes 8"),
        ({"memory_gb": 40.0}, [], r"estimated to need \d+ GB of 40 GB"),
        ({"time": "4 hours"}, [], "--time 4 hours: write it as"),
        ({"time": "5"}, [], "is over before the run is told to save"),
        ({"notice_seconds": 0}, [], "--notice-seconds 0"),
        ({"container": "image.sqsh"}, [], "write pyxis:IMAGE or apptainer:IMAGE"),
        ({"container_mounts": "/data:/data"}, [], "needs --container"),
        ({"sbatch_options": ("-C h100",)}, [], "--sbatch -C h100: write it as one long option"),
        ({"sbatch_options": ("--comment=a\nrm",)}, [], "write it as one long option"),
        ({}, ["data.meta="], "data.meta is not set"),
        ({}, ["rows_per_step=511"], "rows_per_step=511 must be a multiple of the 2 replicas"),
    ],
)
def test_what_would_fail_on_the_cluster_is_refused_here(
    changes: dict[str, Any], overrides: list[str], message: str
) -> None:
    request = replace(JobRequest(nodes=8, gpus_per_node=8), **changes)
    config = requested_config("internvl3_78b_sft", 64, None, [*GIVEN, *overrides])
    with pytest.raises(ConfigError, match=message):
        check(config, request)


def test_fewer_nodes_are_those_the_layout_fits() -> None:
    config = requested_config("internvl3_8b_sft", 64, None, GIVEN)
    _, counts = check(config, JobRequest(nodes=8, gpus_per_node=8, min_nodes=2))
    fitting = [n for n in range(8, 1, -1) if 512 % (n * 8 // 4) == 0]
    assert counts == fitting == [8, 4, 2]


def test_the_picture_says_where_stages_are() -> None:
    lines = layout_picture(Layout(tensor_size=8, pipeline_size=4, data_size=2), 8)
    assert [line.split() for line in lines[:4]] == [
        ["nodes", f"{2 * s}-{2 * s + 1}", "ranks", f"{16 * s}-{16 * s + 15}", "stage", str(s), "replicas", "0-1"]
        for s in range(4)
    ]
    small = layout_picture(Layout(tensor_size=2, pipeline_size=2, data_size=1), 4)
    assert small[0].split() == ["nodes", "0", "ranks", "0-3", "stage", "0-1", "replicas", "0"]


def test_the_description_has_layout_memory_and_budget() -> None:
    config = requested_config("internvl3_78b_sft", 64, None, GIVEN)
    request = JobRequest(nodes=8, gpus_per_node=8)
    made, counts = check(config, request)
    text = describe(config, made, request, counts)
    assert "134 B tokens" in text and "TP8 x PP4 x DP2" in text and "fullest rank" in text
    assert plan(config, 64).layout == made.layout


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("4:00:00", 14400),
        ("2-0", 172800),
        ("1-6:30", 109800),
        ("1-6:30:10", 109810),
        ("4h", None),
        ("", None),
    ],
)
def test_time_limits(text: str, seconds: int | None) -> None:
    assert time_seconds(text) == seconds
