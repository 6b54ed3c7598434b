"""The rank grid, alone and against Megatron Core's groups."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from internvl_megatron.parallel.layout import Layout, VisionLayout
from internvl_megatron.ranks import RankInfo
from tests.support.layouts import LAYOUTS, Ranks

FOUR_RANKS = ["TP2xPP2", "TP2xDP2", "PP2xDP2", "TP2xCP2", "CP2xPP2", "CP2xDP2"]


@pytest.mark.parametrize(
    "layout",
    [Layout(1, 1, 1), Layout(2, 3, 4), Layout(4, 2, 2), Layout(1, 4, 2), Layout(2, 2, 3, 4), Layout(1, 1, 2, 2)],
)
def test_coordinates_and_ranks_are_inverse(layout: Layout) -> None:
    for rank in range(layout.world_size):
        place = layout.tensor_index(rank), layout.replica(rank), layout.stage(rank), layout.context_index(rank)
        assert layout.rank(*place) == rank
    replicas = [layout.replica_ranks(replica) for replica in range(layout.data_size)]
    assert sorted(rank for replica in replicas for rank in replica) == list(range(layout.world_size))
    assert all(replica == sorted(replica) and layout.stage(replica[0]) == 0 for replica in replicas)


def test_a_row_of_several_samples_over_a_ring() -> None:
    layout = Layout(1, 1, 1, context_size=4, ring_size=2)
    lengths = np.array([8, 4, 4])  # the last one padding
    parts = [layout.row_part(rank, lengths) for rank in range(4)]
    # Chunks 0 and 3 of every sample, then 1 and 2; of each, the first half of the tokens and the second.
    assert [part.tolist() for part in parts if isinstance(part, np.ndarray)] == [
        [0, 1, 6, 7],
        [8, 11, 12, 15],
        [2, 3, 4, 5],
        [9, 10, 13, 14],
    ]
    order = layout.ring_order(lengths)
    end_to_end = np.concatenate([np.asarray(part) for part in parts])
    np.testing.assert_array_equal(end_to_end[order], np.arange(16))
    assert layout.sharing_heads() == [[0, 1], [2, 3]]
    assert layout.rings() == [[0, 2], [1, 3]]
    assert str(layout) == "TP1 x CP4 (ring 2) x PP1 x DP1"


@pytest.mark.parametrize("layout", [Layout(2, 1, 1), Layout(1, 2, 1, context_size=4)])
def test_without_a_ring_a_part_is_a_run(layout: Layout) -> None:
    size = 16 // layout.context_size
    for rank in range(layout.world_size):
        index = layout.context_index(rank)
        assert layout.row_part(rank, np.array([5, 11])) == slice(size * index, size * (index + 1))


VISION_LAYOUTS = [
    VisionLayout(Layout(2, 2, 4), exchange_replicas=4),
    VisionLayout(Layout(2, 2, 4, 2), tensor_size=4, exchange_replicas=2),
    VisionLayout(Layout(4, 2, 2), tensor_size=2, exchange_replicas=1, first_stage_only=True),
]


@pytest.mark.parametrize("layout", VISION_LAYOUTS)
def test_units_and_exchange_groups_cover_the_ranks(layout: VisionLayout) -> None:
    members = [layout.members(group) for group in range(layout.num_groups)]
    assert sorted([rank for part in members for rank in part]) == list(range(layout.language.world_size))
    assert all(layout.group_of(rank) == group for group, ranks in enumerate(members) for rank in ranks)
    for number, unit in enumerate(layout.units):
        assert len(unit) == layout.tensor_size
        assert all(layout.unit_of_rank[rank] == number for rank in unit)
        assert {layout.group_of(rank) for rank in unit} == {number // layout.units_per_group}
    encoding = sorted(rank for unit in layout.units for rank in unit)
    wanted = [
        rank
        for rank in range(layout.language.world_size)
        if layout.language.stage(rank) == 0 or not layout.first_stage_only
    ]
    assert encoding == wanted
    assert all(unit in layout.holders for unit in layout.units), "those that encode together hold the encoder together"
    assert sorted(rank for holders in layout.holders for rank in holders) == list(range(layout.language.world_size))
    assert {len(holders) for holders in layout.holders} == {layout.tensor_size}
    for group in range(layout.num_groups):
        assert sorted(rank for part in layout.parts(group, whole=False) for rank in part) == members[group]


def groups_of_rank(info: RankInfo, ranks: Ranks) -> dict[str, list[int]]:
    """Global ranks of every group of this rank, as Megatron Core and torch say."""
    from megatron.core import parallel_state

    from internvl_megatron.device import open_device
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.ranks import joined

    device = open_device("cpu")
    with joined(info, device, 60):
        groups = make_groups(ranks.layout, device, 60, ranks.vision_layout)
        found = {
            "tensor": parallel_state.get_tensor_model_parallel_group(),
            "pipeline": parallel_state.get_pipeline_model_parallel_group(),
            "data": parallel_state.get_data_parallel_group(),
            "context": parallel_state.get_context_parallel_group(),
            "language tensor": groups.language.tp,
            "language pipeline": groups.language.pp,
            "language context": groups.language.cp,
            "language data": groups.language.dp_cp,
            "vision tensor": groups.vision.tp,
            "vision pipeline": groups.vision.pp,
            "vision data": groups.vision.dp_cp,
            "host replica": groups.host_replica,
            "host data": groups.host_data,
            "host copies": groups.host_copies,
            "tiles": groups.tiles.group,
            "embeddings": groups.embeddings.group,
            "gradients": groups.gradients.group,
        }
        exchange = [
            groups.tiles.group,
            groups.embeddings.group,
            groups.gradients.group,
            groups.vision.dp_cp,
            dist.group.WORLD,
        ]
        assert len({id(group) for group in exchange}) == len(exchange), "each kind of message has a group of its own"
        return {name: dist.get_process_group_ranks(group) for name, group in found.items()}


@pytest.mark.parallel
@pytest.mark.parametrize("name", FOUR_RANKS)
def test_groups_are_those_of_megatron_core(run_ranks: Callable[..., list[Any]], name: str) -> None:
    ranks = LAYOUTS[name]
    layout = ranks.layout
    everyone = list(range(4))
    for rank, found in enumerate(run_ranks(groups_of_rank, 4, ranks)):
        tensor, replica, stage = layout.tensor_index(rank), layout.replica(rank), layout.stage(rank)
        context = layout.context_index(rank)
        of_tensor = [layout.rank(index, replica, stage, context) for index in range(layout.tensor_size)]
        of_pipeline = [layout.rank(tensor, replica, index, context) for index in range(layout.pipeline_size)]
        of_data = [layout.rank(tensor, index, stage, context) for index in range(layout.data_size)]
        of_context = [layout.rank(tensor, replica, stage, index) for index in range(layout.context_size)]
        copies = sorted(
            layout.rank(tensor, index, stage, part)
            for index in range(layout.data_size)
            for part in range(layout.context_size)
        )
        assert found == {
            "tensor": of_tensor,
            "pipeline": of_pipeline,
            "data": of_data,
            "context": of_context,
            "language tensor": of_tensor,
            "language pipeline": of_pipeline,
            "language context": of_context,
            "language data": copies,
            "vision tensor": [rank],
            "vision pipeline": [rank],
            "vision data": everyone,
            "host replica": layout.replica_ranks(replica),
            "host data": of_data,
            "host copies": copies,
            "tiles": everyone,
            "embeddings": everyone,
            "gradients": everyone,
        }


@pytest.mark.parallel
@pytest.mark.parametrize(
    ("ranks", "tensor", "data"),
    [
        (Ranks(4, vision_tensor_size=2), [[0, 1], [2, 3]], [[0, 2], [1, 3]]),
        (Ranks(4, tensor_size=2, vision_tensor_size=4), [[0, 1, 2, 3]], [[0], [1], [2], [3]]),
        # Units of two replicas that each keep their tiles: a replica's ranks are no neighbours.
        (
            Ranks(4, pipeline_size=2, vision_tensor_size=2, vision_exchange_replicas=1),
            [[0, 2], [1, 3]],
            [[0, 1], [2, 3]],
        ),
        (
            Ranks(4, tensor_size=2, pipeline_size=2, vision_placement="first_stage", vision_tensor_size=2),
            [[0, 1], [2, 3]],
            [[0, 2], [1, 3]],
        ),
    ],
)
def test_units_of_the_vision_side(
    run_ranks: Callable[..., list[Any]], ranks: Ranks, tensor: list[list[int]], data: list[list[int]]
) -> None:
    for rank, found in enumerate(run_ranks(groups_of_rank, 4, ranks)):
        assert found["vision tensor"] == next(part for part in tensor if rank in part)
        assert found["vision data"] == next(part for part in data if rank in part)
        assert found["vision pipeline"] == [rank]
