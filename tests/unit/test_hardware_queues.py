"""CUDA_DEVICE_MAX_CONNECTIONS: what each kind of run wants, and that every way to start one gets it."""

import subprocess
from pathlib import Path

import pytest

from internvl_megatron import device
from internvl_megatron.config.overrides import apply_overrides
from internvl_megatron.config.recipes import find_recipe
from internvl_megatron.device import HARDWARE_QUEUES, Device, choose_hardware_queues, wanted_hardware_queues

ENVIRONMENT = Path(__file__).resolve().parents[2] / "launch" / "env.sh"
WANTED = {"1b": None, "8b": "1", "38b": None, "78b": None}
"""By recipe: one rank a replica; tensor parallel; tensor parallel with a sharded encoder."""


@pytest.mark.parametrize("size", WANTED)
@pytest.mark.parametrize("is_on_gpu", [True, False])
def test_a_run_sets_what_it_wants(size: str, is_on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "uses_gpu", lambda preference: is_on_gpu)
    environment: dict[str, str] = {}
    monkeypatch.setattr(device.os, "environ", environment)
    config = find_recipe(f"internvl3_{size}_sft")
    assert wanted_hardware_queues(config.parallel) == WANTED[size]
    choose_hardware_queues(config)
    assert environment.get(HARDWARE_QUEUES) == (WANTED[size] if is_on_gpu else None)
    environment[HARDWARE_QUEUES] = "32"
    choose_hardware_queues(config)
    assert environment[HARDWARE_QUEUES] == "32", "a site's own value stays"


def test_context_parallel_runs_want_one_queue() -> None:
    config = apply_overrides(find_recipe("internvl3_1b_sft"), ["parallel.context_size=2"])
    assert wanted_hardware_queues(config.parallel) == "1"


@pytest.mark.parametrize(
    ("size", "found", "line"),
    [
        ("8b", "1", "CUDA_DEVICE_MAX_CONNECTIONS is 1"),
        ("8b", None, "CUDA_DEVICE_MAX_CONNECTIONS is unset; this run wants it 1"),
        ("78b", "1", "CUDA_DEVICE_MAX_CONNECTIONS is 1; this run wants it unset"),
        ("78b", None, "CUDA_DEVICE_MAX_CONNECTIONS is unset"),
    ],
)
def test_the_log_says_what_is_and_what_is_wanted(
    size: str, found: str | None, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device.os, "environ", {} if found is None else {HARDWARE_QUEUES: found})
    parallel = find_recipe(f"internvl3_{size}_sft").parallel
    assert Device(kind="cuda", index=0, attention="sdpa").hardware_queues(parallel) == line
    assert Device(kind="cpu", index=0, attention="sdpa").hardware_queues(parallel) is None


@pytest.mark.parametrize("given", [None, "4"])
def test_the_environment_of_launches_leaves_it_to_the_run(given: str | None) -> None:
    script = f'source {ENVIRONMENT} && echo "${{{HARDWARE_QUEUES}-unset}}"'
    environment = {} if given is None else {HARDWARE_QUEUES: given}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (given or "unset")
