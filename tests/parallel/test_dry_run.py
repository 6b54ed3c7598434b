"""A step without memory is the step: what real ranks hold, send, compute and have alive at most, and what the same ranks of a fake world do."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from internvl_megatron.config.plan import plan
from internvl_megatron.config.schema import DataConfig, RunConfig
from internvl_megatron.ranks import RankInfo
from internvl_megatron.scaling.memory import rank_bytes
from tests.support.layouts import ADAMW, LAYOUTS, Ranks, Scenario, run_config
from tests.support.models import small_model
from tests.support.rows import MemoryRows
from tools import dry_run

pytestmark = pytest.mark.parallel

PEAK_TOLERANCE = 0.05
SMALL_BUCKETS = 4000
"""Parameters of a bucket of gradients: several in models as small as these."""


@dataclass(frozen=True)
class Case:
    """A layout, and what is not as usual."""

    ranks: Ranks
    parallel_changes: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    family: str = "300m"

    @property
    def config(self) -> RunConfig:
        changes = {"prepare_ahead": False, **self.parallel_changes}
        data = DataConfig(tokens_per_row=64, tiles_per_row=16, meta="not read", tokenizer="not read")
        return run_config(
            small_model(self.family),
            parallel=self.ranks.config(**changes),
            **{"data": data, "optimizer": ADAMW, "rows_per_step": 4, **self.changes},
        )

    def rows(self, replica: int, rank: int) -> MemoryRows:
        """A rank's share of a step."""
        config, layout = self.config, self.ranks.layout
        members = layout.replica_ranks(replica)
        own = range(replica, config.rows_per_step, layout.data_size)
        return MemoryRows(Scenario().data(config, 0), own, members.index(rank), len(members))


SHARDED = {"vision_sharding": "sharded", "vision_recompute": "layer"}
CASES = {
    "DP2": Case(LAYOUTS["DP2"]),
    "TP2+SP": Case(LAYOUTS["TP2+SP"]),
    "PP2": Case(LAYOUTS["PP2"]),
}
MORE_CASES = {
    "CP2": Case(LAYOUTS["CP2"]),
    "PP2xVPP2": Case(LAYOUTS["PP2xVPP2"]),
    "DP2 sharded encoder": Case(LAYOUTS["DP2"], SHARDED, family="6b"),
    "TP2xPP2": Case(LAYOUTS["TP2xPP2"]),
    "TP2+SPxPP2 computed again": Case(LAYOUTS["TP2+SPxPP2"], {"language_recompute": "full", "vision_window_rows": 2}),
    "PP2xDP2 sharded encoder in bf16": Case(
        LAYOUTS["PP2xDP2"], {**SHARDED, "vision_shard_ranks": 2}, {"dtype": "bf16"}, "6b"
    ),
    "CP4": Case(LAYOUTS["CP4"]),
    "TP2xPP2 first stage": Case(LAYOUTS["TP2xPP2 first stage"]),
    "PP2xVPP2xDP2": Case(LAYOUTS["PP2xVPP2xDP2"]),
    "PP4": Case(LAYOUTS["PP4"]),
}


def real_figures(info: RankInfo, cases: dict[str, Case]) -> dict[str, Any]:
    """One real rank of every case, all of the same number of ranks."""
    import torch

    from internvl_megatron.device import open_device
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.ranks import joined
    from internvl_megatron.train import optimizer
    from tests.support.training import make_step
    from tools.fake_step import step_figures

    torch.set_num_threads(1)
    optimizer.BUCKET_PARAMETERS = SMALL_BUCKETS
    device, found = open_device("cpu"), {}
    with joined(info, device, 60):
        for name, case in cases.items():
            made = plan(case.config, info.world_size)
            layout = made.layout
            groups = make_groups(layout, device, 60, made.vision_layout)
            step, model = make_step(case.config, None, groups, device)
            found[name] = step_figures(step, model, groups, case.rows(layout.replica(info.rank), info.rank))
            chunks: list[Any] = [chunk.module for chunk in step.language]
            kept = [chunk.decoder.input_tensor for chunk in chunks]
            assert kept == [None] * len(kept), f"{name}: what a stage was sent last is kept after the step"
    return found


def dry_figures(info: RankInfo, cases: dict[str, Case]) -> dict[str, list[Any]]:
    """All ranks of every case, one after the other in this process."""
    from internvl_megatron.train import optimizer
    from tools import fake_step

    optimizer.BUCKET_PARAMETERS = SMALL_BUCKETS
    return {
        name: fake_step.dry_run(info, case.config, case.ranks.num_ranks, range(case.ranks.num_ranks), case.rows)
        for name, case in cases.items()
    }


