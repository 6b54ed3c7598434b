"""Messages against arithmetic by hand."""

import pytest

from internvl_megatron.scaling.collective_time import LINK_SHARE, Group, Network
from internvl_megatron.scaling.gpus import GPUS

H100 = GPUS["h100-80g"]
NETWORK = Network(H100)


@pytest.mark.parametrize(
    ("group", "per_machine", "machines"),
    [
        (Group(8), 8, 1),  # tensor-parallel ranks
        (Group(16), 8, 2),
        (Group(2, stride=4), 2, 1),
        (Group(4, stride=4), 2, 2),
        (Group(16, stride=8), 1, 16),  # data-parallel ranks beside eight tensor-parallel ones
        (Group(4, stride=64), 1, 4),
    ],
)
def test_where_the_ranks_of_a_group_are(group: Group, per_machine: int, machines: int) -> None:
    assert (group.ranks_per_machine, group.num_machines) == (per_machine, machines)


def test_a_group_uses_the_cards_of_all_its_ranks_in_a_machine() -> None:
    one, four = NETWORK.bandwidth(Group(16, stride=8)), NETWORK.bandwidth(Group(16, stride=2))
    assert (one, four) == (LINK_SHARE * 50e9, LINK_SHARE * 200e9)
    assert NETWORK.bandwidth(Group(8)) == LINK_SHARE * 450e9


def test_gathers_grow_to_the_whole_with_the_group() -> None:
    """A ring passes on (n - 1) / n of the bytes."""
    size = 1e9
    two = NETWORK.all_gather(size, Group(2)) - NETWORK.latency(Group(2))
    eight = NETWORK.all_gather(size, Group(8)) - NETWORK.latency(Group(8))
    assert two == pytest.approx(size / 2 / (LINK_SHARE * 450e9))
    assert eight == pytest.approx(two * 7 / 4)
    assert NETWORK.all_gather(size, Group(1)) == 0


def test_all_to_all_waits_for_the_network() -> None:
    """Of 16 ranks on two machines half of what a rank sends leaves through its own card."""
    seconds = NETWORK.all_to_all(1e9, Group(16)) - NETWORK.latency(Group(16))
    assert seconds == pytest.approx(0.5e9 / (LINK_SHARE * 50e9))


def test_a_message_to_the_next_stage_leaves_the_machine() -> None:
    assert NETWORK.message(1e8, stride=4) < NETWORK.message(1e8, stride=8) / 5
