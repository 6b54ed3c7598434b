"""The cost of a row is what the language model computes for it."""

from dataclasses import replace

import numpy as np
import pytest

from internvl_megatron.config.models import INTERNVL3
from internvl_megatron.data.row_cost import RowCost
from internvl_megatron.scaling.counts import forward_flops, language_flops
from tests.support.models import small_model
from tests.support.rows import random_step

COST = RowCost(per_token=1000, per_target=100, per_attention_pair=1, cut_multiple=None)


@pytest.fixture
def rows():
    """Rows of all kinds, one of them without padding."""
    return random_step(small_model(), num_rows=4, seed=0).rows


def test_tokens_targets_and_pairs_are_counted(rows):
    for row in rows:
        lengths = row.segment_lengths[: row.num_samples].tolist()
        rest = sum(length**2 for length in lengths) + 100 * int((row.weights > 0).sum())
        assert COST.of(row) == 64 * 1000 + rest
        for multiple in (1, 4, 16):
            computed = -(-sum(lengths) // multiple) * multiple
            cost = replace(COST, cut_multiple=multiple).of(row)
            assert cost == computed * 1000 + rest
            assert cost == COST.of(row.cut(multiple)), "what is cut off costs nothing"


def test_the_same_tokens_in_one_sample_cost_more(rows):
    packed = next(row for row in rows if row.num_tokens == 64)
    joined = replace(packed, segment_lengths=np.array([64], np.int32), sources=packed.sources[:1])
    assert COST.of(joined) > COST.of(packed)


def test_long_samples_do_not_overflow(rows):
    """Arrays of a row are int32; the square of 65536 is not."""
    row = replace(rows[0], segment_lengths=np.array([2**20], np.int32), sources=rows[0].sources[:1])
    assert COST.of(row) >= 2**40


@pytest.mark.parametrize("size", ["1B", "78B"])
def test_a_full_row_of_targets_costs_the_forward_pass(rows, size):
    model = INTERNVL3[size]
    flops = language_flops(model.language)
    cost = RowCost(
        per_token=flops.per_token,
        per_target=flops.per_prediction,
        per_attention_pair=flops.per_attention_pair,
        cut_multiple=None,
    )
    row = next(row for row in rows if row.num_tokens == 64)
    row = replace(row, weights=np.ones(64, np.float32))
    pairs = int((row.segment_lengths.astype(np.int64) ** 2).sum())
    assert cost.of(row) == forward_flops(model, 64, 0, pairs).language
