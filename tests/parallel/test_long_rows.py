"""Rows of 32768 tokens and positions beyond, split over TP2 x CP2 (heads or ring), equal one rank."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from internvl_megatron.config.schema import DataConfig
from internvl_megatron.ranks import RankInfo
from tests.support.layouts import LAYOUTS, SGD, Ranks, run_config
from tests.support.models import small_model
from tests.support.rows import MemoryRows, random_step

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

TOKENS = 32768
FULL_ROWS = (1, 3)
"""Seeds of rows with long samples: a tile across the middle of the row, and one that fills it."""

FIRST_POSITION = 40000
"""Positions go on from here: V2PE past the length that the language model was trained with."""


def _train(info: RankInfo, ranks: Ranks) -> list[tuple[float, float]]:
    import torch

    from internvl_megatron.device import open_device
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.ranks import joined
    from tests.support.training import make_step

    torch.set_num_threads(1)
    device = open_device("cpu")
    model = small_model(num_layers=2)
    config = run_config(
        model,
        parallel=ranks.config(vision_chunk_tiles=64),
        data=DataConfig(tokens_per_row=TOKENS, tiles_per_row=4096, sample_multiple_tokens=4),
        optimizer=replace(SGD, learning_rate=0.05),
        rows_per_step=1,
    )
    with joined(info, device, 600):
        groups = make_groups(ranks.layout, device, 600, ranks.vision_layout)
        step, _ = make_step(config, None, groups, device)
        place = ranks.layout.replica_ranks(0).index(info.rank)
        history = []
        for number, seed in enumerate(FULL_ROWS):
            data = random_step(model, 1, seed, TOKENS, "mixed", 0.5, config.data.sample_multiple_tokens)
            row = data.rows[0]
            data = replace(data, rows=[replace(row, positions=row.positions + FIRST_POSITION * 256)])
            rows: Any = MemoryRows(data, range(1), place, ranks.num_ranks, frozenset())
            result = step.run(rows, number)
            history.append((result.loss, result.grad_norm))
        return history


def test_long_packed_rows(run_ranks: Callable[..., list[Any]]) -> None:
    one = run_ranks(_train, 1, LAYOUTS["1"])[0]
    for layout in ("TP2+SPxCP2", "TP2+SPxCP2 ring"):
        four = run_ranks(_train, 4, LAYOUTS[layout])[0]
        np.testing.assert_allclose([loss for loss, _ in four], [loss for loss, _ in one], rtol=1e-5, err_msg=layout)
        np.testing.assert_allclose([norm for _, norm in four], [norm for _, norm in one], rtol=1e-4, err_msg=layout)
