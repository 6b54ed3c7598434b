"""Copies of a parameter that differ between ranks are found before training starts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from internvl_megatron.device import open_device
from internvl_megatron.launcher import RankFailedError
from internvl_megatron.model.build import build_model, check_copies_agree
from internvl_megatron.model.vision_shards import local_shard
from internvl_megatron.parallel.groups import make_groups
from internvl_megatron.ranks import RankInfo, joined
from tests.support.layouts import LAYOUTS, Ranks, run_config
from tests.support.models import small_model

pytestmark = pytest.mark.parallel

UNITS = replace(LAYOUTS["TP2xPP2"], vision_tensor_size=2)
"""Ranks 0 and 2, and 1 and 3, hold the same part of the vision encoder."""


def _check(info: RankInfo, ranks: Ranks, spoiled: str | None, **parallel: Any) -> None:
    torch.set_num_threads(1)
    device = open_device("cpu")
    with joined(info, device, 60):
        groups = make_groups(ranks.layout, device, 60, ranks.vision_layout)
        model = build_model(run_config(small_model(), parallel=ranks.config(**parallel)), groups, device)
        if info.rank == info.world_size - 1 and spoiled is not None:
            with torch.no_grad():
                local_shard(dict(model.named_parameters())[spoiled]).view(-1)[0] += 1.0
        check_copies_agree(model, groups)


@pytest.mark.parametrize("layout", ["TP2xDP2", "TP2xPP2"])
def test_fresh_models_agree_under_every_layout(run_ranks: Callable[..., list[Any]], layout: str) -> None:
    run_ranks(_check, 4, LAYOUTS[layout], None)


@pytest.mark.parametrize(
    ("layout", "spoiled"),
    [("TP2xPP2", "vision.projector.linear_2.bias"), ("TP2xDP2", "language.decoder.layers.2.mlp.linear_fc1.weight")],
)
def test_a_copy_that_differs_is_named(run_ranks: Callable[..., list[Any]], layout: str, spoiled: str) -> None:
    with pytest.raises(RankFailedError, match=spoiled):
        run_ranks(_check, 4, LAYOUTS[layout], spoiled)


def _check_shards(info: RankInfo, ranks: Ranks, spoiled: str | None, shard_ranks: int | None) -> None:
    _check(info, ranks, spoiled, vision_sharding="sharded", vision_shard_ranks=shard_ranks)


def test_shards_are_compared_with_their_copies_only(run_ranks: Callable[..., list[Any]]) -> None:
    spoiled = "vision.projector.linear_2.bias"
    run_ranks(_check_shards, 4, LAYOUTS["TP2xPP2"], spoiled, None)  # every rank has rows of its own
    with pytest.raises(RankFailedError, match=spoiled):
        run_ranks(_check_shards, 4, LAYOUTS["TP2xPP2"], spoiled, 2)
    run_ranks(_check_shards, 4, LAYOUTS["TP2xPP2"], None, 2)


def test_tensor_parallel_parts_of_the_encoder_are_no_copies(run_ranks: Callable[..., list[Any]]) -> None:
    run_ranks(_check, 4, UNITS, None)


@pytest.mark.parametrize("spoiled", ["self_attention.linear_qkv.weight", "ls1"])
def test_copies_of_a_part_are_compared(run_ranks: Callable[..., list[Any]], spoiled: str) -> None:
    name = f"vision.encoder.layers.1.{spoiled}"
    with pytest.raises(RankFailedError, match=name):
        run_ranks(_check, 4, UNITS, name)
