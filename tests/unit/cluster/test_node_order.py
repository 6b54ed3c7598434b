"""Which node gets which ranks: stages of a replica, or replicas of a stage, on as few switches as can be."""

from internvl_megatron.cluster.node_order import Near, node_order
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