@pytest.fixture(scope="module")
def both(run_ranks: Callable[..., list[Any]]) -> Callable[[str], list[tuple[Any, Any]]]:
    """By case, what every rank has done in a real and in a fake world; all cases of a set run together."""
    known: dict[str, list[tuple[Any, Any]]] = {}

    def figures(name: str) -> list[tuple[Any, Any]]:
        if name not in known:
            together = CASES if name in CASES else {name: MORE_CASES[name]}
            num_ranks = together[name].ranks.num_ranks
            real = run_ranks(real_figures, num_ranks, together)
            [dry] = run_ranks(dry_figures, 1, together)
            for case in together:
                pairs = zip((rank[case] for rank in real), (run.figures for run in dry[case]), strict=True)
                known[case] = list(pairs)
        return known[name]

    return figures


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_CASES)])
def test_a_dry_rank_holds_sends_and_computes_what_a_real_one_does(
    both: Callable[[str], list[tuple[Any, Any]]], name: str
) -> None:
    for rank, (real, dry) in enumerate(both(name)):
        assert dry.held == real.held, f"rank {rank}"
        assert dry.messages == real.messages, f"rank {rank}"
        assert dry.flops == real.flops, f"rank {rank}"
        assert dry.peak_bytes == pytest.approx(real.peak_bytes, rel=PEAK_TOLERANCE), f"rank {rank}"


def test_the_command_counts_the_demo(tmp_path: Path) -> None:
    output = tmp_path / "rank.json"
    assert dry_run.main(["demo_digits", "--world-size", "4", "--rank", "3", "--output", str(output)]) == 0
    found = json.loads(output.read_text(encoding="utf-8"))
    assert (found["layout"], found["stage"], found["rows_per_replica"]) == ("TP2 x PP2 x DP1", 1, 2)
    groups = {message["group"] for message in found["messages"]}
    assert {"language.tp", "vision.dp", "embeddings", "gradients", "host_data"} <= groups


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["demo_digits", "--world-size", "4", "--rank", "4"], "--rank=4"),
        (["demo_digits", "--world-size", "0"], "--world-size=0"),
        (["demo_digits", "--world-size", "4", "--output", "no/such/folder/rank.json"], "no/such/folder is no folder"),
        (["demo_digits", "--world-size", "4", "--image-share", "1"], "--image-share=1"),
        (["demo_digits", "--world-size", "4", "--image-share", "0.9"], "90% image tokens cannot be drawn"),
        (["demo_digits", "--world-size", "3"], "parallel."),
        (["demo_digits", "--world-size", "4", "--set", "optimizer.name=sgd"], "optimizer.name=sgd"),
        (["internvl3_1b_mpo", "--world-size", "8"], "loss.kind=mpo"),
        (["demo_digits", "--world-size", "4", "--rows-per-replica", "0"], "--rows-per-replica=0"),
        (["demo_digits", "--world-size", "4", "--layers", "transformer_engine", "--set", "dtype=fp32"], "dtype=fp32"),
        (
            [
                "internvl3_1b_sft",
                "--world-size",
                "8",
                "--layers",
                "transformer_engine",
                "--set",
                "lora.language_rank=8",
            ],
            "lora",
        ),
    ],
)
def test_the_command_says_what_to_mend(capsys: pytest.CaptureFixture[str], arguments: list[str], named: str) -> None:
    assert dry_run.main(arguments) == 2
    assert named in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 512, 1023], ids=["first stage", "a middle stage", "last stage"])
def test_a_rank_of_1024_takes_a_minute_and_little_memory(tmp_path: Path, rank: int) -> None:
    """78B: 60 s of a core, 4 GB, for two windows of four rows."""
    output, name, windows = tmp_path / "rank.json", "internvl3_78b_pretrain", "parallel.vision_window_rows=4"
    options = ["--world-size", "1024", "--rank", str(rank), "--output", str(output), "--set", windows]
    assert dry_run.main([name, *options]) == 0
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["seconds"] < 60
    assert found["resident_bytes"] < 4e9
    config = dry_run.dry_config(name, 1024, [windows], None)
    foretold = rank_bytes(config, plan(config, 1024))
    state = found["weights_bytes"] + found["gradients_bytes"] + found["optimizer_bytes"]
    assert 0.9 * foretold.state < state < 1.01 * foretold.state, "closed form, of the fullest rank"
