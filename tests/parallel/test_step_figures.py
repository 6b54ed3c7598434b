"""What a step says of itself: phases, tiles of the busiest rank, bytes between ranks."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from internvl_megatron.ranks import RankInfo
from tests.support.layouts import LAYOUTS, Ranks, Scenario
from tests.support.training import replica_rows

pytestmark = pytest.mark.parallel

PHASES = ["plan", "encode", "decode", "backprop", "update"]
MIXED = Scenario(changes={"num_steps": 1})
TEXT = Scenario(rows="text", changes={"num_steps": 1})


def _figures(info: RankInfo, ranks: Ranks, scenario: Scenario) -> dict[str, Any]:
    import torch

    from internvl_megatron.device import open_device
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.ranks import joined
    from tests.support.training import make_step

    torch.set_num_threads(1)
    device = open_device("cpu")
    config = scenario.config(ranks)
    with joined(info, device, 60):
        groups = make_groups(ranks.layout, device, 60, ranks.vision_layout)
        step, _ = make_step(config, None, groups, device)
        rows: Any = replica_rows(scenario, config, 0, ranks.layout, info.rank)
        result = step.run(rows, 0)
        table = result.agreement.table
        return {
            "names": [span.name for span in result.spans],
            "ordered": all(
                a.end_seconds <= b.start_seconds for a, b in zip(result.spans, result.spans[1:], strict=False)
            ),
            "most": result.most_tiles_per_rank,
            "bytes": result.sent_bytes,
            "tiles": len(table),
            "decoders": table.decoder.tolist(),
        }


@pytest.mark.parametrize("layout", ["1", "DP2", "TP2xPP2", "TP2+SPxCP2"])
def test_figures_of_a_step_with_images(run_ranks: Callable[..., list[Any]], layout: str) -> None:
    ranks = LAYOUTS[layout]
    found = run_ranks(_figures, ranks.num_ranks, ranks, MIXED)
    for one in found:
        names = one["names"]
        if ranks.pipeline_size == 1:
            assert names == PHASES
        else:  # encode and backprop interrupt decode
            assert list(dict.fromkeys(names)) == PHASES
            assert names[-2:] == PHASES[-2:]
        assert one["ordered"]
        assert one["most"] == -(-one["tiles"] // ranks.num_ranks)
        assert one["bytes"] == found[0]["bytes"]
    if ranks.num_ranks == 1:
        assert found[0]["bytes"] == 0
    if layout == "DP2":
        # Nothing but tiles that change their rank, with their embeddings and gradients (4 tokens of 64 fp32 values).
        per_tile = 3 * 28 * 28 + 2 * 4 * 64 * 4
        held = [found[0]["decoders"].count(rank) for rank in range(2)]
        moved = max(held) - found[0]["most"]
        assert found[0]["bytes"] == moved * per_tile


def test_a_step_without_images_moves_nothing(run_ranks: Callable[..., list[Any]]) -> None:
    for one in run_ranks(_figures, 4, LAYOUTS["TP2xPP2"], TEXT):
        assert (one["tiles"], one["most"], one["bytes"]) == (0, 0, 0)


SLOW_SECONDS = 1.0


def _with_a_slow_encoder(info: RankInfo, ranks: Ranks) -> list[str]:
    """Rank 1 takes longer for every forward pass of its encoder."""
    import torch

    from internvl_megatron.device import open_device
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.ranks import joined
    from internvl_megatron.train.stragglers import find_stragglers, gather_work
    from tests.support.training import make_step

    torch.set_num_threads(1)
    device = open_device("cpu")
    config = MIXED.config(ranks)
    with joined(info, device, 60):
        groups = make_groups(ranks.layout, device, 60, ranks.vision_layout)
        step, model = make_step(config, None, groups, device)
        if info.rank == 1:
            model.vision.register_forward_pre_hook(lambda *_: time.sleep(SLOW_SECONDS))
        rows: Any = replica_rows(MIXED, config, 0, ranks.layout, info.rank)
        work = gather_work(step.run(rows, 0).work, groups.host_world)
        assert work[:, 1, 1].tolist() == [2.0, 2.0], "rows of each"
        return [slow.name for slow in find_stragglers(work, [0, 0], 1.5, SLOW_SECONDS)]


def test_a_rank_with_a_slow_encoder_is_named(run_ranks: Callable[..., list[Any]]) -> None:
    for named in run_ranks(_with_a_slow_encoder, 2, LAYOUTS["DP2"]):
        assert "rank 1 vision" in named and "rank 0 vision" not in named
