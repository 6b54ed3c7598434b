"""Which node gets which ranks: stages of a replica, or replicas of a stage, on as few switches as can be."""

from pathlib import Path

import pytest

from internvl_megatron.cluster.node_order import Near, main, node_order
from internvl_megatron.config.overrides import apply_overrides, to_json
from internvl_megatron.config.recipes import demo_digits
from internvl_megatron.parallel.layout import Layout

NODES = {f"n{number}": f"core.leaf{number // 4}.n{number}" for number in (9, 3, 11, 0, 5, 7, 1, 2, 10, 4, 8, 6)}
LAYOUT = Layout(tensor_size=8, pipeline_size=4, data_size=3)


def leaves(order: list[str], near: Near) -> dict[int, set[str]]:
    """Leaf switches that the nodes of each replica (or stage) are on."""
    found: dict[int, set[str]] = {}
    for position, name in enumerate(order):
        of = LAYOUT.replica(8 * position) if near == "pipeline" else LAYOUT.stage(8 * position)
        found.setdefault(of, set()).add(NODES[name].split(".")[1])
    return found


def test_the_stages_of_a_replica_are_on_one_switch() -> None:
    order = node_order(NODES, LAYOUT, 8, "pipeline")
    assert sorted(order) == sorted(NODES)
    assert all(len(switches) == 1 for switches in leaves(order, "pipeline").values())


def test_the_replicas_of_a_stage_are_neighbours() -> None:
    order = node_order(NODES, LAYOUT, 8, "data")
    assert order == [f"n{number}" for number in range(12)]
    assert [len(switches) for switches in leaves(order, "data").values()] == [1, 2, 2, 1]
    assert any(len(switches) > 1 for switches in leaves(order, "pipeline").values())


def test_a_node_with_several_replicas_or_stages_is_one_place() -> None:
    small = Layout(tensor_size=2, pipeline_size=2, data_size=4)
    assert node_order({"b": "b", "a": "a"}, small, 8, "pipeline") == ["a", "b"]
    assert node_order({"b": "b", "a": "a", "d": "d", "c": "c"}, small, 4, "pipeline") == ["a", "c", "b", "d"]


@pytest.fixture
def addresses(tmp_path: Path) -> str:
    """Four nodes on two switches."""
    path = tmp_path / "addresses"
    path.write_text("d leaf1.d\na leaf0.a\nc leaf1.c\nb leaf0.b\n")
    return str(path)


def test_a_job_by_hand_names_a_recipe_and_settings(
    addresses: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `train.sbatch RECIPE section.field=value ...` does; a launched job has a config.json."""
    settings = ["parallel.pipeline_size=4", "parallel.tensor_size=1", "data.eval_meta=null", "eval_every_steps=null"]
    path = tmp_path / "config.json"
    path.write_text(to_json(apply_overrides(demo_digits(), settings)))
    for recipe, given in (("demo_digits", settings), (str(path), [])):
        assert main([recipe, addresses, "pipeline", "2", *given]) == 0
        assert capsys.readouterr().out.split() == ["a", "b", "c", "d"]
    # Stages of two replicas on four nodes: nodes 0 and 2 hold replica 0's.
    two = ["parallel.pipeline_size=2", "parallel.tensor_size=2", "data.eval_meta=null", "eval_every_steps=null"]
    assert main(["demo_digits", addresses, "pipeline", "2", *two]) == 0
    assert capsys.readouterr().out.split() == ["a", "c", "b", "d"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo_digit", "ADDRESSES", "data", "2"], "did you mean 'demo_digits'"),
        (["no.json", "ADDRESSES", "data", "2"], "no such file"),
        (["demo_digits", "ADDRESSES", "data", "2", "parallel.tensor_size=3"], "must divide"),
        (["demo_digits", "ADDRESSES", "near", "2"], "NODE_ORDER=near"),
    ],
)
def test_what_cannot_be_ordered_is_said(
    addresses: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([addresses if argument == "ADDRESSES" else argument for argument in arguments]) == 2
    assert message in capsys.readouterr().err
