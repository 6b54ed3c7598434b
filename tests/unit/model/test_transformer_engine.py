"""Transformer Engine's modules in place of torch's, without a GPU: all but its kernels is the installed package's own.

`tests.support.transformer_engine` says how. Skipped where the package is not installed; on a GPU, see `tests/gpu`.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
FAMILIES = ("300m", "6b")
LINEAR = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process of its own saw: it changes torch, and Transformer Engine, for good."""
    file = tmp_path_factory.mktemp("transformer_engine") / "seen.json"
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.transformer_engine", str(file)]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return json.loads(file.read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_names_shapes_and_fresh_values_are_those_of_torchs_layers(seen: dict[str, Any], family: str) -> None:
    assert seen[f"one rank {family}"]["fresh values"] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_torchs_layers(seen: dict[str, Any], family: str) -> None:
    """Norms are of the same kind and eps, biases are added once, LayerScale and residuals are where they were."""
    found = seen[f"one rank {family}"]
    assert found["logits and gradients"] == []
    assert found["calls of transformer_engine"] == 4 * (2 + 4), "four linear layers in each of 2 + 4 layers"
    assert found["calls of torch"] == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["transformer_engine to torch", "torch to transformer_engine"])
def test_a_checkpoint_of_one_kind_loads_into_the_other(seen: dict[str, Any], family: str, way: str) -> None:
    assert seen[f"one rank {family}"][way] == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [0, 1])
def test_parts_of_a_tensor_parallel_rank_are_the_same(seen: dict[str, Any], family: str, rank: int) -> None:
    """Values, marks (split, summed under sequence parallelism, padded heads) and what goes into a checkpoint."""
    assert seen[f"rank {rank} of two {family}"] == []


@pytest.mark.parametrize("wanted", [True, False])
def test_layers_add_to_the_gradient_buffer_where_there_is_one(seen: dict[str, Any], wanted: bool) -> None:
    assert seen["one rank 300m"][f"gradient accumulation {wanted}"] == [wanted]


def test_every_part_has_its_own_fp8_recipe(seen: dict[str, Any]) -> None:
    """The first layer of the language model is left out."""
    vision = [[f"vision.encoder.layers.{n}.{name}", "Float8BlockScaling"] for n in range(2) for name in LINEAR]
    projector = [[f"vision.projector.linear_{n}", "MXFP8BlockScaling"] for n in (1, 2)]
    language = [
        [f"language.decoder.layers.{n}.{name}", "Float8CurrentScaling" if n else None]
        for n in range(4)
        for name in LINEAR
    ]
    assert seen["fp8"] == vision + projector + language


def test_a_layer_that_runs_again_for_backward_does_so_in_fp8(seen: dict[str, Any]) -> None:
    once, again = seen["fp8"], seen["fp8, layers again"]
    assert again[: len(once)] == once
    assert sorted(again[len(once) :]) == sorted(call for call in once if call[0].startswith("vision.encoder"))


def test_delayed_scaling_is_around_all_layers(seen: dict[str, Any]) -> None:
    recipes = {(name.split(".")[0], recipe) for name, recipe in seen["fp8 delayed"]}
    assert recipes == {("vision", None), ("language", "TEDelayedScaling")}


def test_packed_attention_equals_one_call_per_segment(seen: dict[str, Any]) -> None:
    assert seen["attention"]["difference"] < 0.01


def test_a_ring_is_told_of_the_whole_row_and_has_tokens_in_transformer_engines_order(seen: dict[str, Any]) -> None:
    theirs, ours = seen["attention"]["order"]
    assert theirs == ours
    ends = [0, 8, 12, 32]
    assert seen["attention"]["ring"] == {
        "is the ring": True,
        "kind": "p2p",
        "ranks": [0, 1],
        "ends": ends,
        "padded": [ends, ends],
        "longest": [20, 20],
    }
