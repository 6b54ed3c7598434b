"""Rows by window: the same order of cost in all streams, nothing lost, and positions that can be saved at any time."""

import json

import numpy as np
import pytest

from internvl_megatron.config.schema import DataConfig
from internvl_megatron.data.best_fit import BestFitPacker
from internvl_megatron.data.first_fit import FirstFitPacker
from internvl_megatron.data.row_packer import RowPacker, make_packer
from internvl_megatron.data.seeds import Purpose, generator

ORDERS = [[2, 0, 3, 1], [0, 3, 2, 1], [3, 1, 0, 2]]


def rows_of_one(window_rows, order):
    """A row packer whose rows are the items themselves: each fills a row's tiles."""
    return RowPacker(FirstFitPacker(100, 1, 0), window_rows, order, lambda item: 10 if isinstance(item, str) else item)


def test_rows_of_a_window_go_out_in_the_order_of_their_cost():
    packer = rows_of_one(4, lambda window: ORDERS[window])
    costs = [5, 90, 20, 40, 8, 7, 6, 5, 1, 2, 3, 4]
    for cost in costs[:3]:
        packer.add(cost, cost, 1)
        assert packer.take() is None, "a window goes out when it is whole"
    for cost in costs[3:]:
        packer.add(cost, cost, 1)
    taken = [pack.items[0] for pack in iter(packer.take, None)]
    by_cost = [sorted(costs[start : start + 4]) for start in (0, 4, 8)]
    assert taken == [window[place] for window, order in zip(by_cost, ORDERS, strict=True) for place in order]


def test_a_window_of_one_row_changes_nothing():
    packer, plain = rows_of_one(1, lambda window: [0]), FirstFitPacker(100, 1, 0)
    for cost in (5, 90, 20):
        packer.add(cost, cost, 1)
        (expected,) = plain.add(cost, cost, 1)
        pack = packer.take()
        assert pack is not None and pack.items == expected.items
        assert packer.take() is None


def test_rows_of_equal_cost_keep_their_order():
    packer = rows_of_one(4, lambda window: [0, 1, 2, 3])
    for name in "abcd":
        packer.add(name, 10, 1)
    assert [pack.items[0] for pack in iter(packer.take, None)] == list("abcd")


ALGORITHMS = ("first_fit", "best_fit")


def new(algorithm, window_rows=3):
    data = DataConfig(
        tokens_per_row=64, tiles_per_row=6, packing=algorithm, packing_pool_samples=9, packing_buffer_rows=3
    )
    return RowPacker(
        make_packer(data),
        window_rows,
        lambda n: generator(0, Purpose.WINDOW, n).permutation(window_rows).tolist(),
        lambda item: item[1] ** 2,
    )


def advance(packer, item):
    packer.add(item, *item[1:])
    return [pack.items for pack in iter(packer.take, None)]


def test_the_name_chooses_the_algorithm():
    assert isinstance(make_packer(DataConfig()), BestFitPacker), "the default"
    assert isinstance(make_packer(DataConfig(packing="first_fit")), FirstFitPacker)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_position_saved_at_any_step_goes_on_alike(algorithm):
    """Saved before each `take` as JSON of names alone; sizes are found again, as samples are rendered again."""
    rng = np.random.default_rng(3)
    items = [(name, int(rng.integers(1, 40)), int(rng.integers(0, 4))) for name in range(120)]
    packer, added, taken, saved = new(algorithm), 0, [], []
    while added < len(items):
        state = json.dumps(packer.state_dict(lambda item: item[0]))
        saved.append((state, added, len(taken)))
        if (pack := packer.take()) is not None:
            taken.append(pack.items)
        else:
            packer.add(items[added], *items[added][1:])
            added += 1
    assert len(taken) > 15
    states = [json.loads(state) for state, _, _ in saved]
    assert {len(state["ready"]) for state in states} == {0, 1, 2}
    assert {len(state["finished"]) for state in states} == {0, 1, 2, 3}
    for state, (_, position, num_taken) in zip(states, saved, strict=True):
        restored, rest, at = new(algorithm), [], position
        restored.add((0, 1, 0), 1, 0)
        restored.load_state_dict(state, lambda name: (items[name], *items[name][1:]))
        assert restored.state_dict(lambda item: item[0]) == state
        while at < len(items):
            if (pack := restored.take()) is not None:
                rest.append(pack.items)
            else:
                restored.add(items[at], *items[at][1:])
                at += 1
        assert rest == taken[num_taken:]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_item_is_lost_or_doubled(algorithm):
    rng = np.random.default_rng(4)
    items = [(name, int(rng.integers(1, 40)), int(rng.integers(0, 4))) for name in range(200)]
    packer = new(algorithm)
    out = [item for item in items for pack in advance(packer, item) for item in pack]
    state = packer.state_dict(lambda item: item)
    out += [item for part in ("open", "finished", "ready") for group in state[part] for item in group]
    assert sorted(out) == items
